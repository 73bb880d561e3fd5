"""Radii by bisection along many rays, and the certificate of Gaussian noise."""

import itertools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from jaxscape.directions.base import DEFAULT_RADIUS, Recipe, default_radius
from jaxscape.directions.kinds import DirectionLike, recipe_of
from jaxscape.directions.relative import Relative
from jaxscape.engine.options import EngineOptions
from jaxscape.engine.sampling import SamplingOptions
from jaxscape.evaluate.base import Evaluator
from jaxscape.evaluate.evaluators import DEFAULT_EVALUATOR
from jaxscape.landscapes.decisions import Decisions, Question, RayPoint, open_decisions
from jaxscape.landscapes.numbers import SIDES
from jaxscape.landscapes.radii import Certificate, Radii, Ray, radius_text
from jaxscape.models.checkpoint import named_leaves
from jaxscape.models.model import Model
from jaxscape.models.weights import is_norm
from jaxscape.runtime.errors import UserError, as_list
from jaxscape.runtime.processes import from_first
from jaxscape.runtime.progress import progress_display
from jaxscape.runtime.remote import run_directory

CHECKS_OF_COMPLIED = 9
DEFAULT_CELLS, DEFAULT_ERROR, DEFAULT_DRAWS = 50, 0.05, 100
POINTS_OF_SEARCH, POINTS_OF_DRAW = 2, 1  # along a direction that are asked together: on its two sides; at a draw


@dataclass(frozen=True)
class SearchSettings:
    """What is searched for along each ray; the arguments of `radius` of the same names.

    Raises:
        UserError: a value is out of range.
    """

    of: str
    threshold: float
    radius_max: float
    resolution: float
    error: float
    checks: int | None

    @classmethod
    def choose(
        cls,
        recipes: Sequence[Recipe],
        of: str = "asr",
        threshold: float = 50.0,
        radius_max: float | None = None,
        resolution: float | None = None,
        error: float = DEFAULT_ERROR,
        checks: int | None = None,
    ) -> "SearchSettings":
        """The settings for directions, whose kinds decide what is None."""
        if radius_max is None:
            known = {1.0 if recipe.is_interpolation else default_radius(recipe) for recipe in recipes}
            if len(known) > 1:
                raise UserError(
                    f"The directions reach to {' and '.join(f'{value:g}' for value in sorted(known))} by default: give "
                    f"--radius-max (radius_max= in Python), or search along each kind in a run of its own."
                )
            radius_max = next(iter(known), DEFAULT_RADIUS)
        return cls(
            of, threshold, radius_max, radius_max / DEFAULT_CELLS if resolution is None else resolution, error, checks
        )

    def __post_init__(self) -> None:
        if not (0 < self.radius_max < math.inf):
            raise UserError(f"The largest radius must be a positive number, not {self.radius_max:g}.")
        if not (0 < self.resolution <= self.radius_max):
            raise UserError(f"The resolution must be positive and at most the largest radius, not {self.resolution:g}.")
        if not 0 <= self.num_checks <= self.cells:
            raise UserError(
                f"The number of checks must be from 0 to {self.cells}, which is how many points a ray has, not "
                f"{self.checks}."
            )
        if not 0 <= self.error < 1:
            raise UserError(f"The error must be at least 0 and below 1, not {self.error:g}.")
        Question(self.of, self.threshold)

    @property
    def cells(self) -> int:
        """The number of points of a ray beside the model itself."""
        return math.ceil(self.radius_max / self.resolution - 1e-9)  # and not one more by rounding alone

    @property
    def num_checks(self) -> int:
        """The number of points that are asked before bisection."""
        if self.checks is not None:
            return self.checks
        return min(CHECKS_OF_COMPLIED, self.cells) if self.of == "complied" else 0

    @property
    def most_points(self) -> int:
        """The number of points that the search along a ray can have, at most; the model itself is one of them."""
        return 2 + math.ceil(math.log2(self.cells)) + self.num_checks

    @property
    def question(self) -> Question:
        """What is asked at each point. The error of a ray is divided among the points that its search can have."""
        return Question(self.of, self.threshold, self.error / self.most_points)

    def distance(self, number: int) -> float:
        """The distance of a ray's point from the model."""
        return self.radius_max * number / self.cells


