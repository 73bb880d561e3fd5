"""The direction sets and the axes of a landscape, as the options of a scan describe them."""

from collections.abc import Sequence
from dataclasses import replace

from jaxscape.directions.base import Recipe, default_radius, has_control, units_of
from jaxscape.directions.control import Control
from jaxscape.directions.difference import To
from jaxscape.directions.files import File
from jaxscape.directions.kinds import DirectionLike, Given, parse_direction, recipe_of
from jaxscape.directions.norms import WeightNorm
from jaxscape.directions.principal import Principal
from jaxscape.directions.random import Random
from jaxscape.landscapes.axes import Axis, interpolation_axis, symmetric_axes
from jaxscape.runtime.errors import UserError, as_list

WITHOUT_UNIT = (Random, File, To, Principal, Given)
"""Kinds whose axes have no `Axis.unit`, so that the files of their runs are those of earlier releases."""

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
    equal_norm: bool = False,
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
        equal_norm: scale each direction to the norm of the weights, see `jaxscape.directions.norms.WeightNorm`. A
            layer-normalised random direction has it already.

    Raises:
        UserError: the options contradict one another, or do not fill the sets.
    """
    option = _check(ndim, num_directions, names, files, interpolate_to)
    if names or files:
        given = [parse_direction(name) for name in names] or [File(file) for file in files]
        sets = _grouped(given, ndim, option)
    elif interpolate_to:
        ends: DirectionSet = tuple(To(model) for model in interpolate_to)
        others = [(Random(seed + i),) for i in range(num_directions)] if len(ends) < ndim else [()]
        sets = [ends + other for other in others]
    elif trajectories:
        sets = [(Principal(tuple(trajectories)),)]
    else:
        sets = _grouped([Random(seed + i) for i in range(num_directions * ndim)], ndim, option)
    if equal_norm:
        sets = [tuple(one if isinstance(one, Random) else WeightNorm(one) for one in item) for item in sets]
    if trajectories and (ndim != 2 or num_directions != 1 or len(sets) != 1):
        raise UserError("--trajectory is drawn on one plane: give --ndim 2 and at most one pair of directions.")
    return sets


def _grouped(recipes: Sequence[Recipe], ndim: int, option: str) -> list[DirectionSet]:
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
            raise UserError(
                f"The direction {recipe} fills {recipe.count} axes at once: give it with --ndim {recipe.count}, not "
                f"beside a single direction."
            )
    if current:
        count = sum(recipe.count for recipe in recipes)
        raise UserError(
            f"In {ndim} dimensions, directions come in sets of {ndim}, but {option} gives {count}: give {ndim} for "
            f"each landscape."
        )
    return sets


def _check(
    ndim: int,
    num_directions: int,
    names: Sequence[str],
    files: Sequence[str],
    interpolate_to: Sequence[str],
) -> str:
    """Raise a `UserError` if options contradict one another; return the option that chooses the directions."""
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
    return used[0] if used else "--num-directions"


def with_controls(sets: Sequence[Sequence[Recipe]]) -> list[DirectionSet]:
    """The direction sets, each followed by its random control if one of its directions is special.

    In the control, a `Control` of its own seed stands for each special direction. Nothing is added if a set has a
    control already, because its user chose the controls then.
    """
    chosen = [tuple(item) for item in sets]
    if any(isinstance(recipe, Control) for item in chosen for recipe in item):
        return chosen
    controlled = []
    for item in chosen:
        controlled.append(item)
        if any(map(has_control, item)):
            controlled.append(
                tuple(Control(recipe, seed) if has_control(recipe) else recipe for seed, recipe in enumerate(item))
            )
    return controlled


def choose_grid(
    directions: Sequence[DirectionLike | Sequence[DirectionLike]],
    axes: Sequence[Axis] | None,
    steps: int,
    radius: float | None,
    control: bool = True,
) -> tuple[list[DirectionSet], tuple[Axis, ...]]:
    """The recipes of each direction set, and the axes of the grid, from the arguments of `jaxscape.scan`.

    Arguments:
        control: add the random controls of special directions, see `with_controls`.

    Raises:
        UserError: there are no directions, the sets differ in their number, or the axes do not fit them.
    """
    recipes = choose_sets(directions, control)
    ndim = count_directions(recipes)
    axes = choose_axes(recipes, steps, radius) if axes is None else tuple(axes)
    if len(axes) != ndim:
        raise UserError(f"There are {len(axes)} axes but {ndim} directions in a set: give one axis for each direction.")
    return recipes, axes


def choose_sets(
    directions: Sequence[DirectionLike | Sequence[DirectionLike]], control: bool = True
) -> list[DirectionSet]:
    """The recipes of each direction set, from the arguments of `jaxscape.scan`.

    Arguments:
        control: add the random controls of special directions, see `with_controls`.

    Raises:
        UserError: there are no directions, or the sets differ in their number.
    """
    sets = [tuple(item) if isinstance(item, list | tuple) else (item,) for item in as_list(directions, "directions")]
    recipes: list[DirectionSet] = [tuple(map(recipe_of, item)) for item in sets]
    recipes = with_controls(recipes) if control else recipes
    if len({sum(recipe.count for recipe in item) for item in recipes}) != 1:
        raise UserError("Give at least one direction, and either single directions or pairs of them, not both.")
    return recipes


def count_directions(sets: Sequence[Sequence[Recipe]]) -> int:
    """The number of directions in each set."""
    return sum(recipe.count for recipe in sets[0])


def choose_axes(
    sets: Sequence[Sequence[Recipe]], steps: int, radius: float | None, extra_steps: int = 0
) -> tuple[Axis, ...]:
    """The axes that all direction sets of a landscape share.

    An axis to another model runs from 0 to 1; any other runs from −radius to radius.

    Arguments:
        steps: number of intervals from −radius to radius, or from one model to the other.
        radius: None for the default of each kind, which is 0.5 for most.
        extra_steps: number of further intervals beyond each of the two models of an interpolation.

    Raises:
        UserError: a number is out of range, there are extra steps but no interpolation, or the sets need different
            axes.
    """
    axes, *others = (_axes(directions, steps, radius, extra_steps) for directions in sets)
    if any(other != axes for other in others):
        raise UserError(
            "All direction sets of a landscape share its axes, but these need different ones: give --radius, or scan "
            "directions to other models, principal components and other directions in runs of their own."
        )
    if all(isinstance(recipe, WITHOUT_UNIT) for directions in sets for recipe in directions):
        return axes
    along = [[recipe for recipe in directions for _ in range(recipe.count)] for directions in sets]
    return tuple(replace(axis, unit=_unit(ones)) for axis, ones in zip(axes, zip(*along, strict=True), strict=True))


def _unit(recipes: Sequence[Recipe]) -> str:
    """The unit in which coordinates along all these directions can be stated, see `Axis.unit`."""
    first, *others = (units_of(recipe.of if isinstance(recipe, Control) else recipe) for recipe in recipes)
    shared = [unit for unit in first if all(unit in other for other in others)]
    return shared[0] if shared else "own"


def _axes(directions: Sequence[Recipe], steps: int, radius: float | None, extra_steps: int) -> tuple[Axis, ...]:
    num_interpolated = sum(recipe.count for recipe in directions if recipe.is_interpolation)
    num_symmetric = sum(recipe.count for recipe in directions) - num_interpolated
    if extra_steps and not num_interpolated:
        raise UserError("--extra-steps continue an interpolation beyond its ends: give --interpolate-to too.")
    names = ("interpolation", "interpolation 2")[:num_interpolated]
    interpolated = iter([interpolation_axis(steps, extra_steps, name) for name in names])
    radii = [
        default_radius(recipe) if radius is None else radius
        for recipe in directions
        for _ in range(recipe.count)
        if not recipe.is_interpolation
    ]
    symmetric = (symmetric_axes(num_symmetric, steps, radius)[i] for i, radius in enumerate(radii))
    return tuple(
        next(interpolated if recipe.is_interpolation else symmetric)
        for recipe in directions
        for _ in range(recipe.count)
    )
