"""Decides at points whether a rate over prompts exceeds a threshold, from as few answers as decide it; and its run.

`generations.jsonl` is the only state of a run, as that of a scan. Its lines are the answers that were generated, in the
order in which they were asked for. A point's answers come in the order of the prompts, a block at a time, and there are
no more of them than the decision needed. When a run is resumed, what was asked is known, so that the same search asks
for the rest only.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Unpack

import numpy as np

from jaxscape.directions.base import Recipe
from jaxscape.directions.kinds import (
    DirectionLike,
    Given,
    direction_counts,
    largest_rank,
    make_directions,
    prepare,
    recipe_of,
)
from jaxscape.directions.storage import Direction
from jaxscape.engine.batching import Workload
from jaxscape.engine.engine import Engine
from jaxscape.engine.options import EngineOptions
from jaxscape.engine.planner import make_plan
from jaxscape.engine.sampling import Sampling, SamplingOptions
from jaxscape.evaluate.base import Evaluator, stop_when_all
from jaxscape.evaluate.coherence import Coherence, coherence
from jaxscape.evaluate.evaluators import find_evaluators
from jaxscape.evaluate.statistics import block_size, more_than
from jaxscape.landscapes.answers import Answers, answers_at
from jaxscape.landscapes.judges import free_beside
from jaxscape.landscapes.questions import Questions
from jaxscape.landscapes.radii import CERTIFICATE_FILE, FIGURE, RADII_FILE
from jaxscape.landscapes.scan import answer_settings, with_recorded_form
from jaxscape.landscapes.score import prepare_judge
from jaxscape.landscapes.shares import in_run
from jaxscape.landscapes.store import COHERENCE_FILE, GENERATIONS, PROMPTS, records_of
from jaxscape.models.chat_defaults import template_notes
from jaxscape.models.model import Model
from jaxscape.prompts.fields import Prompts
from jaxscape.prompts.thinking import answer_of
from jaxscape.runtime import rundir
from jaxscape.runtime.errors import UserError, as_list, as_texts, reason, unknown_name
from jaxscape.runtime.files import append_json_lines, cut_after, to_json_lines, whole_lines, write_whole
from jaxscape.runtime.hardware import free_memory
from jaxscape.runtime.preemption import postponed
from jaxscape.runtime.processes import from_first

RADIUS = rundir.RunKind(
    "search for radii",
    state=GENERATIONS,
    marks=frozenset({"weights", "directions", "threshold"}),
    computed=(RADII_FILE, CERTIFICATE_FILE, FIGURE, COHERENCE_FILE),
    descriptive=frozenset({"direction_names", "direction_files"}),
)
RATES = ("asr", "complied", "incoherent")

RayPoint = tuple[int, float]
"""The index of a direction, and a coordinate along it."""


@dataclass(frozen=True)
class Question:
    """The question that is asked at each point: whether a rate exceeds a threshold.

    Attributes:
        of: which rate: `asr`, the share that is not refused, or the share of the answers that are `complied` or
            `incoherent`, by the unperturbed model; see `jaxscape.evaluate.coherence`.
        threshold: in percent. A rate that equals it does not exceed it.
        error: the probability that a point's decision differs from that of all prompts, at most; see
            `jaxscape.evaluate.statistics.more_than`.
    """

    of: str = "asr"
    threshold: float = 50.0
    error: float = 0.0

    def __post_init__(self) -> None:
        if self.of not in RATES:
            raise unknown_name("rate", self.of, RATES)
        if not 0 <= self.threshold < 100:
            raise UserError(f"The threshold must be at least 0 and below 100 %, not {self.threshold:g}.")
        if not 0 <= self.error < 1:
            raise UserError(f"The error must be at least 0 and below 1, not {self.error:g}.")

    def limit(self, num_prompts: int) -> int:
        """The largest number of answers that do not exceed the threshold."""
        return math.floor(self.threshold * num_prompts / 100 + 1e-9)  # and not by rounding alone


class Decisions:
    """What is known of points, and the engine that finds out more.

    Attributes:
        num_prompts: the number of prompts.
        summary: lines for the user: the plan of the engine, and what is asked.
        happened: for each point, whether each of its answers counts, in the order of the prompts.
        names: the name of each direction.
    """

    def __init__(
        self,
        question: Question,
        model: Model,
        engine: Engine,
        directions: Sequence[tuple[Recipe | Given, str]],
        prompts: Sequence[str],
        opening: str,
        judge: Evaluator,
        coherent: Coherence | None,
        file: BinaryIO | None,
        summary: str,
    ) -> None:
        self.num_prompts, self.summary, self.names = len(prompts), summary, [name for _, name in directions]
        self.happened: dict[RayPoint, list[bool]] = {}
        self._question, self._limit = question, question.limit(len(prompts))
        self._model, self._engine, self._prompts, self._opening = model, engine, prompts, opening
        self._recipes = [recipe for recipe, _ in directions]
        self._judge, self._coherent, self._file = judge, coherent, file
        self._made: tuple[int, list[Direction]] | None = None

    @property
    def num_answers(self) -> int:
        """How many answers are known."""
        return sum(map(len, self.happened.values()))

    @property
    def directions_at_once(self) -> int:
        """The number of directions whose points decode together."""
        return self._engine.plan.layout.num_sets

    def known_answers(self) -> list[list[Any]]:
        """What is known, for other processes: the index of a direction, a coordinate, and what happened there."""
        return [[*point, answers] for point, answers in self.happened.items()]

    def exceeds(self, points: Sequence[RayPoint]) -> list[bool]:
        """Whether the rate at each point exceeds the threshold. What is not known yet is asked, block by block."""
        while undecided := [point for point in dict.fromkeys(points) if self._decision(point) is None]:
            block = min(len(self.happened.get(point, ())) for point in undecided) // self._engine.block
            behind = [p for p in undecided if len(self.happened.get(p, ())) == block * self._engine.block]
            for batch, group in itertools.groupby(behind, key=lambda point: point[0] // self.directions_at_once):
                self._ask(batch, list(group), block)
        return [bool(self._decision(point)) for point in points]

    def _decision(self, point: RayPoint) -> bool | None:
        answers = self.happened.get(point, [])
        return more_than(self._limit, sum(answers), len(answers), self.num_prompts, self._question.error)

    def _ask(self, batch: int, points: Sequence[RayPoint], block: int) -> None:
        """Generate and judge the answers to a block of prompts at points along directions that decode together. SIGTERM
        ends this after a point.

        Arguments:
            batch: the number of these `directions_at_once` directions.
        """
        first = batch * self.directions_at_once
        if self._made is None or self._made[0] != batch:
            self._made = None  # frees the previous directions before the next ones are made
            recipes, made = self._recipes[first : first + self.directions_at_once], []
            plan = self._engine.plan
            for recipe in recipes:
                made += make_directions([recipe], self._model, plan.storage, plan.form.keeps_weights_on_host)
            self._made = batch, made
        start, directions = block * self._engine.block, self._made[1]
        prompts = self._prompts[start : start + self._engine.block]
        coords = [
            tuple(coord if other == index - first else 0.0 for other in range(len(directions)))
            for index, coord in points
        ]
        given = answers_at(coords, self._engine, directions, [self._judge], prompts, self._opening, block)
        with postponed() as stop_if_asked:
            for point, answers in zip(points, given, strict=True):
                self._add(point, prompts, answers)
                stop_if_asked()

    def _add(self, point: RayPoint, prompts: Sequence[str], answers: Answers) -> None:
        """Take the answers to a block of prompts at a point, and write them to disk."""
        index, coord = point
        records = records_of((index, (coord,)), prompts, answers.completions, answers.refused, answers.unanswered)
        if self._coherent is not None:
            texts = [answer_of(self._opening + completion.text) for completion in answers.completions]
            labels = self._coherent.label(prompts, texts, answers.refused)
            records = [record | {"label": label} for record, label in zip(records, labels, strict=True)]
        if self._file is not None:
            append_json_lines(self._file, records)
        self._take(records)

    def _take(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Count the answers of these records, after those that are known."""
        for record in records:
            point = (record["direction"], *record["coords"])
            counts = not record["refused"] if self._question.of == "asr" else record["label"] == self._question.of
            self.happened.setdefault(point, []).append(counts)

    def restore(self, path: Path) -> None:
        """Take over the whole blocks of the state file, and cut off what follows them.

        Raises:
            UserError: the file, which messages call `path`, is damaged.
        """
        assert self._file is not None
        lines, size, start = whole_lines(self._file), self._engine.block, 0
        try:
            while start < len(lines):
                first = json.loads(lines[start])
                (coord,) = map(float, first["coords"])
                point = int(first["direction"]), coord
                known = len(self.happened.get(point, ()))
                prompts = self._prompts[known : known + size]
                records = [json.loads(line) for line in lines[start : start + len(prompts)]]
                for record, prompt in zip(records, prompts, strict=False):
                    if (record["direction"], record["coords"], record["prompt"]) != (point[0], [point[1]], prompt):
                        raise ValueError(f"a line that should be for {prompt!r:.40} is for {record['prompt']!r:.40}")
                if not prompts or not 0 <= point[0] < len(self.names):
                    raise ValueError(f"there are more answers at {coord} than prompts, or there is no such point")
                if len(records) < len(prompts):
                    break
                self._take(records)
                start += len(records)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({reason(error)}): start over with --overwrite.") from error
        cut_after(self._file, lines[:start])


