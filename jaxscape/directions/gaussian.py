"""Gaussian noise of one standard deviation in every weight."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Key

from jaxscape.directions.random import noise_direction, seed_of
from jaxscape.directions.storage import Direction, standard_normal
from jaxscape.models.model import Model
from jaxscape.runtime.errors import check_seed


@dataclass(frozen=True)
class Gaussian:
    """`gaussian:SEED`: standard normal noise, so that a coordinate is the noise's standard deviation σ.

    The noise is not scaled to any weight. Parameters whose name contains `norm` are not perturbed.
    """

    seed: int

    def __post_init__(self) -> None:
        check_seed(self.seed)

    kind: ClassVar[str] = "gaussian"
    usage: ClassVar[str] = "gaussian:SEED"
    is_interpolation: ClassVar[bool] = False
    is_drawn: ClassVar[bool] = True
    count: ClassVar[int] = 1

    @classmethod
    def parse(cls, option: str) -> "Gaussian":
        return cls(seed_of(cls, option))

    def __str__(self) -> str:
        return f"{self.kind}:{self.seed}"

    def make(self, model: Model) -> list[Direction]:
        return [noise_direction(model, self.seed, _noise)]


@partial(jax.jit, static_argnums=2)
def _noise(weight: Float[Array, "*shape"], key: Key[Array, ""], sharding: NamedSharding) -> Float[Array, "*shape"]:
    return standard_normal(key, weight.shape, sharding).astype(weight.dtype)
