"""The points of a run that are left, decoded and judged one after the other."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from jaxscape.directions.base import Recipe
from jaxscape.directions.kinds import make_directions
from jaxscape.directions.storage import Direction
from jaxscape.engine.batching import Workload
from jaxscape.engine.engine import Engine
from jaxscape.engine.options import EngineOptions
from jaxscape.engine.planner import Plan, make_plan
from jaxscape.engine.scheduler import Abandon, Coords, StopWhen
from jaxscape.evaluate.base import Evaluator, Label, labels_of
from jaxscape.landscapes.answers import Answers, answers_at
from jaxscape.landscapes.labels import Point
from jaxscape.landscapes.progress import ScanProgress
from jaxscape.landscapes.store import Record, Run, records_of
from jaxscape.models.model import Model
from jaxscape.prompts.thinking import answer_of
from jaxscape.runtime.preemption import postponed


@dataclass(frozen=True)
class Decoding:
    """How the answers at a point come about.

    Attributes:
        plan: the plan for all prompts of the workload.
        sets: the directions of each set.
        stop_when: see `Engine`.
        abandon: the same, for all prompts of the workload.
        judges: the evaluators that judge each point at once; the first one decides the ASR.
        opening: see `answers_at`.
        keep_labels: whether the run keeps what they say.
    """

    model: Model
    workload: Workload
    plan: Plan
    options: EngineOptions
    sets: Sequence[Sequence[Recipe]]
    stop_when: StopWhen | None
    abandon: Abandon | None
    judges: Sequence[Evaluator]
    opening: str
    keep_labels: bool

    def engine(self, start: int, on_finished: Callable[[int], None]) -> Engine:
        """The engine that answers the prompts from the number `start` on."""
        workload, plan, abandon = self.workload, self.plan, self.abandon
        if start:
            workload = workload.after(start)
            plan = make_plan(self.model, workload, self.options)  # they name the form of the run that is extended
            abandon = abandon and abandon.renumbered(lambda number: start + number)
        return Engine(self.model, workload, plan, self.stop_when, abandon, on_finished)


def decode_rest(run: Run, decoding: Decoding, reports: ScanProgress) -> None:
    """Decode and judge the points of a run that are left. Answers that are known already are taken over. SIGTERM ends
    this after a point."""
    left, num_prompts = run.points[run.num_done :], len(run.prompts)
    # Points whose answers are all known may lie between points that are decoded in one batch.
    generated = _generated([p for p in left if len(run.known(p)) < num_prompts], run, decoding, reports)
    with postponed() as stop_if_asked:
        for point in left:
            is_known = len(run.known(point)) == num_prompts
            _append(run, Answers([], [], [[] for _ in decoding.judges]) if is_known else next(generated), decoding)
            reports.point()
            stop_if_asked()


def _generated(points: Sequence[Point], run: Run, decoding: Decoding, reports: ScanProgress) -> Iterator[Answers]:
    """The answers at each point to the prompts whose answers are not known there."""
    engine = None
    for start, group in itertools.groupby(points, key=lambda point: len(run.known(point))):
        engine = None  # frees its caches before the next engine is planned
        engine = decoding.engine(start, reports.answers)
        yield from _answers(list(group), run.prompts[start:], engine, decoding)


def _answers(points: Sequence[Point], prompts: Sequence[str], engine: Engine, decoding: Decoding) -> Iterator[Answers]:
    """The answers of an engine to its prompts at each point, direction set by direction set."""
    together = engine.plan.layout.num_sets
    for _, group in itertools.groupby(points, key=lambda point: point[0] // together):
        batch = list(group)
        # Those of all sets of the batch, also where no point is left along the first ones: then the programs are those
        # of an unbroken scan.
        first = batch[0][0] // together * together
        directions: list[Direction] = []  # frees the previous sets' directions before the next ones are made
        for item in decoding.sets[first : first + together]:
            directions += make_directions(
                item, engine.model, engine.plan.storage, engine.plan.form.keeps_weights_on_host
            )
        coords = [_along_all(coords, index - first, len(directions)) for index, coords in batch]
        yield from answers_at(coords, engine, directions, decoding.judges, prompts, decoding.opening)


def _along_all(coords: Coords, index: int, count: int) -> Coords:
    """The coordinates along the `count` directions of several sets of a point that lies along those of one of them."""
    before = len(coords) * index
    return (*(0.0,) * before, *coords, *(0.0,) * (count - before - len(coords)))


def _append(run: Run, answers: Answers, decoding: Decoding) -> None:
    """Add the next point to a run: the answers that are known, and behind them those that were generated."""
    point = run.points[run.num_done]
    known = run.known(point)
    prompts = run.prompts[len(known) :]
    records = [*known, *records_of(point, prompts, answers.completions, answers.refused, answers.unanswered)]
    judged = zip(decoding.judges, answers.labels, strict=True) if decoding.keep_labels else ()
    labels = [(judge, [*_labels_of_known(run, judge, known, decoding.opening), *given]) for judge, given in judged]
    run.append(records, labels)


def _labels_of_known(run: Run, judge: Evaluator, known: Sequence[Record], opening: str) -> list[Label | None]:
    """The labels of the known answers at the next point: what the evaluator has said of them, or else says now."""
    labels = run.labels.known(judge, run.num_done)
    if len(labels) == len(known):
        return labels
    texts = [answer_of(opening + record["generation"]) for record in known]
    return labels_of(judge, run.prompts[: len(known)], texts)
