"""Numbers of a long run that are reported to another program while it goes on, beside what the run itself writes.

Importing this module does not import JAX, nor the programs.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from jaxscape.runtime import tensorboard_reporter, wandb_reporter
from jaxscape.runtime.errors import UserError

Target = Literal["wandb", "tensorboard", "none"]
"""The program that numbers are reported to, which is also the name of its package and of the extra that installs it."""

FOLDERS = (tensorboard_reporter.FOLDER, wandb_reporter.FOLDER)
"""The folders in a run's directory that hold what was reported."""


@runtime_checkable
class Reporter(Protocol):
    """Takes the numbers of a run. They are numbers only: no text of a prompt or an answer is ever reported."""

    def log(self, step: int, numbers: Mapping[str, int | float]) -> None:
        """Report numbers by name. Steps rise from call to call."""
        ...

    def close(self) -> None:
        """Report what is left, and end."""
        ...


class NoReporter:
    """The reporter that reports nothing."""

    def log(self, step: int, numbers: Mapping[str, int | float]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


REPORTERS: dict[str, Callable[[Path, Mapping[str, Any]], Reporter]] = {
    "wandb": wandb_reporter.WandbReporter,
    "tensorboard": tensorboard_reporter.TensorBoardReporter,
}


def check_target(target: str, directory: Path | None) -> None:
    """Raise a `UserError` if numbers cannot be reported to this program. Nothing is written.

    Arguments:
        directory: the run's directory.
    """
    if target == "none":
        return
    if target not in REPORTERS:
        raise UserError(f"Unknown program {target!r} to report to: choose {', '.join(REPORTERS)} or none.")
    if directory is None:
        raise UserError(f"Reports to {target} are kept in the run's directory: give one with out.")
    if importlib.util.find_spec(target) is None:
        raise UserError(
            f"Reports to {target} need the Python package {target}: run pip install 'jaxscape[{target}]', or leave "
            f"out --report-to."
        )


@contextmanager
def open_reporter(target: str, directory: Path | None, config: Mapping[str, Any]) -> Iterator[Reporter]:
    """A context in which numbers are reported. Only the first process reports.

    Arguments:
        target: see `Target`.
        directory: the run's directory, which exists.
        config: what `config.json` holds.

    Raises:
        UserError: the program cannot be used.
    """
    from jaxscape.runtime.processes import is_first  # imports JAX

    if target == "none" or directory is None or not is_first():
        yield NoReporter()
        return
    reporter = REPORTERS[target](directory, config)
    try:
        yield reporter
    finally:
        reporter.close()
