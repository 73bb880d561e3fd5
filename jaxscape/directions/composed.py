"""Directions that are made of others: their sum, or the part of one that is orthogonal to or along another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxscape.directions.base import Recipe, check_no_option, check_parts, is_drawn
from jaxscape.directions.storage import Direction, dense_tree, inner
from jaxscape.models.checkpoint import Params
from jaxscape.models.model import Model
from jaxscape.runtime.errors import UserError


@jax.jit
def combine(directions: Sequence[Params], weights: Float[Array, " directions"]) -> Params:
    """The sum of trees of arrays, each multiplied by its weight."""
    return jax.tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *directions)


@dataclass(frozen=True)
class _OfOthers:
    """What the kinds in this file share. The directions that they make are float32 trees."""

    parts: tuple[Recipe, ...]

    kind: ClassVar[str]
    usage: ClassVar[str]
    most: ClassVar[int | None] = 2  # directions in square brackets; None for any number
    is_interpolation: ClassVar[bool] = False
    has_control: ClassVar[bool] = True
    count: ClassVar[int] = 1

    @classmethod
    def compose(cls, parts: tuple[Recipe, ...], option: str) -> Any:
        check_parts(cls, parts, 2, cls.most)
        check_no_option(cls, option)
        return cls(parts)

    @property
    def is_drawn(self) -> bool:
        return all(map(is_drawn, self.parts))

    def __str__(self) -> str:
        return f"{self.kind}:{''.join(f'[{part}]' for part in self.parts)}"

    def _made(self, model: Model) -> list[Params]:
        return [dense_tree(direction) for part in self.parts for direction in part.make(model)]


@dataclass(frozen=True)
class Sum(_OfOthers):
    """`sum:[A][B]…`: the sum of directions, each with the norm that it has."""

    kind: ClassVar[str] = "sum"
    usage: ClassVar[str] = "sum:[DIRECTION][DIRECTION]…"
    most: ClassVar[int | None] = None

    def make(self, model: Model) -> list[Direction]:
        made = self._made(model)
        return [combine(made, jnp.ones(len(made), jnp.float32))]


@dataclass(frozen=True)
class Orthogonal(_OfOthers):
    """`orthogonal:[A][B]`: the part of direction A that is orthogonal to direction B: A − (⟨A, B⟩ / ⟨B, B⟩) B.

    The inner products are those of whole directions. The result is not scaled, so it is shorter than A.
    """

    kind: ClassVar[str] = "orthogonal"
    usage: ClassVar[str] = "orthogonal:[DIRECTION][DIRECTION]"

    def make(self, model: Model) -> list[Direction]:
        first, second = self._made(model)
        along = _along(first, second, self)
        return [combine([first, second], jnp.asarray([1.0, -along], jnp.float32))]


@dataclass(frozen=True)
class Projected(_OfOthers):
    """`projected:[A][B]`: the part of direction A that lies along direction B: (⟨A, B⟩ / ⟨B, B⟩) B.

    The inner products are those of whole directions.
    """

    kind: ClassVar[str] = "projected"
    usage: ClassVar[str] = "projected:[DIRECTION][DIRECTION]"

    def make(self, model: Model) -> list[Direction]:
        first, second = self._made(model)
        return [combine([second], jnp.asarray([_along(first, second, self)], jnp.float32))]


def _along(first: Params, second: Params, recipe: _OfOthers) -> float:
    """⟨A, B⟩ / ⟨B, B⟩."""
    square = inner(second, second)
    if not square > 0:
        raise UserError(f"The direction {recipe.parts[1]} is zero everywhere, so {recipe} has no meaning.")
    return inner(first, second) / square