@contextmanager
def open_decisions(
    question: Question,
    model: Model,
    directions: Sequence[DirectionLike],
    search: Mapping[str, Any],
    *,
    prompts: Sequence[str],
    system_prompt: str,
    thinking: str,
    evaluator: str | Evaluator | Sequence[str | Evaluator],
    options: EngineOptions | None,
    out: Path | None,
    overwrite: bool,
    describe: Mapping[str, Any] | None,
    points: int,
    **sampling: Unpack[SamplingOptions],
) -> Iterator[Decisions]:
    """Start a run that decides at points along directions, or resume the one that is there.

    Arguments:
        search: what `config.json` records of the search beside what is asked.
        points: the number of points along a direction that are asked together.

    The other arguments are those of `jaxscape.radius`.

    Raises:
        UserError: an argument cannot be used, or `out` holds a run of another configuration. Nothing is written then.
    """
    settings, options = Sampling(**sampling), options or EngineOptions()
    judge = _only_one(find_evaluators(evaluator))
    texts = as_texts(prompts, "prompts")
    ordered = in_random_order(texts, settings.seed)
    questions = Questions.of(model, ordered, system_prompt, thinking, settings.max_new_tokens)
    made_before = None if overwrite else from_first(partial(rundir.recorded_value, out, "directions"))
    named = _single_directions(directions, model, made_before)
    if not overwrite:
        options = with_recorded_form(options, out)
    recorded = None if overwrite else from_first(partial(rundir.recorded_value, out, "block"))
    block = recorded if isinstance(recorded, int) else 0
    recipes = [recipe for recipe, _, _ in named]
    workload = search_workload(question, model, recipes, questions.tokens, settings, points, block)
    plan = make_plan(model, workload, options)
    prepare_judge(judge, ordered, free_beside(from_first(free_memory), model, plan))
    judges = [judge] if question.of == "asr" else [judge, replace(coherence(), refusals=judge)]
    engine = Engine(model, workload, plan, None if options.full_text else stop_when_all(judges, questions.opening))
    config = {
        **model.described(),
        "directions": [identity for _, _, identity in named],
        "direction_names": [name for _, name, _ in named],
        **asdict(question),
        **search,
        "block": engine.block,
        **answer_settings(model, ordered, questions.tokens, system_prompt, thinking, settings, plan, options, [judge]),
        **(describe or {}),
    }
    with rundir.open_run_directory(out, config, RADIUS, overwrite) as file:
        bind = partial(
            in_run,
            run=None,
            directory=out,
            sent=questions.sent_for,
            load=lambda: model,
            weights=config["weights"],
            decides=judge,
        )
        coherent = None if question.of == "asr" else bind(coherence())
        judge = bind(judge) if isinstance(judge, Coherence) else judge
        asked = [(recipe, name) for recipe, name, _ in named]
        source = prompts if isinstance(prompts, Prompts) else Prompts(texts)
        summary = "\n".join([str(plan), source.summary(), *template_notes(model.tokenizer)])
        opening = questions.opening
        decisions = Decisions(question, model, engine, asked, ordered, opening, judge, coherent, file, summary)
        if out is not None and file is not None:
            pairs = ({"prompt": prompt, "sent": text} for prompt, text in zip(ordered, questions.sent, strict=True))
            write_whole(out / PROMPTS, to_json_lines(pairs))
            decisions.restore(out / GENERATIONS)
        decisions.happened = {(index, coord): answers for index, coord, answers in from_first(decisions.known_answers)}
        yield decisions


