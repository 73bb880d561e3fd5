"""How an option is shown by `--help`."""

from typing import Any

import tyro


def shown(default: str | None = None, metavar: str | None = None) -> Any:
    """An annotation for a field of an options class, which sets how `--help` shows this option.

    Arguments:
        default: what `--help` says about the default, where the value itself, such as None, says nothing.
        metavar: the placeholder of the option's value; None shows the type of the value.
    """
    return tyro.conf.arg(help_behavior_hint=None if default is None else f"(default: {default})", metavar=metavar)
