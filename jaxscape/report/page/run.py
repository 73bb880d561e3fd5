"""A run as the report shows it: its landscape, and the answers at each point with what every evaluator said of them.

Files of a run are only read, so a run that is still going on can be shown too. What they hold is untrusted.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxscape.evaluate.base import Label
from jaxscape.evaluate.evaluators import DEFAULT_EVALUATOR
from jaxscape.finetuning.trajectory import Trajectory, load_trajectories
from jaxscape.landscapes.labels import LabelBook
from jaxscape.landscapes.landscape import Landscape
from jaxscape.landscapes.store import GENERATIONS, PROMPTS, SCAN, Point
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import read_json, whole_lines
from jaxscape.runtime.rundir import CONFIG

REMARKS = {
    "cut": "ended where its outcome was decided",
    "unanswered": "thinking without an answer",
    "not finite": "ended at a NaN or infinite logit",
}
"""What else a run records of an answer, and how the page says it."""


@dataclass(frozen=True, eq=False)
class PointAnswers:
    """The answers at a point, one for each prompt of the run.

    Attributes:
        direction: index of the direction set.
        number: number of the point in the grid, the last axis varying fastest, or in the list of points.
        texts: what the model answered, with what it thought before.
        labels: what each evaluator that has judged the point said, by the evaluator's name; None for an answer that it
            could not judge. The evaluator that decides the ASR is the first.
        remarks: for each prompt, keys of `REMARKS`.
    """

    direction: int
    number: int
    texts: tuple[str, ...]
    labels: Mapping[str, Sequence[Label | None]]
    remarks: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)
class ReportedRun:
    """A scan that a report shows, finished or not.

    Attributes:
        name: what tells the run from the others of the report.
        config: what `config.json` holds.
        prompts: the prompts, in the order in which points are asked.
        points: the answers at the points that are evaluated.
        trajectories: the paths of finetunings.
    """

    name: str
    landscape: Landscape
    config: Mapping[str, Any]
    prompts: tuple[str, ...]
    points: tuple[PointAnswers, ...]
    trajectories: tuple[Trajectory, ...] = ()


def load_run(directory: Path, name: str) -> ReportedRun:
    """Read a run's files.

    Raises:
        UserError: the directory holds no scan, or a file of it is damaged.
    """
    config = read_json(directory / CONFIG)
    if not config.keys() >= SCAN.marks:
        raise UserError(
            f"{directory} holds something other than a scan (see its {CONFIG}), and a report shows scans: leave it out."
        )
    landscape = Landscape.load(directory)
    try:
        lines = (directory / PROMPTS).read_text(encoding="utf-8").split("\n")[:-1]
        prompts = tuple(_text(json.loads(line)["prompt"]) for line in lines)
        if len(prompts) != landscape.num_prompts:
            raise ValueError(f"{PROMPTS} has {len(prompts)} prompts, and the landscape is of {landscape.num_prompts}")
        points = _points(directory, landscape, prompts, str(config.get("evaluator", DEFAULT_EVALUATOR)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"The run in {directory} cannot be read ({reason(error)}): give the directory that its scan wrote."
        ) from error
    return ReportedRun(name, landscape, config, prompts, points, tuple(load_trajectories(directory)))


def _points(directory: Path, landscape: Landscape, prompts: Sequence[str], decides: str) -> tuple[PointAnswers, ...]:
    """The answers at all points of which every answer is there.

    Arguments:
        decides: name of the evaluator that decides the ASR, whose verdicts are among the answers.
    """
    with (directory / GENERATIONS).open("rb") as file:
        lines = whole_lines(file)
    size, numbers = len(prompts), _numbers(landscape)
    points = [list(map(json.loads, lines[i : i + size])) for i in range(0, len(lines) - size + 1, size)]
    places: list[Point] = [(records[0]["direction"], tuple(records[0]["coords"])) for records in points]
    for place, records in zip(places, points, strict=True):
        expected = [(*place, prompt) for prompt in prompts]
        if place not in numbers or expected != [(r["direction"], tuple(r["coords"]), r["prompt"]) for r in records]:
            raise ValueError(f"lines that should be for one point of the landscape, {list(place[1])}, are not")
    book = LabelBook(places, size, directory)
    book.restore(len(places), cut=False)
    answers = []
    for index, (place, records) in enumerate(zip(places, points, strict=True)):
        labels = {decides: _verdicts(records)} | {
            name: rows[index] for name, rows in sorted(book.rows.items()) if index < len(rows)
        }
        texts = tuple(_text(record["generation"]) for record in records)
        answers.append(PointAnswers(place[0], numbers[place], texts, labels, tuple(map(_remarks, records))))
    return tuple(answers)


def _numbers(landscape: Landscape) -> dict[Point, int]:
    """The number of each point, by its direction set and coordinates."""
    grid = landscape.points or list(itertools.product(*(axis.values for axis in landscape.axes)))
    return {
        (direction, coords): number for direction in range(len(landscape.asr)) for number, coords in enumerate(grid)
    }


def _verdicts(records: Sequence[Mapping[str, Any]]) -> list[Label | None]:
    """The labels by which the ASR was counted."""
    return ["refused" if record["refused"] else "complied" for record in records]


def _remarks(record: Mapping[str, Any]) -> tuple[str, ...]:
    happened = {
        "cut": record.get("cut", False),
        "unanswered": record.get("unanswered", False),
        "not finite": not record.get("finite", True),
    }
    return tuple(name for name, is_so in happened.items() if is_so)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is no text")
    return value
