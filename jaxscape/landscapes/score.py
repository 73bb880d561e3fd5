"""Scoring: evaluators judge the answers of a run that is there, and nothing is generated again."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxscape.evaluate.base import Evaluator, labels_of, stop_when
from jaxscape.evaluate.evaluators import find_evaluators
from jaxscape.landscapes.landscape import Landscape
from jaxscape.landscapes.store import Run, reopen_run
from jaxscape.prompts.thinking import answer_of, opening_of
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.processes import from_first


def score(directory: str | Path, evaluator: str | Evaluator | Sequence[str | Evaluator]) -> Landscape:
    """Judge the answers of a finished scan with further evaluators.

    What they say is kept in the run's directory, so answers that an evaluator has judged are not judged again. The ASR
    stays that of the scan's own evaluator.

    Arguments:
        directory: the run's directory.
        evaluator: see `jaxscape.scan`.

    Returns:
        The landscape, with what each evaluator says in `measures`.

    Raises:
        UserError: the directory holds no finished scan, an evaluator cannot be used, or its answers were cut before an
            evaluator can judge them.
    """
    judges = find_evaluators(evaluator)
    with reopen_run(Path(directory)) as (run, sent):
        # What a chat template opens stands behind the prompt.
        openings = [
            opening_of(text.rpartition(prompt.strip())[2]) for prompt, text in zip(run.prompts, sent, strict=True)
        ]
        label_rest(run, judges, openings)
        return run.landscape()


def label_rest(run: Run, judges: Sequence[Evaluator], openings: Sequence[str]) -> None:
    """Judge those answers of a run's evaluated points that the evaluators have not judged yet, and save the landscape.

    Arguments:
        openings: for each prompt, the marker with which it opens a block of thinking, or an empty text.

    Raises:
        UserError: an answer was cut before an evaluator can judge it. Nothing is written then.
    """
    rest = [from_first(partial(_unjudged, run, judge)) for judge in judges]
    for judge, points in zip(judges, rest, strict=True):
        _check_whole(judge, points, openings)
    for judge, points in zip(judges, rest, strict=True):
        for records in points:
            texts = [opening + record["generation"] for opening, record in zip(openings, records, strict=True)]
            run.labels.append(judge, labels_of(judge, run.prompts, list(map(answer_of, texts))))
    run.save()


def _unjudged(run: Run, judge: Evaluator) -> list[list[dict[str, Any]]]:
    """The answers that the evaluator has not judged yet, point by point."""
    return run.records(run.labels.count(judge))


def _check_whole(judge: Evaluator, points: Sequence[Sequence[Mapping[str, Any]]], openings: Sequence[str]) -> None:
    """Raise a `UserError` if an answer was cut before the evaluator's outcome is decided."""
    decide = {opening: stop_when(judge, opening) for opening in set(openings)}
    short = 0
    for records in points:
        for opening, record in zip(openings, records, strict=True):
            decides = decide[opening]
            short += bool(record.get("cut")) and not (decides is not None and decides(record["generation"]))
    if short:
        raise UserError(
            f"{judge.name!r} cannot judge {short} of the run's {sum(map(len, points))} answers, because they were cut "
            f"where the scan's own evaluator had decided: scan again with --full-text."
        )
