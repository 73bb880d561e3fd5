"""Progress on the standard error stream: lines that stay, and a bar if the stream is a terminal."""

import sys

from rich.console import Console
from rich.progress import Progress

from jaxscape.runtime.processes import is_first


class _Console(Console):
    """A console that raises a `BrokenPipeError` when no one reads it any more; rich would end the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True  # the display is still to be closed
        raise BrokenPipeError


def progress_display(enabled: bool) -> Progress:
    """A progress display for a `with` statement, whose `print` writes a line that stays. Only the first process shows
    anything."""
    enabled = enabled and is_first()
    console = _Console(
        stderr=True,
        quiet=not enabled,
        markup=False,
        highlight=False,
        force_terminal=sys.stderr.isatty(),  # rich would treat a notebook as a terminal
        force_jupyter=False,
        soft_wrap=True,
    )
    return Progress(console=console, disable=not enabled, transient=True)


def note(text: str) -> None:
    """Write a line on the standard error stream: something that the user should know and need not change. Only the
    first process writes it."""
    if is_first():
        sys.stderr.write(text + "\n")
