"""Low-rank directions of several sets, stacked so that each point of a batch can lie along directions of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxscape.directions.storage import Direction, Factored
from jaxscape.models.checkpoint import named_leaves


class StackedFactors(NamedTuple):
    """Matrices as the products leftᵀ right of their factors, each with its rank as the second dimension.

    The fields may be `jax.ShapeDtypeStruct`s, when only the shapes matter.
    """

    left: Float[Any, "number rank out"]
    right: Float[Any, "number rank in"]


@partial(jax.tree_util.register_dataclass, data_fields=["tensors"], meta_fields=["ndim"])
@dataclass(frozen=True)
class Stacked:
    """D low-rank directions, `ndim` of each direction set, set by set.

    A point has D coordinates, which are 0 along all directions but those of one set.

    Attributes:
        tensors: by the names of the matrices that move, the factors of all directions.
    """

    tensors: dict[str, StackedFactors]
    ndim: int

    def at(self, coords: Float[Array, "points number"]) -> dict[str, StackedFactors]:
        """For each point, Σ cᵢ dᵢ as factors [points, ndim × rank, …], by the names of the matrices that move."""
        by_set = coords.reshape(len(coords), -1, self.ndim)
        own = (by_set != 0).any(-1).argmax(-1)
        scales = jnp.take_along_axis(by_set, own[:, None, None], axis=1)[:, 0, :, None, None]

        def gathered(factor: Float[Array, "number rank width"]) -> Float[Array, "points ndim rank width"]:
            return factor.reshape(-1, self.ndim, *factor.shape[1:])[own]

        def joined(factor: Float[Array, "points ndim rank width"]) -> Float[Array, "points ndim_rank width"]:
            return factor.reshape(len(own), -1, factor.shape[-1])

        return {
            name: StackedFactors(
                joined((scales * gathered(left).astype(jnp.float32)).astype(left.dtype)), joined(gathered(right))
            )
            for name, (left, right) in self.tensors.items()
        }


def rank_of(direction: Direction) -> int | None:
    """The largest rank of a direction's matrices, if it moves nothing but matrices that are stored as factors; else
    None."""
    ranks = []
    for tensor in named_leaves(direction).values():
        if not isinstance(tensor, Factored) or (tensor.rank and len(tensor.shape) != 2):
            return None
        ranks.append(tensor.rank)
    return max(ranks)


def stack(directions: Sequence[Direction], ndim: int) -> Stacked:
    """The stacked directions, in the dtype of their factors.

    Arguments:
        directions: directions that `rank_of` gives a rank, `ndim` of each set, set by set.
    """
    by_direction = [named_leaves(direction) for direction in directions]
    tensors = {}
    for name in by_direction[0]:
        factors = [direction[name] for direction in by_direction]
        if rank := max(factor.rank for factor in factors):
            tensors[name] = _stacked(factors, rank)
    return Stacked(tensors, ndim)


@partial(jax.jit, static_argnums=1)
def _stacked(tensors: list[Factored], rank: int) -> StackedFactors:
    """Factors of matrices, filled with zeros up to a common rank."""

    def filled(factor: Float[Array, "own width"]) -> Float[Array, "rank width"]:
        return jnp.pad(factor, ((0, rank - len(factor)), (0, 0)))

    return StackedFactors(
        jnp.stack([filled(tensor.left.T) for tensor in tensors]), jnp.stack([filled(t.right) for t in tensors])
    )
