"""The tasks of a sweep: each is a scan, or a shard of one. How each of them stands is read from the disk."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from jaxscape.landscapes.runs import CONFIG, KINDS, RESULTS, Progress
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import is_locked, read_json, write_whole
from jaxscape.runtime.remote import is_remote, run_directory
from jaxscape.sweeps.cells import Cell

SHARDS, NOTES = "shards", "notes"
"""Folders of a sweep's directory: the runs of shards, and for each task a file that says how it ended."""

State = Literal["waiting", "running", "stopped", "unfinished", "failed", "done"]


@dataclass(frozen=True)
class Task:
    """A scan of a sweep, or a shard of one.

    Attributes:
        number: its number among the tasks of the sweep, from 1.
        out: the directory of the sweep.
        shard, shards: which shard of how many it is, from 1; 1 of 1 is a whole scan.
    """

    number: int
    out: Path
    cell: Cell
    shard: int = 1
    shards: int = 1

    @property
    def whole(self) -> "Task":
        """The task that makes the whole scan: this one, unless it is a shard."""
        return replace(self, shard=1, shards=1)

    @property
    def name(self) -> str:
        """A name that no other task of the sweep has."""
        return self.cell.name if self.shards == 1 else f"{self.cell.name}-{self.shard}-of-{self.shards}"

    @property
    def directory(self) -> Path:
        """The directory that the task fills."""
        return self.out / self.name if self.shards == 1 else self.out / SHARDS / self.name

    @property
    def options(self) -> tuple[str, ...]:
        """The arguments of `jaxscape scan` that do the task, without its directory."""
        part = () if self.shards == 1 else ("--shard", f"{self.shard}/{self.shards}")
        return (*self.cell.arguments, *part)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments of `jaxscape scan` that do the task."""
        return (*self.options, "--out", str(self.directory))

    @property
    def command(self) -> str:
        """The command that does the task, as one types it."""
        return shlex.join(("jaxscape", "scan", *self.arguments))


@dataclass(frozen=True)
class Ending:
    """How a task ended, as its note says.

    Attributes:
        options: the arguments of `jaxscape scan` that it was, without its directory.
        exit_code: 0 if it did what it was to do.
        reason: why not, in a sentence.
    """

    options: str
    exit_code: int
    reason: str = ""


@dataclass(frozen=True)
class Status:
    """How a task stands.

    Attributes:
        state: `waiting` until it begins; `running`; `stopped` before its end, so that the next run of the task goes on;
            `unfinished` at a URL, where it cannot be told which of the two it is; `failed`; or `done`.
        reason: why it failed.
        progress: how many of its points are done; None before it has begun.
    """

    state: State
    reason: str = ""
    progress: Progress | None = None


def make_tasks(cells: Sequence[Cell], shards: int, out: Path) -> list[Task]:
    """The tasks of a sweep, cell by cell."""
    parts = [(cell, shard) for cell in cells for shard in range(1, shards + 1)]
    return [Task(number, out, cell, shard, shards) for number, (cell, shard) in enumerate(parts, 1)]


def on_disk(tasks: Sequence[Task], only: Sequence[str] = RESULTS) -> list[Task]:
    """The tasks of a sweep whose directory is a URL, in a copy on this machine; those of any other as they are. What
    the functions below write into a copy is pushed to the store.

    Arguments:
        tasks: tasks of one sweep.
        only: patterns of the names of files whose content is wanted.
    """
    place = run_directory(tasks[0].out, only)
    return [replace(task, out=place) for task in tasks]


def notes_of(scan: Sequence[Task]) -> list[Task]:
    """The tasks of a scan, as `on_disk` gives them, with nothing but their notes."""
    return on_disk(scan, [f"{scan[0].cell.name}*.json"])


def note_ending(task: Task, exit_code: int, why: str = "") -> None:
    """Write down how a task ended."""
    path = _note(task)
    ending = Ending(shlex.join(task.options), exit_code, why)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(asdict(ending), indent=1, ensure_ascii=False) + "\n")


def forget_ending(task: Task) -> None:
    """Remove the note of how a task ended, because it begins again."""
    _note(task).unlink(missing_ok=True)


def is_done(task: Task) -> bool:
    """Whether a task has been done, with the options that it has now. A shard is done, too, if the whole scan is.

    After a change of the sweep's file it is not: the task is run again, and the check of the run that is there says
    whether that is another one.
    """
    ending = _ending(task)
    if ending is not None and ending.exit_code == 0 and (task.directory / CONFIG).exists():
        return True
    return task != task.whole and is_done(task.whole)


def status_of(task: Task) -> Status:
    """How a task stands."""
    ending, progress, problem = _ending(task), None, ""
    try:
        progress = _progress(task.directory)
    except Exception as error:  # whatever a damaged run has in its files, the other tasks are to be listed
        problem = reason(error)
    if is_locked(task.directory / KINDS["scan"].state):
        return Status("running", progress=progress)
    if is_done(task):
        return Status("done", progress=progress)
    if ending is not None and ending.exit_code:
        return Status("failed", ending.reason, progress)
    if progress is None and not problem:
        return Status("waiting")
    return Status("unfinished" if is_remote(task.directory) else "stopped", problem, progress)


def _progress(directory: Path) -> Progress | None:
    """How far the scan in a directory is; None if there is none."""
    config = directory / CONFIG
    return KINDS["scan"].progress(directory, read_json(config)) if config.exists() else None


def _note(task: Task) -> Path:
    """The file that says how a task ended."""
    return task.out / NOTES / f"{task.name}.json"


def _ending(task: Task) -> Ending | None:
    """How a task ended; None if it has not, or had other options then."""
    path = _note(task)
    if not path.exists():
        return None
    try:
        ending = Ending(**read_json(path))
    except TypeError as error:
        raise UserError(f"{path} is not what jaxscape sweep writes ({reason(error)}): remove it.") from error
    return ending if ending.options == shlex.join(task.options) else None
