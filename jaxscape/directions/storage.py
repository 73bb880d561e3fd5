"""How the tensors of a direction are stored: as arrays, in fewer bits, or as a seed from which they are drawn again."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Key, Shaped

from jaxscape.directions.sums import tensor_norm
from jaxscape.models.checkpoint import Params, named_leaves, tree_of
from jaxscape.models.model import Model

Direction = Params
"""A tree like the parameters, whose leaves are arrays, `Scaled` or `Seeded` tensors."""


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclass(frozen=True)
class Scaled:
    """A tensor in fewer bits: bfloat16 or int8 values, multiplied by one float32 number.

    The fields may be `jax.ShapeDtypeStruct`s, when only the shapes matter.
    """

    values: Shaped[Any, "*shape"]
    scale: Float[Any, ""]

    def dense(self) -> Float[Array, "*shape"]:
        """The tensor, float32."""
        return self.values.astype(jnp.float32) * self.scale


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "scale", "other", "along"],
    meta_fields=["shape", "dtype", "sharding"],
)
@dataclass(frozen=True)
class Seeded:
    """A tensor of a random direction that is not stored: it is drawn wherever it is used.

    The fields may be `jax.ShapeDtypeStruct`s, when only the shapes matter.

    Attributes:
        scale: float32, the factor that gives the noise its norm.
        other, along: a tensor and a float32 factor. `along` × `other` is subtracted from the noise, which makes them
            orthogonal. Both are None if nothing is subtracted.
        dtype: the dtype that the tensor is rounded to.
        sharding: the devices that draw the tensor, each its own part.
    """

    key: Key[Any, ""]
    scale: Float[Any, ""]
    other: "Array | Scaled | Seeded | None"
    along: Float[Any, ""] | None
    shape: tuple[int, ...]
    dtype: str
    sharding: NamedSharding

    def dense(self) -> Float[Array, "*shape"]:
        """The tensor, float32."""
        noise = standard_normal(self.key, self.shape, self.sharding)
        if self.other is not None and self.along is not None:
            noise = noise - self.along * dense(self.other)
        return (noise * self.scale).astype(self.dtype).astype(jnp.float32)


def dense(tensor: "Array | Scaled | Seeded") -> Float[Array, "*shape"]:
    """A direction's tensor in float32, however it is stored."""
    return tensor.astype(jnp.float32) if isinstance(tensor, jax.Array) else tensor.dense()


def standard_normal(key: Key[Array, ""], shape: tuple[int, ...], sharding: NamedSharding) -> Float[Array, "*shape"]:
    """Standard normal noise in float32, with the same values under every sharding."""
    return jax.lax.with_sharding_constraint(jax.random.normal(key, shape, jnp.float32), sharding)


def stored(direction: Direction, storage: str) -> Direction:
    """A direction with its tensors rounded to `bfloat16` or `int8`, and scaled to the norms that they had.

    The result is a different direction: landscapes along it are exact, but not those of the original direction.
    """
    return jax.tree.map(lambda tensor: rounded(tensor, storage), direction)


@partial(jax.jit, static_argnums=1)
def rounded(tensor: Float[Array, "*shape"], storage: str) -> Scaled:
    """A tensor rounded to `bfloat16` or `int8`, with the norm that it had."""
    tensor = tensor.astype(jnp.float32)
    if storage == "int8":
        highest = jnp.abs(tensor).max()
        values = jnp.round(tensor * (127 / jnp.where(highest > 0, highest, 1))).astype(jnp.int8)
    else:
        values = tensor.astype(jnp.bfloat16)
    norm = tensor_norm(values.astype(jnp.float32))
    return Scaled(values, tensor_norm(tensor) / jnp.where(norm > 0, norm, 1.0))


def on_model_mesh(direction: Direction, model: Model) -> Direction:
    """The direction with its arrays sharded as the model's parameters are."""
    shardings = named_leaves(model.shardings)
    return tree_of(
        {
            name: jax.device_put(tensor, shardings[name]) if isinstance(tensor, jax.Array | np.ndarray) else tensor
            for name, tensor in named_leaves(direction).items()
        }
    )
