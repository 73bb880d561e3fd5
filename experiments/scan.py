"""Measure a safety landscape: the same program as `jaxscape scan`."""

import sys

from jaxscape.cli.main import main

if __name__ == "__main__":
    main(["scan", *sys.argv[1:]])
