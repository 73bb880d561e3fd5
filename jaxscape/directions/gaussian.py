"""Gaussian noise of one standard deviation in every weight."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Key

from jaxscape.directions.noise import standard_normal
from jaxscape.directions.random import Noise, noise_direction
from jaxscape.directions.storage import Direction
from jaxscape.models.model import Model


@dataclass(frozen=True)
class Gaussian(Noise):
    """`gaussian:SEED`: standard normal noise, so that a coordinate is the noise's standard deviation σ.

    The noise is not scaled to any weight. Parameters whose name contains `norm` are not perturbed.
    """

    kind: ClassVar[str] = "gaussian"
    usage: ClassVar[str] = "gaussian:SEED"

    def make(self, model: Model) -> list[Direction]:
        return [noise_direction(model, self.seed, _noise)]


@partial(jax.jit, static_argnums=2)
def _noise(weight: Float[Array, "*shape"], key: Key[Array, ""], sharding: NamedSharding) -> Float[Array, "*shape"]:
    return standard_normal(key, weight.shape, sharding).astype(weight.dtype)
