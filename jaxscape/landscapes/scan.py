"""The scan: evaluate a model at every point of a landscape."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import jax

from jaxscape.directions.base import Recipe
from jaxscape.directions.kinds import DirectionLike, Prepared, direction_counts, largest_rank, prepare
from jaxscape.engine.batching import Workload
from jaxscape.engine.continuations import cache_bytes
from jaxscape.engine.forms import Form
from jaxscape.engine.options import EngineOptions
from jaxscape.engine.planner import Plan, bytes_of_weights, make_plan
from jaxscape.engine.sampling import Sampling, SamplingOptions
from jaxscape.evaluate.base import Evaluator, checksum_of
from jaxscape.evaluate.coherence import BEGINNING, COHERENCE
from jaxscape.evaluate.evaluators import DEFAULT_EVALUATOR
from jaxscape.landscapes.adaptive import check_ascending, first_round
from jaxscape.landscapes.axes import Axis
from jaxscape.landscapes.choice import choose_grid, choose_sets, count_directions
from jaxscape.landscapes.decoding import Decoding, decode_rest
from jaxscape.landscapes.extension import open_scan
from jaxscape.landscapes.judges import Judges, free_beside
from jaxscape.landscapes.landscape import Landscape
from jaxscape.landscapes.points import as_points, check_coordinates
from jaxscape.landscapes.progress import ScanProgress, scan_progress
from jaxscape.landscapes.questions import Questions
from jaxscape.landscapes.score import label_rest
from jaxscape.landscapes.shards import Shard, parse
from jaxscape.landscapes.shares import abandon_noise, thresholds_of_model
from jaxscape.landscapes.store import Adaptive, Run, open_run
from jaxscape.models.chat_defaults import template_notes
from jaxscape.models.model import Model
from jaxscape.runtime import rundir
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.files import checksum
from jaxscape.runtime.hardware import free_memory, return_free_memory
from jaxscape.runtime.processes import from_first
from jaxscape.runtime.remote import run_directory
from jaxscape.runtime.reporting import check_target, open_reporter

LARGEST_PROMPT_CACHE = 2**30  # bytes on each device, beside what the plan needs


def scan(
    model: Model,
    directions: Sequence[DirectionLike | Sequence[DirectionLike]],
    *,
    prompts: Sequence[str],
    steps: int = 20,
    radius: float | None = None,
    axes: Sequence[Axis] | None = None,
    control: bool = True,
    points: Any = None,
    adaptive: bool = False,
    system_prompt: str = "default",
    thinking: str = "default",
    evaluator: str | Evaluator | Sequence[str | Evaluator] = DEFAULT_EVALUATOR,
    options: EngineOptions | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    extend: bool = False,
    shard: str | None = None,
    describe: Mapping[str, Any] | None = None,
    progress: bool = True,
    free_model: bool = False,
    shares: bool = True,
    abandon_incoherent: bool = False,
    report_to: str = "none",
    **sampling: Unpack[SamplingOptions],
) -> Landscape:
    """Measure a safety landscape: the attack success rate of a model at each point of a grid, or at given points, in
    weight space.

    Arguments:
        directions: the direction sets. `[d, e]` gives two 1D landscapes, `[(d, e)]` one 2D landscape. A direction is a
            tree like `model.params`, the seed of a random direction, or a name such as `random:0`,
            `file:direction.safetensors` or `to:MODEL`. In a pair, a random second direction is made orthogonal to the
            first.
        steps: intervals along each axis. An axis to another model (`to:MODEL`) runs from 0 to 1. Any other runs from
            −radius to radius, and its `steps` are even, so that the model itself is a point.
        radius: None for the default of each kind of directions, which is 0.5 for most.
        axes: one for each direction of a set, instead of those that steps and radius describe.
        control: whether a random direction of the same norm and rank is scanned beside each special one that is given
            by name, see `jaxscape.directions.control.Control`. It is one more direction set.
        points: coordinates of points, [points, directions of a set], instead of a grid: an array or a list of lists. A
            set may have any number of directions then. The landscape has no VISAGE, volume or radius.
        adaptive: evaluate points of the grid only where the landscape changes, and fill the others by interpolation;
            see `jaxscape.landscapes.adaptive` and `Landscape.filled`.
        system_prompt: `default`, `none`, a name, a text or a file, see `jaxscape.prompts.chat_format.chat_text`.
        thinking: `on` or `off` switches thinking in the model's chat template, see
            `jaxscape.prompts.chat_format.render`. What a model thinks before its answer is kept and not judged.
        evaluator: what judges the answers: a name, see `jaxscape.evaluator`, an `Evaluator` of your own, or a list of
            several. The first one decides the ASR; what each one says is in `Landscape.measures`. Unless `options` ask
            for full texts, an answer ends where the `stop_when` of all of them say that its outcome is decided. Those
            that hold a model judge when all points are decoded; only the first one judges each point at once.
        options: options of the engine, see `jaxscape.engine.options.EngineOptions`.
        out: a directory to keep the run in. An unfinished run there is resumed.
        overwrite: start over in a directory that holds a run.
        extend: if the directory holds a run with fewer prompts, points or directions, go on with it: only what is
            missing is generated. The larger run takes its place when it is finished.
        shard: `I/N`, such as `2/4`: evaluate the part number I of N parts of the points, which have about the same
            expected cost, see `jaxscape.landscapes.shards`. `jaxscape.merge` makes the whole scan of all N parts.
        describe: further entries of the run's `config.json`: anything that JSON can hold.
        progress: whether to report each point on the standard error stream.
        free_model: delete the model's arrays when all points are decoded, before evaluators load models of their own.
            The model cannot be used any more then.
        shares: whether the unperturbed model judges, after all points are decoded, which answers make no sense; see
            `Landscape.shares`.
        abandon_incoherent: end each answer whose beginning makes no sense to the unperturbed model. It counts as
            incoherent, and every other evaluator judges the text as it is: the ASR and VISAGE are those of cut texts
            then. See `Landscape.abandoned`.
        report_to: the program to which the numbers of each point are reported, `wandb` or `tensorboard`, see
            `jaxscape.runtime.reporting`; it needs `out`.
        sampling: `max_new_tokens`, `temperature`, `top_k`, `top_p` and `seed`, see
            `jaxscape.engine.sampling.Sampling`.

    Returns:
        The complete landscape; of a shard, its part, with NaN at all other points. If `out` holds it already, no answer
        is generated again.

    Raises:
        UserError: an argument cannot be used, or `out` holds a run of another configuration. Nothing is written then.
    """
    check_target(report_to, None if out is None else Path(out))
    check_shard(shard, adaptive, extend)
    places = _places(directions, axes, steps, radius, control, points, adaptive)
    settings, judges = Sampling(**sampling), Judges.chosen(evaluator, shares)
    questions = Questions.of(model, prompts, system_prompt, thinking, settings.max_new_tokens)
    prepared = prepare(places.recipes, model)
    directory, options = None if out is None else run_directory(out), options or EngineOptions()
    if not overwrite:
        options = with_recorded_form(options, directory)
    decoding = _planned(model, places, prepared, questions, settings, judges, options)
    if abandon_incoherent:
        _check_abandoning(judges, decoding)
    later_free = _check_judges(judges, decoding, questions, free_model)
    recorded = None if overwrite else from_first(lambda: rundir.recorded_value(directory, "directions"))
    decides: Adaptive | None = ("shares" if shares else "asr") if adaptive else None
    config = {
        **model.described(),
        **places.described(prepared, recorded, decides),
        **answer_settings(
            *(model, questions.prompts, questions.tokens, system_prompt, thinking, settings),
            *(decoding.plan, options, judges.all),
        ),
        **({"abandon_incoherent": True} if abandon_incoherent else {}),
        **(describe or {}),
    }
    summary = [str(decoding.plan), questions.prompts.summary(), *template_notes(model.tokenizer)]
    if shard is not None:
        part = Shard.of(shard, places.grid, len(places.recipes), settings.max_new_tokens, judges.kept)
        config["shard"] = part.described()
        summary.append(part.summary(len(places.recipes) * len(places.grid)))
    with (
        _opened(directory, config, places, questions, decides, overwrite, extend) as run,
        open_reporter(report_to, directory, config) as reporter,
        scan_progress(run, summary, model.dtype, reporter, progress) as reports,
    ):
        bound = partial(
            judges.bound,
            run=run,
            model=model,
            questions=questions,
            weights=config["weights"],
            beginnings=abandon_incoherent,
        )
        decoding = replace(decoding, judges=bound(judges.at_once))
        coherences = cache(partial(bound, judges.coherences))
        if abandon_incoherent:
            thresholds = thresholds_of_model([*decoding.judges, *coherences()])
            refuses, limit = judges.refuses(questions.opening), settings.max_new_tokens
            decoding = replace(decoding, abandon=abandon_noise(model, thresholds, questions, refuses, limit))
        _evaluate(run, decoding, coherences, questions.openings, reports, progress)
        if judges.others:
            if free_model:
                _delete_arrays(model)
            label_rest(run, judges.others, questions.openings, later_free, progress)
        return run.landscape()


class _Places(NamedTuple):
    """The points at which a model is evaluated.

    Attributes:
        recipes: the directions of each set.
        axes: the axes of the grid; none if the points are a list.
        coords: the points, if they are a list; empty for a grid.
        planned: the axes of the points that are evaluated together: those of the first round of an adaptive scan.
    """

    recipes: Sequence[Sequence[Recipe]]
    axes: tuple[Axis, ...]
    coords: tuple[tuple[float, ...], ...]
    planned: tuple[Axis, ...]

    @property
    def grid(self) -> Sequence[tuple[float, ...]]:
        """The coordinates of the points of each direction set, in their order."""
        return self.coords or list(itertools.product(*(axis.values for axis in self.axes)))

    def described(
        self, prepared: Sequence[Sequence[Prepared]], recorded: Any, decides: Adaptive | None
    ) -> dict[str, Any]:
        """What `config.json` says of the points.

        Arguments:
            prepared: the directions of each set.
            recorded: what identifies the directions of the run that is there; None if there is none.
            decides: what decides which points of the grid are evaluated; None if all are.
        """
        return {
            "directions": [[one for direction in item for one in direction.ids_as_in(recorded)] for item in prepared],
            "direction_names": [[str(direction.recipe) for direction in item] for item in prepared],
            "axes": [axis.described() for axis in self.axes],
            **({"points": [list(point) for point in self.coords]} if self.coords else {}),
            **({} if decides is None else {"adaptive": decides}),
        }


def _places(
    directions: Sequence[DirectionLike | Sequence[DirectionLike]],
    axes: Sequence[Axis] | None,
    steps: int,
    radius: float | None,
    control: bool,
    points: Any,
    adaptive: bool,
) -> _Places:
    """The points that the arguments of `scan` describe."""
    if points is None:
        recipes, axes = choose_grid(directions, axes, steps, radius, control)
        if adaptive:
            check_ascending(axes)
        return _Places(recipes, axes, (), first_round(axes) if adaptive else axes)
    coords = as_points(points)
    if axes is not None or adaptive:
        raise UserError("Points are no grid: leave out the axes and adaptive.")
    recipes = choose_sets(directions, control)
    check_coordinates(coords, count_directions(recipes))
    return _Places(recipes, (), coords, ())


def check_shard(shard: str | None, adaptive: bool, extend: bool = False) -> None:
    """Raise a `UserError` if a scan cannot be split into shards, or the text names none."""
    if shard is None:
        return
    parse(shard)
    if adaptive:
        raise UserError(
            "An adaptive scan chooses points by the answers at all others, so it cannot be split into shards: leave "
            "out adaptive or shard."
        )
    if extend:
        raise UserError("A shard cannot extend a run: merge the shards first, and extend the merged run.")


def _planned(
    model: Model,
    places: _Places,
    prepared: Sequence[Sequence[Prepared]],
    questions: Questions,
    sampling: Sampling,
    judges: Judges,
    options: EngineOptions,
) -> Decoding:
    """How the answers of a scan are decoded, by evaluators that belong to no run yet."""
    sets = [[direction.recipe for direction in item] for item in prepared]
    workload = workload_of(questions.tokens, sampling, places.planned, sets, places.coords)
    return Decoding(
        model=model,
        workload=workload,
        plan=make_plan(model, workload, options),
        options=options,
        sets=sets,
        stop_when=None if options.full_text else judges.stop_when(questions.opening),
        abandon=None,
        judges=judges.at_once,
        opening=questions.opening,
        keep_labels=judges.keep_labels,
    )


def _check_abandoning(judges: Judges, decoding: Decoding) -> None:
    """Raise a `UserError` if answers cannot be abandoned by what the unperturbed model says of them."""
    workload, model = decoding.workload, decoding.model
    if decoding.options.full_text:
        raise UserError("full_text generates every answer to its end, and abandon_incoherent does not: leave one out.")
    if COHERENCE not in [judge.name for judge in (*judges.all, *judges.coherences)]:
        raise UserError(
            "abandon_incoherent needs the model's judgement of what makes sense: do not leave out the shares."
        )
    if decoding.plan.form.keeps_weights_on_host:
        raise UserError(
            f"abandon_incoherent needs the weights on the device, and the form {decoding.plan.form} keeps them on the "
            f"host: choose another form, or leave out abandon_incoherent."
        )
    if (limit := workload.sampling.max_new_tokens) <= BEGINNING:
        raise UserError(
            f"abandon_incoherent judges the first {BEGINNING} tokens of an answer, and max_new_tokens is {limit}: "
            f"raise it, or leave out abandon_incoherent."
        )
    each = cache_bytes(model, workload.prompt_tokens, BEGINNING) / model.mesh.size
    if each > LARGEST_PROMPT_CACHE:
        raise UserError(
            f"abandon_incoherent would keep {each / 1e9:.1f} GB of keys and values of the prompts on each device, more "
            f"than {LARGEST_PROMPT_CACHE / 1e9:.1f}: ask fewer or shorter prompts, or leave out abandon_incoherent."
        )


def _check_judges(judges: Judges, decoding: Decoding, questions: Questions, free_model: bool) -> int | None:
    """Let the evaluators check that they can be used. Return the bytes on each device that those which judge after the
    last point may use; None if that is not known.

    Arguments:
        free_model: whether the model's memory is free then.
    """
    free = from_first(free_memory)
    later = None if free is None else free + (bytes_of_weights(decoding.model) if free_model else 0)
    judges.prepare(questions.prompts, free_beside(free, decoding.model, decoding.plan), later)
    return later


def _opened(
    directory: Path | None,
    config: Mapping[str, Any],
    places: _Places,
    questions: Questions,
    decides: Adaptive | None,
    overwrite: bool,
    extend: bool,
) -> AbstractContextManager[Run]:
    """The run in a directory: started, resumed, or extended; see `open_scan`."""
    opener = partial(
        open_run,
        config=config,
        axes=places.axes,
        num_sets=len(places.recipes),
        prompts=questions.prompts,
        sent=questions.sent,
        coords=places.coords,
        adaptive=decides,
    )
    return open_scan(directory, config, questions.prompts, questions.tokens, opener, overwrite=overwrite, extend=extend)


def _evaluate(
    run: Run,
    decoding: Decoding,
    coherences: Callable[[], list[Evaluator]],
    openings: Sequence[str],
    reports: ScanProgress,
    progress: bool,
) -> None:
    """Decode the points of a run that are left and judge them, round by round if the scan is adaptive.

    Arguments:
        coherences: gives the evaluators by coherence. They may calibrate the model, so they are made after the first
            round, when the memory of the engine is free, if they are not needed before.
        openings: see `label_rest`.
    """
    if decoding.keep_labels:
        label_rest(run, decoding.judges, openings)
    while True:
        decode_rest(run, decoding, reports)
        return_free_memory()
        if own := coherences():
            label_rest(run, own, openings, None, progress)
        if not run.extend():
            return


def _delete_arrays(model: Model) -> None:
    """Free the memory of the model's parameters on the devices."""
    for leaf in jax.tree.leaves(model.params):
        if isinstance(leaf, jax.Array):
            leaf.delete()


