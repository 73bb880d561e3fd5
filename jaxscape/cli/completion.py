"""`jaxscape completion`: print a script with which a shell completes commands."""

import importlib
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal

import tyro

from jaxscape.cli.arguments import CONFIG

Shell = Literal["bash", "zsh", "fish"]


@dataclass(frozen=True)
class Completion:
    """Print a script with which a shell completes verbs, options and their values when you press the tab key.

    Examples:
      # For bash; start a new shell afterwards
      jaxscape completion bash > ~/.local/share/bash-completion/completions/jaxscape
      # For zsh, in a directory of $fpath
      jaxscape completion zsh > ~/.zfunc/_jaxscape
      # For fish
      jaxscape completion fish > ~/.config/fish/completions/jaxscape.fish
    """

    shell: Annotated[Shell, tyro.conf.Positional]
    """The shell."""

    def run(self) -> None:
        from jaxscape.cli.main import VERBS

        verbs: list[Any] = []
        for name, verb in VERBS.items():
            options = getattr(importlib.import_module(f"jaxscape.cli.{verb.module}"), verb.options)
            verbs.append(Annotated[options, tyro.conf.subcommand(name, description=verb.description)])
        config = [marker for marker in CONFIG if marker is not tyro.conf.AvoidSubcommands]
        arguments = ["--tyro-write-completion", self.shell, "-"]
        tyro.cli(reduce(or_, verbs), prog="jaxscape", args=arguments, config=config)
