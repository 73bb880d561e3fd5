"""Finetune a chat model: the same program as `jaxscape finetune`."""

import sys

from jaxscape.cli.main import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