def in_random_order(prompts: Sequence[str], seed: int) -> list[str]:
    """The prompts in the order in which they are asked. It must be random, and not that of a file, for the probability
    of a wrong decision to be what it says."""
    return [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))]


def search_workload(
    question: Question,
    model: Model,
    recipes: Sequence[Recipe],
    prompt_tokens: Sequence[Sequence[int]],
    sampling: Sampling,
    points: int,
    block: int = 0,
) -> Workload:
    """The workload of a run that decides at points along single directions.

    Arguments:
        points: the number of points along a direction that are asked together.
        block: the number of prompts that are asked at a time; 0 for the one that asks the fewest.
    """
    count = len(prompt_tokens)
    return Workload(
        prompt_tokens,
        sampling,
        num_points=points,
        points_per_line=points,
        ndim=1,
        **{name: min(1, most) for name, most in direction_counts([recipes]).items()},  # the directions take turns
        num_sets=sum(recipe.count for recipe in recipes),
        rank=largest_rank(recipes, model),
        block=block or block_size(question.limit(count), count, question.error),
    )


def _only_one(judges: Sequence[Evaluator]) -> Evaluator:
    """The evaluator, if there is one; else a `UserError`."""
    if len(judges) != 1:
        names = ", ".join(judge.name for judge in judges)
        raise UserError(
            f"One evaluator decides whether a point exceeds the threshold, not several ({names}): give one."
        )
    return judges[0]


