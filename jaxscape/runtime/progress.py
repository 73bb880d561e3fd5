"""Progress on the standard error stream: lines that stay, and a bar if the stream is a terminal."""

import sys
from functools import partial

from rich.console import Console, ConsoleDimensions
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from jaxscape.runtime.processes import is_first

MIN_COLUMNS = 30  # of a terminal that has room for a bar


class _Console(Console):
    """A console that raises a `BrokenPipeError` when no one reads it any more, where rich would end the program, and
    that has columns in each terminal: some terminals, and some environments, say that they have none."""

    def on_broken_pipe(self) -> None:
        self.quiet = True  # the display is still to be closed
        raise BrokenPipeError

    @property  # type: ignore[misc]  # nothing sets the size
    def size(self) -> ConsoleDimensions:
        width, height = super().size
        return ConsoleDimensions(width or 80, height or 25)


def progress_display(enabled: bool) -> Progress:
    """A progress display for a `with` statement, whose `print` writes a line that stays. Only the first process shows
    anything, and only a terminal gets a bar."""
    enabled = enabled and is_first()
    console = _Console(
        stderr=True,
        quiet=not enabled,
        markup=False,
        highlight=False,
        force_terminal=sys.stderr.isatty(),  # rich would treat a notebook as a terminal
        force_jupyter=False,
    )
    has_bar = enabled and console.is_interactive and console.width >= MIN_COLUMNS
    description = TextColumn("{task.description}", markup=False)
    columns = (description, BarColumn(bar_width=None), TaskProgressColumn(), TimeRemainingColumn())
    display = Progress(*columns, console=console, disable=not has_bar, transient=True)
    display.print = partial(console.print, soft_wrap=True)  # terminals break lines
    return display


def note(text: str) -> None:
    """Write a line on the standard error stream: something that the user should know and need not change. Only the
    first process writes it."""
    if is_first():
        sys.stderr.write(text + "\n")