def radius(
    model: Model,
    directions: Sequence[DirectionLike],
    *,
    prompts: Sequence[str],
    of: str = "asr",
    threshold: float = 50.0,
    radius_max: float | None = None,
    resolution: float | None = None,
    error: float = DEFAULT_ERROR,
    checks: int | None = None,
    system_prompt: str = "default",
    thinking: str = "default",
    evaluator: str | Evaluator | Sequence[str | Evaluator] = DEFAULT_EVALUATOR,
    options: EngineOptions | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    describe: Mapping[str, Any] | None = None,
    progress: bool = True,
    **sampling: Unpack[SamplingOptions],
) -> Radii:
    """How far it is along each side of each direction until a rate exceeds a threshold, by bisection.

    A ray has the points at multiples of `resolution` from the model. Bisection finds where the rate first exceeds
    the threshold if it rises along the ray; if it falls again, it may miss the first such place, or all of them. At
    each point, prompts are asked in random order, until `jaxscape.evaluate.statistics.more_than` has decided whether
    the rate over all prompts exceeds the threshold.

    Arguments:
        directions, prompts, system_prompt, thinking, options, out, overwrite, describe, progress, sampling: as in
            `jaxscape.scan`. The seed of `sampling` also decides the order of the prompts. A direction to another model
            has only its positive side.
        of: which rate: `asr`, or the share of the answers that are `complied` or `incoherent`.
        threshold: in percent.
        radius_max: the largest distance, in multiples of the directions. None for the default of their kind, which is
            0.5 for most, and 1 towards another model.
        resolution: the distance between two points; it is made a little smaller if it does not divide `radius_max`.
            None for a fiftieth of that.
        error: the probability, over the order of the prompts, that the search along a ray ends elsewhere than with the
            answers to all prompts, at most. Each of the points that a search can have is given an equal part of it. 0
            asks until nothing can change a decision.
        checks: the number of points, spread evenly over each ray, that are asked before. Bisection then ends between
            the first of them at which the rate exceeds the threshold and the one before it. None for 9 with `complied`,
            because farther out answers make no sense, and else for 0.
        evaluator: one evaluator, which tells refusals.

    Returns:
        The radii. If `out` holds them already, no answer is generated again.

    Raises:
        UserError: an argument cannot be used, or `out` holds a run of another configuration. Nothing is written then.
    """
    recipes = [recipe_of(direction) for direction in as_list(directions, "directions")]
    settings = SearchSettings.choose(recipes, of, threshold, radius_max, resolution, error, checks)
    sides = sides_of(recipes)
    search = {"radius_max": settings.radius_max, "cells": settings.cells, "checks": settings.num_checks}
    directory = None if out is None else run_directory(out)
    with open_decisions(
        settings.question,
        model,
        recipes,
        search,
        prompts=prompts,
        system_prompt=system_prompt,
        thinking=thinking,
        evaluator=evaluator,
        options=options,
        out=directory,
        overwrite=overwrite,
        describe=describe,
        points=POINTS_OF_SEARCH,
        **sampling,
    ) as decisions:
        rays: list[Ray] = []

        def result() -> Radii:
            return Radii(
                of=of,
                threshold=threshold,
                radius_max=settings.radius_max,
                resolution=settings.distance(1),
                error=error,
                num_prompts=decisions.num_prompts,
                num_rays=sum(map(len, sides)),
                rays=tuple(rays),
                num_answers=decisions.num_answers,
            )

        with progress_display(progress) as bar:
            task = bar.add_task("radius", total=len(sides))
            bar.print(decisions.summary)
            for start in range(0, len(sides), decisions.directions_at_once):
                found = _search(decisions, start, sides[start : start + decisions.directions_at_once], settings)
                rays += itertools.chain.from_iterable(found)
                if directory is not None:
                    from_first(lambda: result().save(directory))
                bar.update(task, completed=start + len(found))
                for index, own in enumerate(found, start):
                    bar.print(_report(index + 1, len(sides), own, settings, decisions.num_answers))
        return result()


