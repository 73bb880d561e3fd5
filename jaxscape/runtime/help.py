"""How an option is shown by `--help`."""

from typing import Any

import tyro


def shown(default: str | None = None, metavar: str | None = None) -> Any:
    """An annotation for the field of an options class.

    Arguments:
        default: what `--help` says about the default, where the value itself, such as None, says nothing.
        metavar: what stands for the option's value, instead of its type.
    """
    return tyro.conf.arg(help_behavior_hint=None if default is None else f"(default: {default})", metavar=metavar)
