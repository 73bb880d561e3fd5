"""The results of a sweep: a table of all scans, as Markdown and CSV, and a report."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxscape.landscapes.landscape import Landscape
from jaxscape.report.csv_text import csv_text
from jaxscape.report.markup import markdown_table
from jaxscape.report.merged import merge_and_draw
from jaxscape.report.page.document import save_report
from jaxscape.report.tables import landscape_cells, landscape_estimates
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.files import write_whole
from jaxscape.runtime.remote import run_directory
from jaxscape.sweeps.cells import Cell
from jaxscape.sweeps.tasks import Task, is_done, note_ending, notes_of, on_disk, status_of

MARKDOWN, CSV, REPORT = "table.md", "table.csv", "report.html"


@dataclass(frozen=True)
class Result:
    """What there is of a scan of a sweep.

    Attributes:
        state: how it stands, such as `done`.
        landscape: None while it is not done.
    """

    cell: Cell
    state: str
    landscape: Landscape | None


def results_of(tasks: Sequence[Task]) -> list[Result]:
    """What there is of each scan of a sweep. Shards that are done and not merged yet are merged.

    Arguments:
        tasks: all tasks of the sweep, in their order.
    """
    scans = [list(group) for _, group in itertools.groupby(tasks, key=lambda task: task.whole.directory)]
    return [_result(scan) for scan in scans]


def _result(scan: Sequence[Task]) -> Result:
    """What there is of a scan, from its tasks."""
    states = {status_of(task).state for task in on_disk(scan)}
    if states == {"done"}:
        finish_scan(scan)
        return Result(scan[0].cell, "done", Landscape.load(scan[0].whole.directory))
    worst = next(
        state for state in ("failed", "running", "stopped", "unfinished", "done", "waiting") if state in states
    )
    return Result(scan[0].cell, "stopped" if worst == "done" else worst, None)


def finish_scan(scan: Sequence[Task]) -> None:
    """Merge the shards of a scan if all of them are done and no one has merged them yet.

    Several processes may do this at the same time: the run appears whole, once.

    Arguments:
        scan: its tasks.
    """
    noted = notes_of(scan)
    if is_done(noted[0].whole) or not all(map(is_done, noted)):
        return
    shards, whole = [task.directory for task in scan], scan[0].whole.directory
    try:
        merge_and_draw(shards, whole)
    except UserError:
        merge_and_draw(shards, whole)  # another process may have put the run there in the meantime, which is seen now
    note_ending(notes_of(scan)[0].whole, 0)


def save_results(results: Sequence[Result], out: Path) -> list[Path]:
    """Write `table.md`, `table.csv`, and `report.html` with the scans that are done, if there are any.

    Arguments:
        out: the sweep's directory.

    Returns:
        The files written.
    """
    done = [out / result.cell.name for result in results if result.landscape is not None]
    place = run_directory(out, (MARKDOWN, CSV, REPORT))
    place.mkdir(parents=True, exist_ok=True)
    write_whole(place / MARKDOWN, to_markdown(results))
    write_whole(place / CSV, csv_text(_aligned(map(_numbers, results))))
    return [place / MARKDOWN, place / CSV, *([save_report(done, place / REPORT)] if done else [])]


def to_markdown(results: Sequence[Result]) -> str:
    """The text of `table.md`: a row for each scan, with its numbers and their 95 % intervals as in
    `jaxscape.report.tables.landscape_table`."""
    rows = _aligned(map(_texts, results))
    return markdown_table([list(rows[0]), *(list(map(str, row.values())) for row in rows)]) + "\n"


def _texts(result: Result) -> dict[str, Any]:
    """A row of `table.md`."""
    return _head(result) | ({} if result.landscape is None else landscape_cells(result.landscape))


def _numbers(result: Result) -> dict[str, Any]:
    """A row of `table.csv`."""
    estimates = {} if result.landscape is None else landscape_estimates(result.landscape)
    return _head(result) | dict(
        column for name, estimate in estimates.items() if estimate is not None for column in _columns(name, estimate)
    )


def _columns(name: str, estimate: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The columns of a number: its value, the ends of its interval, and whether they are only lower bounds."""
    ends = ("", "_low", "_high")
    yield from zip((f"{name}{end}" for end in ends), (estimate["value"], *estimate["interval"]), strict=True)
    if "at_least" in estimate:
        bounds = (estimate["at_least"], *estimate["interval_at_least"])
        yield from zip((f"{name}{end}_at_least" for end in ends), bounds, strict=True)


def _head(result: Result) -> dict[str, Any]:
    """The first columns of a row. The numbers of prompts and of direction sets are those of the run that is there."""
    varied = {setting.option: setting.text for setting in result.cell.varied}
    head = {"scan": result.cell.name, **varied, "state": result.state}
    if (land := result.landscape) is None:
        return head
    return head | {"num_prompts": land.num_prompts, "num_directions": len(land.without_controls().asr)}


def _aligned(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with all columns. What a row does not have is an empty cell."""
    given = list(rows)
    columns = dict.fromkeys(column for row in given for column in row)
    return [{column: row.get(column, "") for column in columns} for row in given]
