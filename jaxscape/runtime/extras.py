"""Optional dependencies: libraries that one part of the program needs, and most users do without."""

import importlib
from typing import Any

from jaxscape.runtime.errors import UserError, reason


def import_extra(module: str, extra: str) -> Any:
    """Import a module of an optional dependency.

    Arguments:
        extra: what to write in `pip install 'jaxscape[EXTRA]'` to get it.

    Raises:
        UserError: the module, or something that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"The Python package {module.partition('.')[0]} cannot be imported ({reason(error)}): run pip install "
            f"'jaxscape[{extra}]'."
        ) from error
