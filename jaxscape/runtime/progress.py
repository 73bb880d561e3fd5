"""Progress on the standard error stream: lines that stay, and a bar where there is a terminal."""

import sys

from rich.console import Console
from rich.progress import Progress

from jaxscape.runtime.processes import is_first


def report_to(enabled: bool) -> Progress:
    """A progress display, to be entered with `with`; its `print` writes a line that stays. Of several processes the
    first reports."""
    enabled = enabled and is_first()
    console = Console(
        stderr=True,
        quiet=not enabled,
        markup=False,
        highlight=False,
        force_terminal=sys.stderr.isatty(),  # rich takes a notebook for a terminal
        force_jupyter=False,
        soft_wrap=True,
    )
    return Progress(console=console, disable=not enabled, transient=True)