def with_recorded_form(options: EngineOptions, directory: Path | None) -> EngineOptions:
    """The options with the form of the run in a directory, if there is one and they leave the choice open.

    A resumed run keeps its form: where two tokens are equally likely, another form may choose the other one.
    """
    form = from_first(lambda: rundir.recorded_value(directory, "form"))
    return replace(options, form=form) if options.form == "auto" and form in list(Form) else options


def answer_settings(
    model: Model,
    prompts: Sequence[str],
    prompt_tokens: Sequence[Sequence[int]],
    system_prompt: str,
    thinking: str,
    sampling: Sampling,
    plan: Plan,
    options: EngineOptions,
    judges: Sequence[Evaluator],
) -> dict[str, Any]:
    """What `config.json` says of how the answers at a point come about."""
    storage = options.direction_storage
    longest = max(map(len, prompt_tokens)) + sampling.max_new_tokens
    return {
        "num_prompts": len(prompts),
        "prompts": checksum(list(prompts)),
        "tokens": checksum(prompt_tokens),
        "architecture": checksum((model.config, model.eos_token_ids)),
        **({"long_rope": True} if model.config.has_long_rope(longest) else {}),
        "system_prompt": system_prompt,
        **({"thinking": thinking} if thinking != "default" else {}),
        **asdict(sampling),
        "form": plan.form,
        "full_text": options.full_text,
        **({"direction_storage": storage} if storage in ("bfloat16", "int8") else {}),
        **_evaluator_identity(judges),
    }


