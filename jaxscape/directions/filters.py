"""Random, filter-normalised directions."""

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
class Filter(Noise):
    """`filter:SEED`: Gaussian noise in which each filter has the norm of the filter that it perturbs.

    This is the filter normalisation of Li et al. (arXiv 1712.09913). The filters of a matrix are its rows, the weights
    of one output each; those of an embedding are the vectors of its tokens. A vector, such as a bias, is one filter.
    The noise itself is that of `random:SEED`. Parameters whose name contains `norm` are not perturbed.
    """

    kind: ClassVar[str] = "filter"
    usage: ClassVar[str] = "filter:SEED"
    units: ClassVar[tuple[str, ...]] = ("tensors", "weights")

    def make(self, model: Model) -> list[Direction]:
        return [noise_direction(model, self.seed, _filters)]


@partial(jax.jit, static_argnums=2)
def _filters(weight: Float[Array, "*shape"], key: Key[Array, ""], sharding: NamedSharding) -> Float[Array, "*shape"]:
    noise = standard_normal(key, weight.shape, sharding)
    norms, targets = _filter_norms(noise), _filter_norms(weight.astype(jnp.float32))
    return (noise * (targets / jnp.where(norms > 0, norms, 1.0))).astype(weight.dtype)


def _filter_norms(tensor: Float[Array, "*shape"]) -> Float[Array, "..."]:
    """The norm of each row, or of a vector, in a shape that broadcasts against the tensor."""
    return jax.vmap(tensor_norm)(tensor)[:, None] if tensor.ndim == 2 else tensor_norm(tensor)
