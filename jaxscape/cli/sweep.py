"""`jaxscape sweep`: the scans of a matrix of options, one after the other or as the tasks of a cluster."""

import signal
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from jaxscape.cli.arguments import parse, parse_option, with_values
from jaxscape.cli.main import user_message
from jaxscape.cli.options import Group, check_texts, select_platform
from jaxscape.cli.scan import Scan
from jaxscape.runtime import preemption, remote
from jaxscape.runtime.children import run_child
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.help import shown
from jaxscape.runtime.streams import BROKEN_PIPE, write_line
from jaxscape.runtime.texts import aligned, printable, shown_text

if TYPE_CHECKING:
    from jaxscape.sweeps.cells import Cell, Setting
    from jaxscape.sweeps.tasks import Task

SCAN = "jaxscape scan"
OWN = ("out", "overwrite", "dry_run", "shard")
"""Options of `jaxscape scan` that a sweep's file cannot give: the sweep sets them, or they make no sense there."""
NOT_FAILED = (130, BROKEN_PIPE, preemption.EXIT_CODE)
"""Exit codes of a task that someone has ended. Its command, given again, goes on with it."""


@dataclass(frozen=True)
class SweepActions:
    """What to do, instead of running all tasks. Give only one of them."""

    list: bool = False
    """List the tasks: number, state, directory and command."""
    run: Annotated[int | None, shown("all tasks", "I")] = None
    """Run task number I. A task that is done already ends at once."""
    status: bool = False
    """Say how each task stands, how many of its points are done, and why it failed."""
    table: bool = False
    """Write table.md, table.csv and report.html, with what is done."""

    def check(self) -> None:
        """Raise a `UserError` if there are several."""
        given = [name for name, value in vars(self).items() if value not in (False, None)]
        if len(given) > 1:
            raise UserError(f"Give only one of {' and '.join(f'--{name}' for name in given)}.")


@dataclass(frozen=True)
class Sweep:
    """Run the scans of a matrix of models, directions, system prompts and any other options of `jaxscape scan`.

    A YAML file gives the options. Each combination of those in its matrix is a scan, or as many shards of a scan as the
    file says: these are the tasks. They run one after the other; on a cluster, each runs by itself with --run.

    Examples:
      # Run all tasks on this machine; those that are done are skipped
      jaxscape sweep experiments/sweep.yaml
      # Run one of them, as an array job of a cluster does
      jaxscape sweep experiments/sweep.yaml --run 3
      # The results of all scans that are done
      jaxscape sweep experiments/sweep.yaml --table
    """

    file: Annotated[Path, tyro.conf.Positional, shown(metavar="FILE")]
    """The YAML file."""
    out: Annotated[Path | None, shown("that of the file", "DIRECTORY")] = None
    """The directory of all runs and results. Unfinished runs in it are resumed."""
    action: Group[SweepActions] = field(default_factory=SweepActions)

    def run(self) -> None:
        check_texts(self.file, self.out or "")
        self.action.check()
        tasks = load_tasks(self.file, self.out)
        if self.action.list:
            write_line(_list(tasks))
        elif self.action.status:
            write_line(_status(tasks))
        elif self.action.table:
            _write_table(tasks)
        elif self.action.run is not None:
            if not 1 <= self.action.run <= len(tasks):
                raise UserError(f"There is no task {self.action.run}: the tasks have the numbers 1 to {len(tasks)}.")
            task = tasks[self.action.run - 1]
            _run_task(task, [other for other in tasks if other.cell == task.cell])
        else:
            _run_all(tasks, self.file)


def load_tasks(file: Path, out: Path | None) -> "list[Task]":
    """The tasks of a sweep.

    Arguments:
        out: the sweep's directory; None for that of the file.
    """
    from jaxscape.sweeps.file import read_sweep
    from jaxscape.sweeps.tasks import make_tasks

    sweep = read_sweep(file, scan_setting)
    return make_tasks(sweep.cells, sweep.shards, out or Path(sweep.out))


def scan_setting(option: str, texts: tuple[str, ...]) -> "Setting":
    """An option of `jaxscape scan` with its value, as a sweep's file has them.

    Raises:
        UserError: there is no such option, or it does not take the value.
    """
    from jaxscape.sweeps.cells import Setting

    if option in OWN:
        raise UserError(f"{option} is no option for a sweep's scans: leave it out.")
    name = f"--{option.replace('_', '-')}"
    if parse_option(Scan, option, (), SCAN) is False:  # the default of every switch
        if texts not in (("true",), ("false",)):
            raise UserError(f"{option} is {shown_text(' '.join(texts))}: it is a switch, so write true or false.")
        arguments: tuple[str, ...] = (name,) if texts == ("true",) else ()
    elif len(texts) == 1 and texts[0].startswith("-"):  # by itself, it would be taken for an option
        arguments = (f"{name}={texts[0]}",)
    else:
        arguments = (name, *texts)
    return Setting(option, texts, arguments, parse_option(Scan, option, arguments, SCAN))


def scan_of(cell: "Cell") -> Scan:
    """The options of `jaxscape scan` that a cell has."""
    return with_values(Scan(), {setting.option: setting.value for setting in (*cell.varied, *cell.fixed)})


