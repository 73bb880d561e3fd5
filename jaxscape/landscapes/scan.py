"""The scan: evaluate a model at every point of a landscape."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import jax

from jaxscape.directions.base import Recipe
from jaxscape.directions.kinds import DirectionLike, largest_rank, make_directions, prepare
from jaxscape.directions.random import Random
from jaxscape.directions.storage import Direction
from jaxscape.engine.batching import Workload
from jaxscape.engine.engine import Engine
from jaxscape.engine.forms import Form
from jaxscape.engine.options import EngineOptions
from jaxscape.engine.planner import Plan, bytes_of_weights, make_plan
from jaxscape.engine.sampling import Sampling, SamplingOptions
from jaxscape.engine.scheduler import Coords
from jaxscape.evaluate.base import Evaluator, checksum_of, stop_when_all, uses_model
from jaxscape.evaluate.coherence import COHERENCE, Coherence, coherence
from jaxscape.evaluate.evaluators import DEFAULT_EVALUATOR, find_evaluators
from jaxscape.landscapes.adaptive import check_ascending, first_round
from jaxscape.landscapes.answers import answers_at
from jaxscape.landscapes.axes import Axis, point_text
from jaxscape.landscapes.choice import choose_grid, choose_sets, count_directions
from jaxscape.landscapes.landscape import Landscape
from jaxscape.landscapes.points import as_points, check_coordinates
from jaxscape.landscapes.score import label_rest, prepare_judge
from jaxscape.landscapes.shares import in_run
from jaxscape.landscapes.store import Adaptive, Run, open_run
from jaxscape.models.chat_defaults import template_notes
from jaxscape.models.checkpoint import fingerprint
from jaxscape.models.encoding import encode
from jaxscape.models.model import Model
from jaxscape.prompts.chat_format import chat_texts, thinking_opening
from jaxscape.prompts.fields import Prompts
from jaxscape.runtime import rundir
from jaxscape.runtime.errors import UserError, as_texts
from jaxscape.runtime.files import checksum
from jaxscape.runtime.hardware import free_memory
from jaxscape.runtime.processes import from_first
from jaxscape.runtime.progress import progress_display
from jaxscape.runtime.reporting import Reporter, check_target, open_reporter


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
    describe: Mapping[str, Any] | None = None,
    progress: bool = True,
    free_model: bool = False,
    shares: bool = True,
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
        describe: further entries of the run's `config.json`: anything that JSON can hold.
        progress: whether to report each point on the standard error stream.
        free_model: delete the model's arrays when all points are decoded, before evaluators load models of their own.
            The model cannot be used any more then.
        shares: whether the unperturbed model judges, after all points are decoded, which answers make no sense; see
            `Landscape.shares`.
        report_to: the program to which the numbers of each point are reported, `wandb` or `tensorboard`, see
            `jaxscape.runtime.reporting`; it needs `out`.
        sampling: `max_new_tokens`, `temperature`, `top_k`, `top_p` and `seed`, see
            `jaxscape.engine.sampling.Sampling`.

    Returns:
        The complete landscape. If `out` holds it already, no answer is generated again.

    Raises:
        UserError: an argument cannot be used, or `out` holds a run of another configuration. Nothing is written then.
    """
    check_target(report_to, None if out is None else Path(out))
    coords = () if points is None else as_points(points)
    if points is None:
        recipes, axes = choose_grid(directions, axes, steps, radius, control)
    elif axes is not None or adaptive:
        raise UserError("Points are no grid: leave out the axes and adaptive.")
    else:
        recipes, axes = choose_sets(directions, control), ()
        check_coordinates(coords, count_directions(recipes))
    if adaptive:
        check_ascending(axes)
    texts = as_texts(prompts, "prompts")
    prompts = prompts if isinstance(prompts, Prompts) else Prompts(texts)
    settings, judges = Sampling(**sampling), find_evaluators(evaluator)
    # The paper's keywords alone leave no labels: `refused` in the generations says all that they say.
    labelling = [] if [judge.name for judge in judges] == [DEFAULT_EVALUATOR] else judges
    late = [judge for judge in judges[1:] if uses_model(judge)]
    if shares and COHERENCE not in [judge.name for judge in judges]:
        late.append(coherence())
    at_once = [judge for judge in judges if judge not in late]
    sent = chat_texts(model.tokenizer, prompts, system_prompt, thinking)
    opening = thinking_opening(model.tokenizer, system_prompt, thinking)
    prompt_tokens = encode(model, sent, settings.max_new_tokens)
    prepared = prepare(recipes, model)
    planned = first_round(axes) if adaptive else axes
    sets = [[direction.recipe for direction in item] for item in prepared]
    workload = workload_of(prompt_tokens, settings, planned, sets, coords)
    directory = None if out is None else Path(out)
    options = options or EngineOptions()
    if not overwrite:
        options = with_recorded_form(options, directory)
    plan = make_plan(model, workload, options)
    free = from_first(free_memory)
    later_free = None if free is None else free + (bytes_of_weights(model) if free_model else 0)
    for judge in judges:
        prepare_judge(judge, prompts, later_free if judge in late else free_beside(free, model, plan))
    recorded = None if overwrite else from_first(lambda: rundir.recorded_value(directory, "directions"))
    decides: Adaptive | None = ("shares" if shares else "asr") if adaptive else None
    config = {
        "model": model.name,
        "weights": fingerprint(model.params),
        "dtype": model.dtype,
        "directions": [[one for direction in item for one in direction.ids_as_in(recorded)] for item in prepared],
        "direction_names": [[str(direction.recipe) for direction in item] for item in prepared],
        "axes": [axis.described() for axis in axes],
        **({"points": [list(point) for point in coords]} if coords else {}),
        **({} if decides is None else {"adaptive": decides}),
        **answer_settings(model, prompts, prompt_tokens, system_prompt, thinking, settings, plan, options, judges),
        **(describe or {}),
    }
    stop_when = None if options.full_text else stop_when_all(judges, opening)
    openings = [opening] * len(prompts)
    with (
        open_run(directory, config, axes, len(recipes), prompts, sent, overwrite, coords, decides) as run,
        open_reporter(report_to, directory, config) as reporter,
        _progress(
            run, [str(plan), prompts.summary(), *template_notes(model.tokenizer)], reporter, progress
        ) as report_point,
    ):
        bind = partial(
            in_run,
            run=run,
            directory=directory,
            sent=dict(zip(prompts, sent, strict=True)),
            load=lambda: model,
            weights=config["weights"],
            decides=judges[0],
        )
        at_once = [bind(judge) if isinstance(judge, Coherence) else judge for judge in at_once]
        if labelling:
            label_rest(run, at_once, openings)
        own: list[Evaluator] = []
        while True:
            engine = Engine(model, workload, plan, stop_when)
            _decode(run, engine, sets, at_once, opening, bool(labelling), report_point)
            del engine  # frees the memory that evaluators need
            if own := own or [bind(judge) for judge in late if isinstance(judge, Coherence)]:
                label_rest(run, own, openings, None, progress)
            if not run.extend():
                break
        if others := [judge for judge in late if not isinstance(judge, Coherence)]:
            if free_model:
                _delete_arrays(model)
            label_rest(run, others, openings, later_free, progress)
        return run.landscape()


