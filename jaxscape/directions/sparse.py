"""Random directions that change few of the weights."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Key

from jaxscape.directions.base import exact_text, needs_option
from jaxscape.directions.noise import standard_normal
from jaxscape.directions.random import noise_direction, scaled_to_norm, seed_of
from jaxscape.directions.storage import Direction
from jaxscape.directions.sums import tensor_norm
from jaxscape.models.model import Model
from jaxscape.runtime.errors import UserError, check_seed


@dataclass(frozen=True)
class Sparse:
    """`sparse:FRACTION:SEED`: Gaussian noise in a random fraction of the weights, and zero in the others.

    Each tensor has the norm of the one that it perturbs, so fewer weights move further. Each weight is drawn with the
    probability `FRACTION`, independently. The noise itself is that of `random:SEED`. Parameters whose name contains
    `norm` are not perturbed.
    """

    fraction: float
    seed: int

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not 0 < self.fraction <= 1:
            raise UserError(f"The fraction of a sparse direction is above 0 and at most 1, not {self.fraction}.")

    kind: ClassVar[str] = "sparse"
    usage: ClassVar[str] = "sparse:FRACTION:SEED"
    is_interpolation: ClassVar[bool] = False
    is_drawn: ClassVar[bool] = True
    units: ClassVar[tuple[str, ...]] = ("tensors", "weights")
    count: ClassVar[int] = 1

    @classmethod
    def parse(cls, option: str) -> "Sparse":
        fraction, _, seed = needs_option(cls, option).partition(":")
        try:
            number = float(fraction)
        except ValueError:
            raise UserError(
                f"The fraction of a sparse direction is a number, not {fraction!r}: write {cls.usage}."
            ) from None
        return cls(number, seed_of(cls, seed))

    def __str__(self) -> str:
        return f"{self.kind}:{exact_text(self.fraction)}:{self.seed}"

    def make(self, model: Model) -> list[Direction]:
        return [noise_direction(model, self.seed, partial(_sparse, jnp.float32(self.fraction)))]


@partial(jax.jit, static_argnums=3)
def _sparse(
    fraction: Float[Array, ""], weight: Float[Array, "*shape"], key: Key[Array, ""], sharding: NamedSharding
) -> Float[Array, "*shape"]:
    uniform = jax.lax.with_sharding_constraint(
        jax.random.uniform(jax.random.fold_in(key, 1), weight.shape, jnp.float32), sharding
    )
    noise = jnp.where(uniform < fraction, standard_normal(key, weight.shape, sharding), 0)
    return scaled_to_norm(noise, tensor_norm(weight.astype(jnp.float32))).astype(weight.dtype)
