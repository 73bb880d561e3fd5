"""Random controls: what a direction of the same norm and rank does that knows nothing of the model."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Key

from jaxscape.directions.base import Recipe, check_parts, default_radius
from jaxscape.directions.low_rank import gaussian_factors
from jaxscape.directions.names import CONTROL
from jaxscape.directions.noise import standard_normal
from jaxscape.directions.norms import tensor_norms
from jaxscape.directions.random import scaled_to_norm, seed_of, tensor_key
from jaxscape.directions.storage import Direction, Factored, factored
from jaxscape.directions.sums import tensor_norm
from jaxscape.models.checkpoint import named_leaves, tree_of
from jaxscape.models.model import Model
from jaxscape.runtime.errors import check_seed


@dataclass(frozen=True)
class Control:
    """`control:[A]` or `control:[A]:SEED`: a random direction whose tensors have the norms and ranks of direction A's.

    A tensor that is stored as factors of rank r has a control of Gaussian factors of rank r; any other has one of
    Gaussian noise, that of `random:SEED`. Where A does not change a tensor, its control does not either.
    """

    of: Recipe
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)

    kind: ClassVar[str] = CONTROL
    usage: ClassVar[str] = "control:[DIRECTION][:SEED]"
    is_interpolation: ClassVar[bool] = False

    @classmethod
    def compose(cls, parts: tuple[Recipe, ...], option: str) -> "Control":
        check_parts(cls, parts, 1, 1)
        return cls(parts[0], seed_of(cls, option)) if option else cls(parts[0])

    @property
    def axis_radius(self) -> float:
        return default_radius(self.of)

    @property
    def count(self) -> int:
        return self.of.count

    def __str__(self) -> str:
        return f"{self.kind}:[{self.of}]" + (f":{self.seed}" if self.seed else "")

    def make(self, model: Model) -> list[Direction]:
        return [control_of(direction, model, self.seed + i) for i, direction in enumerate(self.of.make(model))]


def control_of(direction: Direction, model: Model, seed: int) -> Direction:
    """A random direction whose tensors have the norms and ranks of another's, see `Control`."""
    norms, shardings, weights = tensor_norms(direction), named_leaves(model.shardings), named_leaves(model.params)

    def tensor(name: str, leaf: object) -> object:
        norm, key = jnp.float32(norms[name]), tensor_key(seed, name)
        if isinstance(leaf, Factored):
            if leaf.rank == 0:
                return leaf
            left, right = _factors(leaf, key, norm)
            return factored(left, right, shardings[name])
        return _noise(weights[name], key, norm, shardings[name])

    return tree_of({name: tensor(name, leaf) for name, leaf in named_leaves(direction).items()})


@jax.jit
def _factors(
    leaf: Factored, key: Key[Array, ""], norm: Float[Array, ""]
) -> tuple[Float[Array, "out rank"], Float[Array, "rank *in"]]:
    """Gaussian factors of the same shapes, whose product has a norm."""
    left, right = gaussian_factors(key, leaf.left.shape, leaf.right.shape)
    found = tensor_norm(Factored(left, right).dense())
    return left * (norm / jnp.where(found > 0, found, 1.0)), right


@partial(jax.jit, static_argnums=3)
def _noise(
    weight: Float[Array, "*shape"], key: Key[Array, ""], norm: Float[Array, ""], sharding: NamedSharding
) -> Float[Array, "*shape"]:
    return scaled_to_norm(standard_normal(key, weight.shape, sharding), norm).astype(weight.dtype)
