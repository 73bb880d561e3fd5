"""Measure a safety landscape: the same program as `jaxscape scan`."""

import sys

from jaxscape.cli.main import main

main(["scan", *sys.argv[1:]])
