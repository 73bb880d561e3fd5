"""Export of a run in the format of the paper's code."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxscape.prompts.refusal import is_refusal
from jaxscape.prompts.thinking import answer_of
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
        UserError: the run has no answers at some points, or the ends of some answers are missing.
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
    # A refusal by the paper's keywords is one however it would have gone on.
    cut = [record for answers in run.answers for record in answers if record.get("cut")]
    if short := sum(not is_refusal(answer_of(record["generation"])) for record in cut):
        raise UserError(
            f"The scan in {run.directory} ended {short} answers where its own evaluator had decided, and the paper's "
            f"keywords need the rest: scan again with --full-text."
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
