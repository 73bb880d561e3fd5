"""The directions and axes that a scan's command-line options describe."""

from collections.abc import Sequence

from jaxscape.directions.base import Recipe
from jaxscape.directions.difference import To
from jaxscape.directions.files import File
from jaxscape.directions.kinds import parse_direction
from jaxscape.directions.principal import Principal
from jaxscape.directions.random import Random
from jaxscape.landscapes.axes import Axis, interpolation_axis, symmetric_axes
from jaxscape.runtime.errors import UserError

DEFAULT_RADIUS = 0.5
# Principal components are scaled so that the path reaches coordinate 1 along the first; the figure has a margin.
PRINCIPAL_RADIUS = 1.25

DirectionSet = tuple[Recipe, ...]
"""The recipes for one landscape. Together they make one direction for each of its axes."""


def choose_directions(
    ndim: int,
    *,
    seed: int = 0,
    num_directions: int = 1,
    names: Sequence[str] = (),
    files: Sequence[str] = (),
    interpolate_to: Sequence[str] = (),
    trajectories: Sequence[str] = (),
) -> list[DirectionSet]:
    """The direction sets that the options of a scan describe. No file or model is read.

    Arguments:
        ndim: number of axes of the landscape, hence of directions in a set.
        seed: seed of the first random direction; further ones have the seeds seed + 1, seed + 2, …
        num_directions: number of direction sets with random directions.
        names: directions by name, `KIND:OPTION`, filling the sets one after another.
        files: safetensors files, filling the sets one after another.
        interpolate_to: models to interpolate to, one for each axis; in 2D, the second may be missing, and its axis then
            has a random direction.
        trajectories: directories of finetunings whose paths are drawn on the plane. Without other directions, the plane
            is that of their first two principal components.

    Raises:
        UserError: the options contradict one another, or do not fill the sets.
    """
    _check(ndim, num_directions, names, files, interpolate_to, trajectories)
    if names or files:
        given = [parse_direction(name) for name in names] or [File(file) for file in files]
        return _grouped(given, ndim)
    if interpolate_to:
        ends = tuple(To(model) for model in interpolate_to)
        if len(ends) == ndim:
            return [ends]
        return [(*ends, Random(seed + i)) for i in range(num_directions)]
    if trajectories:
        return [(Principal(tuple(trajectories)),)]
    return _grouped([Random(seed + i) for i in range(num_directions * ndim)], ndim)


def _grouped(recipes: Sequence[Recipe], ndim: int) -> list[DirectionSet]:
    """The recipes in sets of `ndim` directions."""
    sets: list[DirectionSet] = []
    current: DirectionSet = ()
    for recipe in recipes:
        current = (*current, recipe)
        size = sum(one.count for one in current)
        if size == ndim:
            sets.append(current)
            current = ()
        elif size > ndim:
            raise UserError(f"The direction {recipe} fills {recipe.count} axes: give it alone with --ndim 2.")
    if current:
        raise UserError(
            f"Each {ndim}D landscape takes {ndim} directions, but {len(recipes)} were given: give another one, or "
            f"leave one out."
        )
    return sets


def _check(
    ndim: int,
    num_directions: int,
    names: Sequence[str],
    files: Sequence[str],
    interpolate_to: Sequence[str],
    trajectories: Sequence[str],
) -> None:
    given = {"--direction": names, "--directions": files, "--interpolate-to": interpolate_to}
    used = [option for option, values in given.items() if values]
    if len(used) > 1:
        raise UserError(f"Give only one of {' and '.join(used)}: each chooses all directions.")
    if num_directions < 1:
        raise UserError(f"--num-directions must be at least 1, not {num_directions}.")
    if num_directions != 1 and (names or files):
        raise UserError(f"Give either {used[0]} or --num-directions, which counts random directions.")
    if len(interpolate_to) > ndim:
        raise UserError(
            f"--interpolate-to takes at most {ndim} models with --ndim {ndim}, but {len(interpolate_to)} were given."
        )
    if num_directions != 1 and len(interpolate_to) == ndim:
        raise UserError("--num-directions counts random directions, and this interpolation has none: leave it out.")
    if trajectories and (ndim != 2 or num_directions != 1 or len(names) > 2 or len(files) > 2):
        raise UserError("--trajectory is drawn on one plane: give --ndim 2 and at most one pair of directions.")


def choose_axes(directions: DirectionSet, steps: int, radius: float | None, extra_steps: int = 0) -> tuple[Axis, ...]:
    """The axes along the directions of a set.

    An axis to another model runs from 0 to 1; any other runs from −radius to radius.

    Arguments:
        steps: number of intervals from −radius to radius, or from one model to the other.
        radius: None for the default: 1.25 along principal components, and else 0.5.
        extra_steps: number of further intervals beyond each of the two models of an interpolation.

    Raises:
        UserError: a number is out of range, or there are extra steps but no interpolation.
    """
    num_interpolated = sum(recipe.count for recipe in directions if recipe.is_interpolation)
    num_symmetric = sum(recipe.count for recipe in directions) - num_interpolated
    if extra_steps and not num_interpolated:
        raise UserError("--extra-steps continue an interpolation beyond its ends: give --interpolate-to too.")
    if radius is None:
        radius = PRINCIPAL_RADIUS if any(isinstance(recipe, Principal) for recipe in directions) else DEFAULT_RADIUS
    names = ("interpolation", "interpolation 2")[:num_interpolated]
    interpolated = iter([interpolation_axis(steps, extra_steps, name) for name in names])
    symmetric = iter(symmetric_axes(num_symmetric, steps, radius) if num_symmetric else ())
    return tuple(
        next(interpolated if recipe.is_interpolation else symmetric)
        for recipe in directions
        for _ in range(recipe.count)
    )
