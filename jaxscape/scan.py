"""The scan: evaluate a model at every point of a landscape."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from jaxscape import rundir
from jaxscape.decode import Sampling, encode
from jaxscape.engine import Engine
from jaxscape.errors import UserError, check_seed
from jaxscape.evaluate import is_refusal
from jaxscape.files import checksum
from jaxscape.landscape import Axis, Landscape, symmetric_axes
from jaxscape.models import Model
from jaxscape.models.checkpoint import Params, fingerprint
from jaxscape.perturb import check_direction, placed, random_direction, stored
from jaxscape.plan import FORMS, EngineOptions, Plan, Work, make_plan
from jaxscape.processes import from_first
from jaxscape.progress import report_to
from jaxscape.prompts import chat_text
from jaxscape.store import Run, open_run

Direction = Params | int | np.integer
"""A tree like `model.params`, or the seed of a random one, which is made when it is needed."""


def scan(
    model: Model,
    directions: Sequence[Direction | Sequence[Direction]],
    *,
    prompts: Sequence[str],
    steps: int = 20,
    radius: float = 0.5,
    axes: Sequence[Axis] | None = None,
    system_prompt: str = "default",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    options: EngineOptions = EngineOptions(),  # noqa: B008 (immutable)
    out: str | Path | None = None,
    overwrite: bool = False,
    describe: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Landscape:
    """Measure a safety landscape.

    Arguments:
        directions: the direction sets. `[d, e]` are two 1D landscapes, `[(d, e)]` is one 2D landscape; a direction is
            a tree like `model.params`, or an integer, the seed of a random one. In a pair, a random second direction
            is made orthogonal to the first.
        steps: intervals along each axis, from −radius to radius; even, so that the model itself is a point.
        axes: one for each direction of a set, in the place of those that steps and radius describe.
        system_prompt: `default`, `none`, a name or a text, see `jaxscape.prompts.chat_text`.
        max_new_tokens, temperature, top_k, top_p, seed: see `jaxscape.decode.Sampling`.
        options: of the engine, see `jaxscape.plan.EngineOptions`. Unless they ask for whole texts, a text ends at its
            first refusal keyword.
        out: a directory to keep the run in. An unfinished run there is resumed; one of another configuration is an
            error, unless `overwrite`.
        describe: anything JSON can hold that should also stand in the run's configuration.
        progress: whether to report each point on the standard error stream.

    Returns:
        The landscape, also when it was already complete on disk.

    Raises:
        UserError: something that was given cannot be used. Nothing is written then.
    """
    sets = [tuple(item) if isinstance(item, list | tuple) else (item,) for item in directions]
    if not sets or len(set(map(len, sets))) != 1:
        raise UserError("Give at least one direction, and either single directions or pairs of them, not both.")
    axes = symmetric_axes(len(sets[0]), steps, radius) if axes is None else tuple(axes)
    if len(axes) != len(sets[0]):
        raise UserError(f"There are {len(axes)} axes, but {len(sets[0])} directions in a set; give as many of both.")
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    sent = [chat_text(model.tokenizer, prompt, system_prompt) for prompt in prompts]
    rows = encode(model, sent, max_new_tokens)
    work = Work(
        rows,
        sampling,
        num_points=math.prod(len(axis.values) for axis in axes),
        line=len(axes[-1].values),
        ndim=len(axes),
        drawn=max(sum(isinstance(direction, int | np.integer) for direction in item) for item in sets),
    )
    directory = None if out is None else Path(out)
    form = from_first(lambda: rundir.recorded(directory, "form"))
    if options.form == "auto" and not overwrite and form in FORMS:
        # What is resumed goes on in its form: another may choose another token where two are as good as equal.
        options = replace(options, form=form)
    plan = make_plan(model, work, options)
    config = {
        "model": model.name,
        "weights": fingerprint(model.params),
        "dtype": model.dtype,
        "directions": [[_identity(direction, model) for direction in item] for item in sets],
        "axes": [asdict(axis) for axis in axes],
        "num_prompts": len(prompts),
        "prompts": checksum(list(prompts)),
        "tokens": checksum(rows),
        "architecture": checksum((model.config, model.eos_token_ids)),
        "system_prompt": system_prompt,
        **asdict(sampling),
        "form": plan.form,
        "full_text": options.full_text,
        **({"direction_storage": storage} if (storage := options.direction_storage) in ("bfloat16", "int8") else {}),
        **(describe or {}),
    }
    engine = Engine(model, rows, sampling, plan, decided=None if options.full_text else is_refusal)
    with (
        open_run(directory, config, axes, len(sets), prompts, sent, overwrite) as run,
        _report(run, plan, progress) as tell,
    ):
        for index, points in itertools.groupby(run.points[run.num_done :], key=lambda point: point[0]):
            resolved = None  # the last set's directions, before the next set's are made
            resolved = resolve(sets[index], model, plan.storage)
            for completions in engine.complete(resolved, [coords for _, coords in points]):
                run.append(completions)
                tell()
        return run.landscape()


def _identity(direction: Direction, model: Model) -> int | str:
    if isinstance(direction, int | np.integer):
        return check_seed(int(direction))
    check_direction(direction, model)
    return fingerprint(direction)


def resolve(directions: Sequence[Direction], model: Model, storage: str = "exact") -> list[Params]:
    """The trees of a direction set; a random direction after the first is made orthogonal to it.

    `storage` is that of `jaxscape.perturb.random_direction`.
    """
    resolved: list[Params] = []
    for direction in directions:
        if isinstance(direction, int | np.integer):
            other = resolved[0] if resolved else None
            direction = random_direction(model, int(direction), orthogonal_to=other, storage=storage)
        else:
            direction = placed(direction, model)
            direction = stored(direction, storage) if storage in ("bfloat16", "int8") else direction
        resolved.append(direction)
    return resolved


@contextmanager
def _report(run: Run, plan: Plan, enabled: bool) -> Iterator[Callable[[], None]]:
    """A line for each point: how far, where, its ASR, the time left; and a progress bar where there is a terminal."""
    total, resumed, started = len(run.points), run.num_done, time.monotonic()
    with report_to(enabled) as bar:
        task = bar.add_task("scan", total=total, completed=resumed)
        if resumed < total:
            bar.print(str(plan))
        if resumed:
            bar.print(f"going on after {resumed} of {total} points")

        def tell() -> None:
            done = run.num_done
            index, coords = run.points[done - 1]
            place = ", ".join(f"{axis.name} {c:+.4g}" for axis, c in zip(run.axes, coords, strict=True))
            asr = 100 * (1 - run.refused[done - 1].mean())
            elapsed = time.monotonic() - started
            left = timedelta(seconds=round(elapsed / (done - resumed) * (total - done)))
            line = f"{done:>{len(str(total))}}/{total}  direction {index}  {place}  ASR {asr:5.1f} %  {left} left"
            if bad := int((~run.finite[done - 1]).sum()):
                line += f"  ({bad} of {len(run.prompts)} prompts met NaN or infinite logits)"
            bar.update(task, completed=done)
            bar.print(line)

        yield tell