def _list(tasks: "Sequence[Task]") -> str:
    """A line for each task."""
    from jaxscape.sweeps.tasks import on_disk, status_of

    states = [status_of(task).state for task in on_disk(tasks)]
    return aligned(
        [
            (str(task.number), state, remote.shown(str(task.directory)), remote.shown(task.command))
            for task, state in zip(tasks, states, strict=True)
        ]
    )


def _status(tasks: "Sequence[Task]") -> str:
    """A line for each task, and one that counts them."""
    from jaxscape.landscapes.runs import progress_text
    from jaxscape.sweeps.tasks import on_disk, status_of

    statuses = [status_of(task) for task in on_disk(tasks)]
    rows = [
        (
            str(task.number),
            status.state,
            "" if status.progress is None else progress_text(status.progress),
            remote.shown(str(task.directory)),
            status.reason,
        )
        for task, status in zip(tasks, statuses, strict=True)
    ]
    counts = Counter(status.state for status in statuses)
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    begun = [status.progress for status in statuses if status.progress is not None]
    points, known = sum(progress.done for progress in begun), sum(progress.total or progress.done for progress in begun)
    return (
        f"{aligned(rows)}\n{len(tasks)} tasks: {states}. Of those that have begun, {points} of {known} points are done."
    )


def _write_table(tasks: "Sequence[Task]") -> None:
    """Merge the shards that are done, print the results of all scans, and write them."""
    from jaxscape.sweeps.results import results_of, save_results, to_markdown

    select_platform(["cpu"])  # none of this needs an accelerator
    results = results_of(tasks)
    paths = save_results(results, tasks[0].out)
    write_line(to_markdown(results))
    for path in paths:
        write_line(f"{path}")


def _run_task(task: "Task", scan: "Sequence[Task]") -> None:
    """Do a task in this process, unless it is done. Whoever does the last shard of a scan merges the shards.

    Arguments:
        scan: the tasks of its scan.
    """
    from jaxscape.sweeps.tasks import is_done, notes_of

    noted = notes_of(scan)[task.shard - 1]
    if is_done(noted):
        write_line(f"Task {task.number} is done: {task.directory}")
        if is_done(noted.whole):
            return
        select_platform(["cpu"])  # merging needs no accelerator
    else:
        _scan(task, scan)
    if _writes() and task != task.whole:
        from jaxscape.sweeps.results import finish_scan

        finish_scan(scan)


def _scan(task: "Task", scan: "Sequence[Task]") -> None:
    """Do a task, and write down how it ends."""
    from jaxscape.runtime.rundir import recorded_value
    from jaxscape.sweeps.tasks import forget_ending, note_ending, notes_of

    def note(exit_code: int, why: str = "") -> None:
        if _writes():
            note_ending(notes_of(scan)[task.shard - 1], exit_code, why)

    forget_ending(notes_of(scan)[task.shard - 1])
    options = parse(Scan, task.arguments, SCAN, None)
    if options.engine.form == "auto":  # shards can be merged only if they have the same form
        places = (remote.run_directory(other.directory, ("config.json",)) for other in scan)
        forms = filter(None, (recorded_value(place, "form") for place in places))
        options = with_values(options, {"form": next(forms, "auto")})
    try:
        options.run()
    except BrokenPipeError:  # no one reads the progress any more; the task has not failed
        raise
    except Exception as error:
        message = user_message(error)
        note(*((1, reason(error)) if message is None else (2, message)))
        raise
    note(0)


def _writes() -> bool:
    """Whether this process writes files. If several processes do a task together, only the first one writes."""
    import jax

    from jaxscape.runtime.processes import is_first

    return not jax.distributed.is_initialized() or is_first()


def _how_it_ended(code: int) -> str:
    """How a process ended that wrote no reason: with this exit code, or if it is negative, by the signal −code."""
    if code < 0:
        return f"Its process was ended by a signal ({signal.strsignal(-code)}); is the memory full?"
    return f"Its process ended with exit code {code}."


def _run_all(tasks: "Sequence[Task]", file: Path) -> None:
    """Do all tasks that are not done, each in a process of its own, so that none can stop the others."""
    from jaxscape.sweeps.tasks import is_done, note_ending, on_disk, status_of

    waiting = [task for task, here in zip(tasks, on_disk(tasks), strict=True) if not is_done(here)]
    for task in waiting:
        write_line(f"Task {task.number} of {len(tasks)}: {task.command}")
        arguments = [str(file), "--out", str(task.out), "--run", str(task.number)]
        code = run_child([sys.executable, "-m", "jaxscape", "sweep", *arguments])
        if code in NOT_FAILED:
            sys.exit(code)
        (here,) = on_disk([task])
        # It may have said itself how it ended, and another process may run this task, or have done it.
        if code and status_of(here).state not in ("failed", "running", "done"):
            note_ending(here, abs(code), _how_it_ended(code))
    failed = [here for here in on_disk(waiting) if not is_done(here)] if waiting else []
    for task in failed:
        status = status_of(task)
        how = "is running in another process." if status.state == "running" else f"failed: {status.reason}"
        write_line(printable(f"Task {task.number} {how}"))
    write_line(
        f"{len(tasks) - len(failed)} of {len(tasks)} tasks are done, {len(tasks) - len(waiting)} of them before."
    )
    if failed:
        sys.exit(1)