def sides_of(recipes: Sequence[Recipe]) -> list[list[int]]:
    """For each direction, the signs of the sides that are searched: both, or only that of another model."""
    return [[1] if recipe.is_interpolation else [-1, 1] for recipe in recipes for _ in range(recipe.count)]


class Found(NamedTuple):
    """Where a search ended, by the numbers of points.

    Attributes:
        inside, outside: the two points next to each other between which the rate exceeds the threshold for the first
            time; `outside` is None if there are none.
        below_again: the points farther out that were asked and at which it does not exceed the threshold.
    """

    inside: int
    outside: int | None
    below_again: tuple[int, ...] = ()


Search = Generator[int, bool, Found]
"""A search along a ray. It yields the number of a point, is sent whether the rate exceeds the threshold there, and
returns what it found."""


def bisection(cells: int, checks: int = 0) -> Search:
    """A search by bisection among the points 0 (the model itself) to `cells` of a ray.

    Arguments:
        checks: the number of points, as evenly spread as can be, that are asked before. The search goes on between the
            first one at which the rate exceeds the threshold and the one before it.
    """
    if (yield 0):
        return Found(0, 0)
    exceeds = {}
    for index in sorted({round(cells * i / (checks + 1)) for i in range(1, checks + 2)}):
        exceeds[index] = yield index
    outside = next((index for index, is_outside in exceeds.items() if is_outside), None)
    if outside is None:
        return Found(cells, None)
    below_again = tuple(index for index, is_outside in exceeds.items() if index > outside and not is_outside)
    inside = max((index for index in exceeds if index < outside), default=0)
    while outside - inside > 1:
        middle = (inside + outside) // 2
        inside, outside = (inside, middle) if (yield middle) else (middle, outside)
    return Found(inside, outside, below_again)


def lockstep(
    searches: Sequence[Search], ask: Callable[[Sequence[tuple[int, int]]], Sequence[bool]]
) -> list[tuple[Found, int]]:
    """Run searches together, so that each step of all of them is asked at once.

    Arguments:
        ask: takes the index of a search and the number of a point for each search that is not finished, and returns
            whether the rate exceeds the threshold there.

    Returns:
        For each search, what it found, and the number of points that it asked for.
    """
    steps = {index: next(search) for index, search in enumerate(searches)}
    counts, found = [0] * len(searches), {}
    while steps:
        for (index, _), answer in zip(list(steps.items()), ask(list(steps.items())), strict=True):
            counts[index] += 1
            try:
                steps[index] = searches[index].send(answer)
            except StopIteration as end:
                found[index] = end.value
                del steps[index]
    return [(found[index], counts[index]) for index in range(len(searches))]


def _search(
    decisions: Decisions, first: int, sides: Sequence[Sequence[int]], settings: SearchSettings
) -> list[list[Ray]]:
    """The rays of each of several directions, which are searched together.

    Arguments:
        first: the index of the first direction.
        sides: for each direction, the signs of its sides.
    """
    distance = settings.distance
    starts = [(first + i, sign) for i, signs in enumerate(sides) for sign in signs]

    def point(ray: int, number: int) -> RayPoint:
        index, sign = starts[ray]
        return (index, sign * distance(number)) if number else (0, 0.0)  # all rays begin at the same point

    searches = [bisection(settings.cells, settings.num_checks) for _ in starts]
    found = lockstep(searches, lambda steps: decisions.exceeds([point(*step) for step in steps]))
    rays = [
        Ray(
            direction=decisions.names[index],
            side=SIDES[sign > 0],
            inside=distance(end.inside),
            outside=None if end.outside is None else distance(end.outside),
            below_again=tuple(map(distance, end.below_again)),
            points=count,
        )
        for (index, sign), (end, count) in zip(starts, found, strict=True)
    ]
    return [list(own) for _, own in itertools.groupby(rays, key=lambda ray: ray.direction)]