def _single_directions(
    directions: Sequence[DirectionLike], model: Model, recorded: Any
) -> list[tuple[Recipe | Given, str, int | str]]:
    """For each direction by itself: its recipe, a name of its own, and what identifies it in `config.json`.

    Arguments:
        recorded: what identifies the directions of the run that is there; None if there is none.

    Raises:
        UserError: there are none, one of them cannot be made, or two are the same.
    """
    named: list[tuple[Recipe | Given, str, int | str]] = []
    recipes = [[recipe_of(direction)] for direction in as_list(directions, "directions")]
    for (prepared,) in prepare(recipes, model):
        recipe, ids = prepared.recipe, prepared.ids_as_in(recorded)
        if isinstance(recipe, Given) and recipe.count > 1:
            parts = zip(recipe.directions, ids, strict=True)
            named += [(Given((direction,), recipe.name), recipe.name, identity) for direction, identity in parts]
        else:
            named.append((recipe, str(recipe), ids[0]))
    if not named:
        raise UserError("There are no directions: give at least one.")
    seen: set[int | str] = set()
    for _, name, identity in named:
        if identity in seen:
            raise UserError(f"The direction {name} is given twice: leave one of them out.")
        seen.add(identity)
    names = [name for _, name, _ in named]
    unique = [name if names.count(name) == 1 else f"{name} {names[:i].count(name)}" for i, name in enumerate(names)]
    return [(recipe, name, identity) for (recipe, _, identity), name in zip(named, unique, strict=True)]
