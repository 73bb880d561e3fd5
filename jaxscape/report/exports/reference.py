"""Export of a run in the format of the paper's code."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxscape.report.run import KeptRun
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.files import to_json_lines, write_whole


def export_reference(run: KeptRun, out: Path) -> list[Path]:
    """Write a run's generations in the format that the tools of the paper's code read.

    There is one file for each direction set: `output.jsonl` if there is one set, or else `output-0.jsonl`,
    `output-1.jsonl`, … Each line is one point, `{"step": i, "output": [{"prompt", "generation"}, …]}`. Steps count the
    points from 0 in the order of their coordinates; the last axis varies fastest.

    Returns:
        The files written.

    Raises:
        UserError: the run has no answers at some points, or abandoned some.
    """
    if run.landscape.filled is not None:
        raise UserError(
            f"The adaptive scan in {run.directory} has no answers at some points: export a scan of all points."
        )
    if run.landscape.abandoned is not None:
        raise UserError(
            f"The scan in {run.directory} abandoned answers that make no sense, so their ends are missing: export a "
            f"scan without --abandon-incoherent."
        )
    by_set = itertools.groupby(zip(run.points, run.answers, strict=True), key=lambda pair: pair[0][0])
    sets = [_steps([answers for _, answers in pairs]) for _, pairs in by_set]
    names = ["output.jsonl"] if len(sets) == 1 else [f"output-{index}.jsonl" for index in range(len(sets))]
    for name, steps in zip(names, sets, strict=True):
        write_whole(out / name, to_json_lines(steps))
    return [out / name for name in names]


def _steps(points: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A record for each point of a direction set, with all its answers."""
    return [
        {"step": step, "output": [{key: record[key] for key in ("prompt", "generation")} for record in answers]}
        for step, answers in enumerate(points)
    ]