def _decode(
    run: Run,
    engine: Engine,
    sets: Sequence[Sequence[DirectionLike]],
    judges: Sequence[Evaluator],
    opening: str,
    keeps_labels: bool,
    report_point: Callable[[], None],
) -> None:
    """Decode and judge the points of a run that are left, direction set by direction set.

    Arguments:
        sets: the directions of each set.
        judges, opening: see `answers_at`. The first evaluator decides the ASR.
        keeps_labels: whether the run keeps what the evaluators say.
        report_point: called after each point.
    """
    together = engine.plan.layout.num_sets
    for _, group in itertools.groupby(run.points[run.num_done :], key=lambda point: point[0] // together):
        points = list(group)
        indices = [index for index, _ in points]
        first, last = min(indices), max(indices)
        directions: list[Direction] = []  # frees the previous sets' directions before the next ones are made
        for item in sets[first : last + 1]:
            directions += make_directions(item, engine.model, engine.plan.storage)
        coords = [_along_all(coords, index - first, len(directions)) for index, coords in points]
        for answers in answers_at(coords, engine, directions, judges, run.prompts, opening):
            kept = zip(judges, answers.labels, strict=True) if keeps_labels else ()
            run.append(answers.completions, answers.refused, answers.unanswered, kept)
            report_point()


def _along_all(coords: Coords, index: int, count: int) -> Coords:
    """The coordinates along the `count` directions of several sets of a point that lies along those of one of them."""
    before = len(coords) * index
    return (*(0.0,) * before, *coords, *(0.0,) * (count - before - len(coords)))


def free_beside(free: int | None, model: Model, plan: Plan) -> int | None:
    """The bytes on each device that are left beside the model and what its plan needs; None if that is not known.

    Arguments:
        free: the bytes that are free now, when the model is loaded.
    """
    return None if free is None else free + bytes_of_weights(model) - plan.memory_bytes


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
    return {
        "num_prompts": len(prompts),
        "prompts": checksum(list(prompts)),
        "tokens": checksum(prompt_tokens),
        "architecture": checksum((model.config, model.eos_token_ids)),
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
        num_random=max(sum(isinstance(recipe, Random) for recipe in item) for item in recipes),
        num_sets=len(recipes),
        rank=largest_rank(itertools.chain.from_iterable(recipes)),
    )


@contextmanager
def _progress(run: Run, lines: Sequence[str], reporter: Reporter, enabled: bool) -> Iterator[Callable[[], None]]:
    """A context with a progress bar. It yields a function that reports the point that was finished last.

    A report has the point's coordinates, its ASR and the time left.

    Arguments:
        lines: what is shown first, if points are left.
        reporter: is given the numbers of each point too. A step is the number of points that are evaluated.
    """
    resumed, started = run.num_done, time.monotonic()
    with progress_display(enabled) as bar:
        task = bar.add_task("scan", total=len(run.points) or None, completed=resumed)
        if resumed < len(run.points) or not run.is_whole:
            for line in lines:
                bar.print(line)
        if resumed:
            bar.print(f"resuming after {resumed} {f'of {len(run.points)} ' if run.is_whole else ''}points")

        def report_point() -> None:
            done, total = run.num_done, len(run.points)
            index, coords = run.points[done - 1]
            position, asr = point_text(run.axes, coords), 100 * (1 - run.refused[done - 1].mean())
            elapsed = time.monotonic() - started
            left = timedelta(seconds=round(elapsed / (done - resumed) * (total - done)))
            line = f"{done:>{len(str(total))}}/{total}  direction {index}  {position}  ASR {asr:5.1f} %  {left} left"
            line += "" if run.is_whole else " in this round"
            nonfinite, unanswered = int((~run.finite[done - 1]).sum()), int(run.unanswered[done - 1].sum())
            if nonfinite:
                line += f"  ({nonfinite} of {len(run.prompts)} prompts met NaN or infinite logits)"
            if unanswered:
                line += f"  ({unanswered} of {len(run.prompts)} texts have thinking and no answer)"
            for name, rows in run.labels.rows.items():
                if unjudged := rows[done - 1].count(None) if len(rows) == done else 0:
                    line += f"  ({name} could not judge {unjudged} of {len(run.prompts)} answers)"
            bar.update(task, completed=done, total=total)
            bar.print(line)
            place = {"direction": index, **{f"coord_{axis}": value for axis, value in enumerate(coords)}}
            reporter.log(done, {"asr": asr, "nonfinite": nonfinite, "unanswered": unanswered, **place})

        yield report_point
