"""Scoring: evaluators judge the answers of a run that is there, and nothing is generated again."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxscape.evaluate.base import LABELS, Evaluator, Label, labels_of_points, stop_when, uses_model
from jaxscape.evaluate.coherence import Coherence
from jaxscape.evaluate.evaluators import EVALUATORS, find_evaluators
from jaxscape.landscapes.axes import point_text
from jaxscape.landscapes.labels import UNJUDGED
from jaxscape.landscapes.landscape import Landscape
from jaxscape.landscapes.shares import in_run, load_checked
from jaxscape.landscapes.store import Run, reopen_run
from jaxscape.models.model import Model, load_model
from jaxscape.prompts.thinking import answer_of, opening_after
from jaxscape.runtime import rundir
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.hardware import free_memory, skip_absent_tpu
from jaxscape.runtime.preemption import postponed
from jaxscape.runtime.processes import from_first
from jaxscape.runtime.progress import progress_display
from jaxscape.runtime.remote import run_directory


def score(
    directory: str | Path, evaluator: str | Evaluator | Sequence[str | Evaluator], *, progress: bool = True
) -> Landscape:
    """Judge the answers of a finished scan with further evaluators.

    What they say is kept in the run's directory, so answers that an evaluator has judged are not judged again. The ASR
    stays that of the scan's own evaluator.

    Arguments:
        directory: the run's directory.
        evaluator: see `jaxscape.scan`.
        progress: whether to report each point that an evaluator with a model has judged, on the standard error stream.

    Returns:
        The landscape, with what each evaluator says in `measures`.

    Raises:
        UserError: the directory holds no finished scan, an evaluator cannot be used, or its answers were cut before an
            evaluator can judge them.
    """
    skip_absent_tpu()
    judges, directory = find_evaluators(evaluator), run_directory(directory)
    with reopen_run(directory) as (run, sent):
        openings = [opening_after(prompt, text) for prompt, text in zip(run.prompts, sent, strict=True)]
        bind = partial(
            in_run,
            run=run,
            directory=directory,
            sent=dict(zip(run.prompts, sent, strict=True)),
            load=partial(_load_model, directory),
            weights=rundir.recorded_value(directory, "weights"),
            decides=EVALUATORS.get(run.evaluator),
        )
        judges = [bind(judge) if isinstance(judge, Coherence) else judge for judge in judges]
        label_rest(run, judges, openings, free_memory(), progress)
        run.labels.keep_earlier(run.num_done)
        return run.landscape()


def _load_model(directory: Path) -> Model:
    """The model that the scan in a directory measured.

    Raises:
        UserError: it cannot be loaded any more, or has other weights now.
    """
    name, dtype, base, weights = (
        rundir.recorded_value(directory, key) for key in ("model", "dtype", "base", "weights")
    )
    return load_checked(partial(load_model, name, dtype, base=base), weights)


def prepare_judge(judge: Evaluator, prompts: Sequence[str], free_bytes: int | None) -> None:
    """Let an evaluator check that it can be used, if it knows how; see `jaxscape.evaluate.base.Evaluator`."""
    if (check := getattr(judge, "prepare", None)) is not None:
        check(prompts, free_bytes)


def label_rest(
    run: Run,
    judges: Sequence[Evaluator],
    openings: Sequence[str],
    free_bytes: int | None = None,
    progress: bool = False,
) -> None:
    """Judge those answers of a run's evaluated points that the evaluators have not judged yet, and save the landscape.

    Arguments:
        openings: for each prompt, the marker with which it opens a block of thinking, or an empty text.
        free_bytes: bytes that an evaluator with a model may use on each device; None if that is not known.
        progress: whether to report each point that an evaluator with a model has judged.

    Raises:
        UserError: an answer was cut before an evaluator can judge it, or an evaluator cannot be used. Nothing is
            written then.
    """
    rest = [from_first(partial(_unjudged, run, judge)) for judge in judges]
    for judge, points in zip(judges, rest, strict=True):
        _check_whole(run, judge, points, openings)
        if points:
            prepare_judge(judge, run.prompts, free_bytes)
    for judge, points in zip(judges, rest, strict=True):
        if points:
            _label(run, judge, points, openings, progress and uses_model(judge))
    run.save()


def _label(
    run: Run, judge: Evaluator, points: Sequence[Sequence[Mapping[str, Any]]], openings: Sequence[str], progress: bool
) -> None:
    """Judge the answers at points, the first ones that the evaluator has not judged yet. SIGTERM ends this after a
    point."""
    answers = [
        [answer_of(opening + record["generation"]) for opening, record in zip(openings, records, strict=True)]
        for records in points
    ]
    done, total = run.num_done - len(points), run.num_done
    given = _labels_of_missing(run, judge, dict(enumerate(answers, done)))
    with progress_display(progress) as bar, postponed() as stop_if_asked:
        task = bar.add_task(judge.name, total=total, completed=done)
        for number in range(done, total):
            known = run.labels.known(judge, number)
            labels = known if len(known) == len(run.prompts) else [*known, *next(given)]
            run.labels.append(judge, labels)
            index, coords = run.points[number]
            position = point_text(run.axes, coords)
            counts = Counter(label or UNJUDGED for label in labels)
            said = ", ".join(f"{label} {counts[label]}" for label in (*LABELS, UNJUDGED) if counts[label])
            place = f"{number + 1:>{len(str(total))}}/{total}"
            bar.update(task, completed=number + 1)
            bar.print(f"{place}  {judge.name}: direction {index}  {position}  {said}")
            stop_if_asked()
    if (release := getattr(judge, "release", None)) is not None:
        release()


def _labels_of_missing(
    run: Run, judge: Evaluator, answers: Mapping[int, Sequence[str]]
) -> Iterator[list[Label | None]]:
    """The labels that are not known yet, for each point at which there are any.

    Arguments:
        answers: the answers at points, by the points' numbers.
    """

    def num_known(number: int) -> int:
        return len(run.labels.known(judge, number))

    for start, numbers in itertools.groupby(run.labels.missing(judge, run.num_done), key=num_known):
        yield from labels_of_points(judge, run.prompts[start:], [answers[number][start:] for number in numbers])


def _unjudged(run: Run, judge: Evaluator) -> list[list[dict[str, Any]]]:
    """The answers at the points that the evaluator has not judged yet, point by point."""
    return run.records(run.labels.count(judge))


def _check_whole(
    run: Run, judge: Evaluator, points: Sequence[Sequence[Mapping[str, Any]]], openings: Sequence[str]
) -> None:
    """Raise a `UserError` if an answer was cut before the evaluator's outcome is decided. What was abandoned is judged
    as it is: that is the choice of whoever asked for it."""
    decide = {opening: stop_when(judge, opening) for opening in set(openings)}
    # Coherence takes the refusals of the evaluator that decides the ASR.
    takes_refusals = isinstance(judge, Coherence) and judge.name != run.evaluator
    short = 0
    for records in points:
        for opening, record in zip(openings, records, strict=True):
            decides = decide[opening]
            is_decided = decides is not None and decides(record["generation"])
            if record.get("cut") and not record.get("abandoned"):
                short += not (record["refused"] if takes_refusals else is_decided)
    if short:
        raise UserError(
            f"{judge.name!r} cannot judge {short} of the run's {sum(map(len, points))} answers, because they were cut "
            f"where the scan's own evaluator had decided: scan again with --full-text."
        )
