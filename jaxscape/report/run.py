"""A scan as its directory keeps it: its landscape, and the answers at each point with what evaluators said of them.

Files of a run are only read, so a run that is still going on can be read too. What they hold is untrusted.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxscape.evaluate.base import Label
from jaxscape.evaluate.evaluators import DEFAULT_EVALUATOR
from jaxscape.finetuning.trajectory import Trajectory, load_trajectories
from jaxscape.landscapes.labels import LabelBook
from jaxscape.landscapes.landscape import Landscape
from jaxscape.landscapes.store import GENERATIONS, PROMPTS, SCAN, Point, Record, answers_by_point, read_prompts
from jaxscape.runtime.errors import UserError, is_utf8, reason
from jaxscape.runtime.files import read_json, whole_lines
from jaxscape.runtime.rundir import CONFIG

CONFIG_TYPES = {
    **dict.fromkeys(("model", "evaluator", "prompt_source"), (str,)),
    **dict.fromkeys(("seed", "max_new_tokens", "top_k"), (int,)),
    **dict.fromkeys(("temperature", "top_p"), (int, float)),
    "direction_names": (list,),
}
"""The types of what readers of a run take from its `config.json`."""


@dataclass(frozen=True, eq=False)
class KeptRun:
    """A scan, finished or not. Its texts and names are untrusted.

    Attributes:
        directory: the run's directory.
        config: what `config.json` holds.
        prompts: the prompts, in the order in which they are asked at each point.
        points: the points of which every answer is there, in the order of `generations.jsonl`.
        answers: for each of these points, the lines of `generations.jsonl`, one for each prompt.
        labels: for each evaluator, by name, its labels of the answers at the first of these points: a list for each
            point, with None for an answer that it could not judge. The evaluator that decides the ASR is the first.
        trajectories: the projected paths of finetunings.
    """

    directory: Path
    config: Mapping[str, Any]
    landscape: Landscape
    prompts: tuple[str, ...]
    points: tuple[Point, ...]
    answers: Sequence[Sequence[Record]]
    labels: Mapping[str, Sequence[Sequence[Label | None]]]
    trajectories: Sequence[Trajectory]

    @property
    def direction_names(self) -> list[list[str]]:
        """The names of the directions of each set; empty if `config.json` has none."""
        return self.config.get("direction_names") or []

    @cached_property
    def numbers(self) -> dict[Point, int]:
        """The number of each point of the landscape in its grid, the last axis varying fastest, or in the list of
        points. The points are in the order of the landscape's arrays."""
        land = self.landscape
        grid = land.points or tuple(itertools.product(*(axis.values for axis in land.axes)))
        return {(direction, coords): number for direction in range(len(land.asr)) for number, coords in enumerate(grid)}


def load_run(directory: Path) -> KeptRun:
    """Read a run's files.

    Raises:
        UserError: the directory holds no scan, or a file of it is damaged.
    """
    if not (directory / CONFIG).exists():
        raise UserError(f"{directory} holds no landscape: it has no {CONFIG}; give the directory that a scan wrote.")
    config = read_json(directory / CONFIG)
    if not config.keys() >= SCAN.marks:
        raise UserError(
            f"{directory} holds something other than a scan (see its {CONFIG}): give the directory that a scan wrote."
        )
    landscape = Landscape.load(directory)
    try:
        _check_config(config, len(landscape.asr))
        prompts = [_text(line["prompt"]) for line in read_prompts(directory)]
        if len(prompts) != landscape.num_prompts:
            raise ValueError(f"{PROMPTS} has {len(prompts)} prompts, and the landscape is of {landscape.num_prompts}")
        with (directory / GENERATIONS).open("rb") as file:
            by_point = answers_by_point(whole_lines(file), prompts)
        points, answers = list(by_point), list(by_point.values())
        for record in itertools.chain(*answers):
            _text(record["generation"])
        book = LabelBook(points, len(prompts), directory)
        book.restore(len(points), cut=False)
        decides = str(config.get("evaluator", DEFAULT_EVALUATOR))
        labels = {decides: list(map(_verdicts, answers))} | dict(sorted(book.rows.items()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"The run in {directory} cannot be read ({reason(error)}): give the directory that its scan wrote."
        ) from error
    trajectories = load_trajectories(directory)
    run = KeptRun(directory, config, landscape, tuple(prompts), tuple(points), answers, labels, trajectories)
    if strangers := [point for point in points if point not in run.numbers]:
        raise UserError(
            f"The run in {directory} cannot be read ({list(strangers[0][1])} is no point of its landscape): give the "
            f"directory that its scan wrote."
        )
    return run


def load_finished(directory: Path) -> KeptRun:
    """Read a finished scan. Of its labels, there are those of evaluators that have judged all answers.

    Raises:
        UserError: the directory holds no finished scan, or a file of it is damaged.
    """
    run = load_run(directory)
    if "shard" in run.config:
        raise UserError(f"{directory} holds a shard of a scan: merge all shards first.")
    if not run.landscape.complete or len(run.points) != run.landscape.num_evaluated:
        raise UserError(f"The run in {directory} is not finished; run its command again to finish it first.")
    labels = {name: rows for name, rows in run.labels.items() if len(rows) == len(run.points)}
    return replace(run, labels=labels)


def _check_config(config: Mapping[str, Any], num_sets: int) -> None:
    """Raise a `TypeError` if a value of `config.json` that is read here has another type than a scan writes, and a
    `ValueError` if there are names, but not of as many direction sets."""
    for key, types in CONFIG_TYPES.items():
        if not isinstance(config.get(key), (*types, type(None))):
            raise TypeError(f"{key} in {CONFIG} is {config[key]!r:.60}")
    for names in config.get("direction_names") or []:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"direction_names in {CONFIG} has {names!r:.60}")
    if (count := len(config.get("direction_names") or [])) not in (0, num_sets):
        raise ValueError(f"direction_names in {CONFIG} are of {count} direction sets, and not of {num_sets}")


def _verdicts(records: Sequence[Record]) -> list[Label | None]:
    """The labels by which the ASR was counted."""
    return ["refused" if record["refused"] else "complied" for record in records]


def _text(value: Any) -> str:
    if not isinstance(value, str) or not is_utf8(value):
        raise TypeError(f"{value!r:.60} is no text")
    return value
