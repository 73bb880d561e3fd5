"""The registry of kinds of directions, and the one way to name a direction on the command line, in Python and in files.

A direction's name is `KIND` or `KIND:OPTION`, for example `random:0`, `file:direction.safetensors` or `to:MODEL`. The
name of one that is made of others has theirs in square brackets: `orthogonal:[random:0][file:d.safetensors]`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxscape.directions.base import (
    ComposedRecipe,
    Recipe,
    SimpleRecipe,
    is_drawn,
    parts_of,
    settled,
    split_parts,
)
from jaxscape.directions.composed import Orthogonal, Projected, Sum
from jaxscape.directions.control import Control
from jaxscape.directions.difference import From, To
from jaxscape.directions.files import File, check_direction
from jaxscape.directions.filters import Filter
from jaxscape.directions.gaussian import Gaussian
from jaxscape.directions.gradient import Gradient
from jaxscape.directions.hessian import Hessian
from jaxscape.directions.low_rank import LowRank, check_rank
from jaxscape.directions.masks import Mask, Masked
from jaxscape.directions.norms import TensorNorm, WeightNorm
from jaxscape.directions.point import materialise
from jaxscape.directions.principal import Principal
from jaxscape.directions.quantisation import Quantisation
from jaxscape.directions.random import Random, random_direction
from jaxscape.directions.refusal import Refusal
from jaxscape.directions.relative import Relative
from jaxscape.directions.restricted import Restricted
from jaxscape.directions.singular import Singular
from jaxscape.directions.sparse import Sparse
from jaxscape.directions.stacked import rank_of
from jaxscape.directions.storage import Direction, check_storage, in_host_memory, on_model_mesh, stored
from jaxscape.directions.worst_case import WorstCase
from jaxscape.models.checkpoint import Params, fingerprint
from jaxscape.models.model import Model
from jaxscape.runtime.errors import UserError, as_list
from jaxscape.runtime.files import checksum
from jaxscape.runtime.texts import did_you_mean

KINDS: tuple[type[SimpleRecipe], ...] = (
    Random,
    Gaussian,
    Relative,
    Filter,
    Sparse,
    LowRank,
    File,
    To,
    From,
    Quantisation,
    Principal,
    Gradient,
    WorstCase,
    Hessian,
    Refusal,
    Mask,
    Singular,
)
"""All kinds of directions that are made of no other. A new kind is one more class here."""

COMPOSED_KINDS: tuple[type[ComposedRecipe], ...] = (
    Sum,
    Orthogonal,
    Projected,
    Restricted,
    Masked,
    WeightNorm,
    TensorNorm,
    Control,
)
"""All kinds of directions that are made of others."""


@dataclass(frozen=True, eq=False)
class Given:
    """Directions that are already made, by the caller or by the recipe of this name.

    Attributes:
        ids: what identifies each direction; None for checksums of their tensors, which were not computed yet.
    """

    directions: tuple[Params, ...]
    name: str = "given"
    ids: tuple[str, ...] | None = None

    kind: ClassVar[str] = "given"
    usage: ClassVar[str] = "given"
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


DirectionLike = Mapping[str, Any] | int | np.integer | str | Recipe
"""A direction as `scan` and `model_at` take it: a tree like `model.params`, the seed of a random direction, a name such
as `random:0`, or a recipe."""


def parse_direction(name: str) -> Recipe:
    """The recipe that a name describes.

    Raises:
        UserError: there is no such kind, or the name does not describe a direction.
    """
    kind, _, rest = name.partition(":")
    for simple in KINDS:
        if simple.kind == kind:
            return simple.parse(rest)
    for composed in COMPOSED_KINDS:
        if composed.kind == kind:
            parts, option = split_parts(rest)
            return composed.compose(tuple(map(parse_direction, parts)), option)
    usages = {known.kind: known.usage for known in (*KINDS, *COMPOSED_KINDS)}
    raise UserError(
        f"Unknown direction {name!r}{did_you_mean(kind, usages, usages)}: write one of {', '.join(usages.values())}."
    )


def recipe_of(direction: Any) -> Recipe:
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
    if isinstance(direction, Recipe):
        return direction
    raise UserError(
        f"A direction cannot be a {type(direction).__name__}: give a tree like the model's parameters, a seed, a name "
        f"such as random:0, or a recipe."
    )


def make_directions(
    directions: Sequence[DirectionLike], model: Model, storage: str = "exact", are_streamed: bool = False
) -> list[Direction]:
    """The directions of one set, each a tree like `model.params` on the model's mesh.

    A random direction is made orthogonal to the first direction of the set, if it is not the first itself.

    Arguments:
        storage: `exact`, `seed`, `bfloat16` or `int8`, see `jaxscape.directions.random.random_direction`.
        are_streamed: whether arrays that are in host memory stay there, because each tensor is sent to the devices
            where it is used.

    Raises:
        UserError: a direction cannot be made, or does not fit the model, or there is no such storage.
    """
    check_storage(storage)
    made: list[Direction] = []
    for recipe in map(recipe_of, as_list(directions, "directions")):
        if isinstance(recipe, Random):
            first = made[0] if made else None
            made.append(random_direction(model, recipe.seed, orthogonal_to=first, storage=storage))
            continue
        for direction in recipe.make(model):
            placed = on_model_mesh(direction, model, are_streamed)
            made.append(stored(placed, storage) if storage in ("bfloat16", "int8") else placed)
    return made


@dataclass(frozen=True)
class Prepared:
    """A direction that can be made without reading files and without long computations.

    Attributes:
        recipe: what makes it.
        ids: what identifies each direction in a run's configuration: a seed, a name, a checksum of its tensors, or one
            of what it was computed from.
    """

    recipe: Recipe
    ids: tuple[int | str, ...]

    def ids_as_in(self, recorded: Any) -> tuple[int | str, ...]:
        """`ids`, or the checksums of the tensors if a run recorded those, as runs did that are older than checksums of
        what directions are computed from.

        Arguments:
            recorded: the value of `directions` in the run's configuration; None if there is no run.
        """
        known = set(_flat(recorded))
        if not known or known.issuperset(self.ids):
            return self.ids
        former = _checksums(self.recipe) or self.ids
        return former if known.issuperset(former) else self.ids


def _flat(recorded: Any) -> Iterator[int | str]:
    """What identifies directions, in nested lists."""
    if isinstance(recorded, list):
        for item in recorded:
            yield from _flat(item)
    elif isinstance(recorded, int | str):
        yield recorded


def _checksums(recipe: Recipe) -> tuple[str, ...] | None:
    """The checksums of the tensors of directions that are made, or what their controls have of them; else None."""
    if isinstance(recipe, Given):
        return tuple(map(fingerprint, recipe.directions))
    if isinstance(recipe, Control) and (of := _checksums(recipe.of)) is not None:
        return _control_ids(of, recipe.seed)
    return None


def _control_ids(ids: Iterable[int | str], seed: int) -> tuple[str, ...]:
    return tuple(f"{Control.kind}:{identity}:{seed}" for identity in ids)


def prepare(sets: Sequence[Sequence[Recipe]], model: Model) -> list[list[Prepared]]:
    """The directions of a scan's sets, prepared once each.

    A direction that follows quickly from its name and the weights is made when its set's turn comes. Any other is made
    here, once, also when a control needs it too. It then waits in host memory, so that the devices hold the directions
    of one set at a time.

    Raises:
        UserError: a file or model cannot be read, or does not fit the model.
    """
    known: dict[str, Prepared] = {}

    def prepared(recipe: Recipe) -> Prepared:
        name = str(recipe)
        if isinstance(recipe, Given):
            ids = tuple(map(fingerprint, recipe.make(model))) if recipe.ids is None else recipe.ids
            return Prepared(replace(recipe, ids=ids), ids)
        if isinstance(recipe, Random):
            return Prepared(recipe, (recipe.seed,))
        if isinstance(recipe, Control):
            of = prepared(recipe.of)
            return Prepared(replace(recipe, of=of.recipe), _control_ids(of.ids, recipe.seed))
        if isinstance(recipe, LowRank):
            check_rank(recipe.rank, model)
        if is_drawn(recipe):
            return Prepared(recipe, (name,))
        if name not in known:
            known[name] = prepared(_made(recipe, model))
        return known[name]

    return [[prepared(recipe) for recipe in item] for item in sets]


def _made(recipe: Recipe, model: Model) -> Given:
    """The directions of a recipe, in host memory, with what identifies them."""
    chosen = settled(recipe, model)
    made, sources = chosen.make(model), list(_sources(chosen))
    if any(hasattr(source, "made_from") for source in sources):
        origin = (str(chosen), fingerprint(model.params), [_origin(source, model) for source in sources])
        ids = tuple(checksum((*origin, i)) for i in range(len(made)))
    else:
        ids = tuple(map(fingerprint, made))
    return Given(tuple(map(in_host_memory, made)), str(recipe), ids)


def _sources(recipe: Recipe) -> Iterator[Recipe]:
    """The recipes that are made of no other, of which a recipe is made; the recipe itself if it is one."""
    parts = parts_of(recipe)
    if not parts:
        yield recipe
    for part in parts:
        yield from _sources(part)


def _origin(recipe: Any, model: Model) -> Any:
    """What identifies the directions of a recipe that is made of no other, beside its name and the weights."""
    if hasattr(recipe, "made_from"):
        return recipe.made_from(model)
    return None if is_drawn(recipe) or isinstance(recipe, Random) else list(map(fingerprint, recipe.make(model)))


def num_stored(recipes: Iterable[Recipe]) -> tuple[int, int]:
    """How many directions of a set are stored with all their tensors: those that wait in host memory until the set's
    turn comes, and those that are made then. Random directions, directions that are known to be of low rank, and those
    that the caller has put on the devices are not counted."""
    waiting = made = 0
    for recipe in recipes:
        if isinstance(recipe, Random) or None not in _ranks_of(recipe, None):
            continue
        if isinstance(recipe, Given):
            waiting += sum(any(isinstance(x, np.ndarray) for x in jax.tree.leaves(d)) for d in recipe.directions)
        elif is_drawn(recipe):
            made += recipe.count
        else:
            waiting += recipe.count
    return waiting, made


def direction_counts(sets: Iterable[Sequence[Recipe]]) -> dict[str, int]:
    """The largest number of directions of one set, by the name that `Workload` has for it: `num_random`, those that are
    random; `num_waiting` and `num_made`, see `num_stored`."""
    counts = [(sum(isinstance(recipe, Random) for recipe in item), *num_stored(item)) for item in sets]
    return dict(zip(("num_random", "num_waiting", "num_made"), map(max, zip(*counts, strict=True)), strict=True))


def largest_rank(recipes: Iterable[Recipe], model: Model | None = None) -> int | None:
    """The largest rank of the directions that recipes make; None if one is not known to be of low rank.

    Arguments:
        model: for recipes that are not prepared, the model that decides their rank; it may lack its weights.
    """
    ranks = [rank for recipe in recipes for rank in _ranks_of(recipe, model)]
    return None if None in ranks else max(rank for rank in ranks if rank is not None)


def _ranks_of(recipe: Recipe, model: Model | None) -> list[int | None]:
    """The rank of each direction that a recipe makes, or None where it is not known to be of low rank."""
    if isinstance(recipe, Given):
        return [rank_of(direction) for direction in recipe.directions]
    if isinstance(recipe, Control | WeightNorm | TensorNorm):
        return _ranks_of(recipe.of, model)
    if isinstance(recipe, LowRank):
        return [recipe.rank]
    rank_in: Callable[[Model], int | None] | None = getattr(recipe, "rank_in", None)
    return [None if rank_in is None or model is None else rank_in(model)] * recipe.count


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
