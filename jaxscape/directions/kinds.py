"""The registry of kinds of directions, and the one way to name a direction on the command line, in Python and in files.

A direction's name is `KIND:OPTION`, for example `random:0`, `file:direction.safetensors` or `to:MODEL`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxscape.directions.base import Recipe
from jaxscape.directions.difference import To
from jaxscape.directions.files import File, check_direction
from jaxscape.directions.low_rank import LowRank
from jaxscape.directions.point import materialise
from jaxscape.directions.principal import Principal
from jaxscape.directions.random import Random, random_direction
from jaxscape.directions.storage import Direction, on_model_mesh, stored
from jaxscape.models.checkpoint import Params, fingerprint
from jaxscape.models.model import Model
from jaxscape.runtime.errors import UserError, as_list

KINDS: tuple[type[Recipe], ...] = (Random, File, To, Principal, LowRank)
"""All kinds of directions. A new kind is one more class here."""


@dataclass(frozen=True, eq=False)
class Given:
    """Directions that are already made, by the caller or by the recipe of this name.

    Attributes:
        ids: a checksum of each direction; None if they were not computed yet.
    """

    directions: tuple[Params, ...]
    name: str = "given"
    ids: tuple[str, ...] | None = None

    is_interpolation: ClassVar[bool] = False

    @property
    def count(self) -> int:
        return len(self.directions)

    def __str__(self) -> str:
        return self.name

    def make(self, model: Model) -> list[Direction]:
        for direction in self.directions:
            check_direction(direction, model)
        return list(self.directions)


DirectionLike = Mapping[str, Any] | int | np.integer | str | Recipe | Given
"""A direction as `scan` and `model_at` take it: a tree like `model.params`, the seed of a random direction, a name such
as `random:0`, or a recipe."""


def parse_direction(name: str) -> Recipe:
    """The recipe that a name, `KIND:OPTION`, describes.

    Raises:
        UserError: there is no such kind, or the option does not describe a direction.
    """
    kind, _, option = name.partition(":")
    for recipe in KINDS:
        if recipe.kind == kind and option:
            return recipe.parse(option)
    raise UserError(f"Unknown direction {name!r}: write one of {', '.join(recipe.usage for recipe in KINDS)}.")


def recipe_of(direction: Any) -> Recipe | Given:
    """The recipe of a `DirectionLike`. Nothing is read or computed.

    Raises:
        UserError: the argument is no `DirectionLike`.
    """
    if isinstance(direction, str):
        return parse_direction(direction)
    if isinstance(direction, int | np.integer):
        return Random(int(direction))
    if isinstance(direction, Mapping):
        return Given((dict(direction),))
    if isinstance(direction, Recipe | Given):
        return direction
    raise UserError(
        f"A direction cannot be a {type(direction).__name__}: give a tree like the model's parameters, a seed, a name "
        f"such as random:0, or a recipe."
    )


def make_directions(directions: Sequence[DirectionLike], model: Model, storage: str = "exact") -> list[Direction]:
    """The directions of one set, each a tree like `model.params` on the model's mesh.

    A random direction is made orthogonal to the first direction of the set, if it is not the first itself.

    Arguments:
        storage: `exact`, `seed`, `bfloat16` or `int8`, see `jaxscape.directions.random.random_direction`.

    Raises:
        UserError: a direction cannot be made, or does not fit the model.
    """
    made: list[Direction] = []
    for recipe in map(recipe_of, as_list(directions, "directions")):
        if isinstance(recipe, Random):
            first = made[0] if made else None
            made.append(random_direction(model, recipe.seed, orthogonal_to=first, storage=storage))
            continue
        for direction in recipe.make(model):
            placed = on_model_mesh(direction, model)
            made.append(stored(placed, storage) if storage in ("bfloat16", "int8") else placed)
    return made


def prepare(recipe: Recipe | Given, model: Model) -> tuple[Random | Given, list[int | str]]:
    """A direction that can be made without reading files, and what identifies it in a run's configuration.

    Returns:
        A random direction's recipe and its seed; such a direction is made when it is needed. Of any other recipe, the
        directions themselves and a checksum of each.

    Raises:
        UserError: a file or model cannot be read, or does not fit the model.
    """
    if isinstance(recipe, Random):
        return recipe, [recipe.seed]
    made = tuple(recipe.make(model))
    known = recipe.ids if isinstance(recipe, Given) else None
    ids = tuple(map(fingerprint, made)) if known is None else known
    return Given(made, str(recipe), ids), list(ids)


def model_at(model: Model, directions: Sequence[DirectionLike], coords: Sequence[float]) -> Model:
    """The model at a point, θ₀ + Σ cᵢ dᵢ, computed in float32 and rounded once to the parameters' dtype.

    Arguments:
        directions: as in `jaxscape.scan`.
        coords: one coordinate for each direction.

    Raises:
        UserError: there are not as many coordinates as directions, or a direction cannot be made.
    """
    made, coords = make_directions(directions, model), as_list(coords, "coordinates")
    if len(made) != len(coords):
        raise UserError(
            f"There are {len(made)} directions, but {len(coords)} coordinates: give one for each direction."
        )
    if not np.isfinite(coords).all():
        raise UserError(f"The coordinates are {coords}: give finite numbers.")
    params = materialise(model.params, made, jnp.asarray(coords, jnp.float32)) if made else model.params
    return replace(model, params=params)
