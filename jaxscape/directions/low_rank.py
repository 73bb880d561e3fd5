"""Random directions of low rank, which cost hardly more than the model itself."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Key

from jaxscape.directions.norms import weight_norms
from jaxscape.directions.random import tensor_key
from jaxscape.directions.storage import Direction, factored, zero_tensor
from jaxscape.models.checkpoint import named_leaves, tree_of
from jaxscape.models.model import Model
from jaxscape.models.weights import is_norm
from jaxscape.runtime.errors import UserError, check_seed
from jaxscape.runtime.sharding import replicated


def low_rank_direction(model: Model, rank: int, seed: int) -> Direction:
    """A random direction whose matrices have rank `rank`.

    Each matrix W [out, in] of the model moves along s A B, where A [out, rank] and B [rank, in] are Gaussian noise and
    s gives the product the norm of W. All other tensors, and those whose names contain `norm`, do not move. The factors
    of a tensor depend only on the seed, the parameter's name and its shape. (Evolution strategies perturb weights in
    this way: Sarkar et al., arXiv 2511.16652.)

    Arguments:
        seed: from 0 to 2³² − 1.

    Returns:
        A tree like `model.params` whose leaves are `Factored` tensors, with factors in the parameters' dtypes.

    Raises:
        UserError: the rank is below 1 or above the smaller dimension of a matrix, or the seed is out of range.
    """
    check_rank(rank, model)
    shardings = named_leaves(model.shardings)
    shapes = {name: weight.shape for name, weight in named_leaves(model.params).items()}
    matrices = _matrices(model)
    norms, everywhere = weight_norms(model), replicated(model.mesh)
    direction = {name: zero_tensor(shape, shardings[name]) for name, shape in shapes.items() if name not in matrices}
    for name, shape in matrices.items():
        left, right = _factors(tensor_key(seed, name), jnp.float32(norms[name]), shape, rank, model.dtype, everywhere)
        direction[name] = factored(left, right, shardings[name])
    return tree_of(direction)


def _matrices(model: Model) -> dict[str, tuple[int, int]]:
    """The shapes of the matrices that a low-rank direction moves."""
    leaves = named_leaves(model.params)
    return {name: leaf.shape for name, leaf in leaves.items() if leaf.ndim == 2 and not is_norm(name)}


def check_rank(rank: int, model: Model) -> None:
    """Raise a `UserError` if the matrices of a direction for this model cannot all have this rank."""
    name, shape = min(_matrices(model).items(), key=lambda item: min(item[1]))
    if not 1 <= rank <= min(shape):
        raise UserError(
            f"A direction of rank {rank} is not possible, because {name} has the shape {shape}: give a rank from 1 to "
            f"{min(shape)}."
        )


@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _factors(
    key: Key[Array, ""],
    norm: Float[Array, ""],
    shape: tuple[int, int],
    rank: int,
    dtype: str,
    everywhere: NamedSharding,
) -> tuple[Float[Array, "out rank"], Float[Array, "rank in"]]:
    """Gaussian factors of a matrix with this norm.

    Every device computes all of both factors, so their bits do not depend on the mesh.
    """
    factors = gaussian_factors(key, (shape[0], rank), (rank, shape[1]))
    left, right = (jax.lax.with_sharding_constraint(factor, everywhere) for factor in factors)
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    # |A B|² is the sum of the entries of (AᵀA) ∘ (B Bᵀ), which takes less time than A B.
    square = (product(left.T, left) * product(right, right.T)).sum()
    return (left * (norm / jnp.sqrt(square))).astype(dtype), right.astype(dtype)


def gaussian_factors(
    key: Key[Array, ""], left: tuple[int, ...], right: tuple[int, ...]
) -> tuple[Float[Array, "out rank"], Float[Array, "rank *in"]]:
    """Standard normal noise in two float32 factors of these shapes."""
    first, second = jax.random.split(key)
    return jax.random.normal(first, left, jnp.float32), jax.random.normal(second, right, jnp.float32)


@dataclass(frozen=True)
class LowRank:
    """`low-rank:RANK:SEED`: the random direction of a rank and a seed."""

    rank: int
    seed: int

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.rank < 1:
            raise UserError(f"The rank of the direction {self} must be at least 1.")

    kind: ClassVar[str] = "low-rank"
    usage: ClassVar[str] = "low-rank:RANK:SEED"
    is_interpolation: ClassVar[bool] = False
    is_drawn: ClassVar[bool] = True
    units: ClassVar[tuple[str, ...]] = ("tensors",)
    count: ClassVar[int] = 1

    @classmethod
    def parse(cls, option: str) -> "LowRank":
        rank, _, seed = option.partition(":")
        if not (rank.isdecimal() and seed.isdecimal()):
            raise UserError(
                f"The direction 'low-rank:{option}' has no rank or no seed: write {cls.usage}, for example "
                f"low-rank:1:0."
            )
        return cls(int(rank), int(seed))

    def __str__(self) -> str:
        return f"{self.kind}:{self.rank}:{self.seed}"

    def make(self, model: Model) -> list[Direction]:
        return [low_rank_direction(model, self.rank, self.seed)]
