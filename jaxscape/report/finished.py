"""A finished scan as exports read it: its landscape, and each answer with what every evaluator said of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxscape.evaluate.base import Label
from jaxscape.landscapes.landscape import Landscape
from jaxscape.landscapes.store import Point, reopen_run
from jaxscape.runtime.errors import UserError, as_texts
from jaxscape.runtime.files import read_json
from jaxscape.runtime.rundir import CONFIG


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A finished scan. Its texts and names are untrusted.

    Attributes:
        directory: the run's directory.
        config: what `config.json` holds.
        points: the evaluated points, in the order of `generations.jsonl`.
        answers: for each of these points, the lines of `generations.jsonl`, one for each prompt.
        labels: for each evaluator, by name, its labels of these answers: a list for each point, with None for an answer
            that it could not judge. The evaluator that decides the ASR is the first. One that has not judged all
            answers is left out.
    """

    directory: Path
    config: Mapping[str, Any]
    landscape: Landscape
    points: tuple[Point, ...]
    answers: Sequence[Sequence[Mapping[str, Any]]]
    labels: Mapping[str, Sequence[Sequence[Label | None]]]

    @property
    def prompts(self) -> list[str]:
        """The prompts, in the order in which they are asked at each point."""
        return [record["prompt"] for record in self.answers[0]]


def load_finished(directory: Path) -> FinishedRun:
    """Read a finished scan.

    Raises:
        UserError: the directory holds no finished scan, or a file of it is damaged or cannot be used.
    """
    landscape = Landscape.load(directory)
    if not landscape.complete:
        raise UserError(f"The run in {directory} is not finished; run its command again to finish it first.")
    with reopen_run(directory) as (run, _):
        answers, count = run.records(0), run.num_done
        refused = np.where(run.refused[:count], "refused", "complied").tolist()
        judged = {name: rows for name, rows in sorted(run.labels.rows.items()) if len(rows) == count}
        labels = {run.evaluator: refused} | judged
        points = tuple(run.points)
    as_texts([record[key] for point in answers for record in point for key in ("prompt", "generation")], "texts")
    return FinishedRun(directory, read_json(directory / CONFIG), landscape, points, answers, labels)