def _report(done: int, total: int, rays: Sequence[Ray], settings: SearchSettings, num_answers: int) -> str:
    """One line about the rays of a direction, which is number `done` of `total`."""
    texts = ", ".join(f"{ray.side} {radius_text(ray, settings.radius_max)}" for ray in rays)
    return f"{done:>{len(str(total))}}/{total}  {rays[0].direction}  {texts}  ({num_answers} answers)"


def check_draws(sigma: float, draws: int) -> None:
    """Raise a `UserError` if the noise of a certificate has no size, or if nothing is drawn."""
    if not (0 < sigma < math.inf):
        raise UserError(f"The size of the noise must be a positive number, not {sigma:g}.")
    if draws < 1:
        raise UserError(f"The number of draws must be at least 1, not {draws}.")


def certify(
    model: Model,
    sigma: float,
    *,
    prompts: Sequence[str],
    draws: int = DEFAULT_DRAWS,
    first_seed: int = 0,
    of: str = "asr",
    threshold: float = 50.0,
    system_prompt: str = "default",
    thinking: str = "default",
    evaluator: str | Evaluator | Sequence[str | Evaluator] = DEFAULT_EVALUATOR,
    options: EngineOptions | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    describe: Mapping[str, Any] | None = None,
    progress: bool = True,
    **sampling: Unpack[SamplingOptions],
) -> Certificate:
    """How often Gaussian noise of size σ keeps a rate from exceeding a threshold, with 95 % confidence.

    The noise is that of `jaxscape.directions.relative.Relative`: independent in each weight, with a standard deviation
    of σ times the root mean square of the weight's tensor. At each draw, prompts are asked until nothing can change
    whether the rate over all prompts exceeds the threshold, so that stopping early brings no error.

    Arguments:
        sigma: σ.
        draws: the number of draws. It must not depend on what other draws have given.
        first_seed: seed of the first draw; further ones have the seeds after it.

    The other arguments are those of `radius`.

    Raises:
        UserError: an argument cannot be used, or `out` holds a run of another configuration. Nothing is written then.
    """
    check_draws(sigma, draws)
    question, directory = Question(of, threshold), None if out is None else run_directory(out)
    noise = [Relative(first_seed + i) for i in range(draws)]
    weights = [leaf for name, leaf in named_leaves(model.params).items() if not is_norm(name)]
    with open_decisions(
        question,
        model,
        noise,
        {"sigma": sigma},
        prompts=prompts,
        system_prompt=system_prompt,
        thinking=thinking,
        evaluator=evaluator,
        options=options,
        out=directory,
        overwrite=overwrite,
        describe=describe,
        points=POINTS_OF_DRAW,
        **sampling,
    ) as decisions:
        exceeded: list[bool] = []

        def result() -> Certificate:
            return Certificate(
                of=of,
                threshold=threshold,
                sigma=sigma,
                num_prompts=decisions.num_prompts,
                num_draws=draws,
                exceeded=tuple(exceeded),
                num_weights=sum(leaf.size for leaf in weights),
                num_answers=decisions.num_answers,
            )

        with progress_display(progress) as bar:
            task = bar.add_task("certify", total=draws)
            bar.print(decisions.summary)
            for start in range(0, draws, decisions.directions_at_once):
                indices = range(draws)[start : start + decisions.directions_at_once]
                exceeded += decisions.exceeds([(index, float(sigma)) for index in indices])
                if directory is not None:
                    from_first(lambda: result().save(directory))
                bar.update(task, completed=len(exceeded))
                for index in indices:
                    verdict = "exceeds" if exceeded[index] else "does not exceed"
                    bar.print(
                        f"{index + 1:>{len(str(draws))}}/{draws}  {decisions.names[index]}  {verdict} {threshold:g} %"
                    )
        return result()
