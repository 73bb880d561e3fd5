"""Gaussian noise in units of the weights that it perturbs."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Key

from jaxscape.directions.noise import standard_normal
from jaxscape.directions.random import Noise, noise_direction
from jaxscape.directions.storage import Direction
from jaxscape.directions.sums import tensor_norm
from jaxscape.models.model import Model


@dataclass(frozen=True)
class Relative(Noise):
    """`relative-gaussian:SEED`: independent Gaussian noise, in each tensor with a standard deviation of the tensor's
    root mean square, so that a coordinate is σ in units of the weights.

    The layer-normalised direction of the same seed is this noise with each tensor scaled to exactly the norm of the
    weights; the two differ by the chance in the norm of noise. Parameters whose name contains `norm` are not perturbed.
    """

    kind: ClassVar[str] = "relative-gaussian"
    usage: ClassVar[str] = "relative-gaussian:SEED"

    def make(self, model: Model) -> list[Direction]:
        return [noise_direction(model, self.seed, _noise)]


@partial(jax.jit, static_argnums=2)
def _noise(weight: Float[Array, "*shape"], key: Key[Array, ""], sharding: NamedSharding) -> Float[Array, "*shape"]:
    scale = tensor_norm(weight.astype(jnp.float32)) / weight.size**0.5
    return (scale * standard_normal(key, weight.shape, sharding)).astype(weight.dtype)
