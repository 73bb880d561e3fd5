"""Finetune a chat model: the same program as `jaxscape finetune`."""

import sys

from jaxscape.cli.main import main

main(["finetune", *sys.argv[1:]])