def _evaluator_identity(judges: Sequence[Evaluator]) -> dict[str, Any]:
    """What `config.json` says of the evaluators: nothing of the paper's keywords alone."""
    checksums = {judge.name: checksum for judge in judges if (checksum := checksum_of(judge))}
    return {
        **({"evaluator": judges[0].name} if judges[0].name != DEFAULT_EVALUATOR else {}),
        **({"further_evaluators": [judge.name for judge in judges[1:]]} if len(judges) > 1 else {}),
        **({"evaluator_checksums": checksums} if checksums else {}),
    }


def workload_of(
    prompt_tokens: Sequence[Sequence[int]],
    sampling: Sampling,
    axes: Sequence[Axis],
    recipes: Sequence[Sequence[Recipe]],
    coords: Sequence[Sequence[float]] = (),
) -> Workload:
    """The workload of a scan.

    Arguments:
        recipes: the directions of each set.
        coords: the points, if they are a list and no grid.
    """
    return Workload(
        prompt_tokens,
        sampling,
        num_points=len(coords) or math.prod(len(axis.values) for axis in axes),
        points_per_line=len(axes[-1].values) if axes else 1,
        ndim=count_directions(recipes),
        **direction_counts(recipes),
        num_sets=len(recipes),
        rank=largest_rank(itertools.chain.from_iterable(recipes)),
    )
