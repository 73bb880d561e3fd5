"""Finetune a chat model: `jaxscape finetune` as a script. Run with --help for its options."""

from jaxscape.cli import Finetune, run_program

if __name__ == "__main__":
    run_program(Finetune)
