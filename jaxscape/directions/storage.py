"""How the tensors of a direction are stored: as arrays, as factors, in fewer bits, or as a seed from which they are
drawn again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key, Shaped

from jaxscape.directions.noise import standard_normal
from jaxscape.directions.sums import order_free_sum, tensor_norm
from jaxscape.models.checkpoint import Params, named_leaves, tree_of
from jaxscape.models.model import Model
from jaxscape.runtime.errors import unknown_name

STORAGES = ("exact", "seed", "bfloat16", "int8")

Direction = Params
"""A tree like the parameters, whose leaves are arrays, `Factored`, `Scaled` or `Seeded` tensors."""


@partial(jax.tree_util.register_dataclass, data_fields=["left", "right"], meta_fields=[])
@dataclass(frozen=True)
class Factored:
    """A tensor of low rank: the product of two factors. With rank 0, it is zero and takes no memory.

    The fields may be `jax.ShapeDtypeStruct`s, when only the shapes matter.

    Attributes:
        right: [rank, in] for a matrix; [rank] for a vector.
    """

    left: Float[Any, "out rank"]
    right: Float[Any, "rank *in"]

    @property
    def rank(self) -> int:
        return int(self.right.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.left.shape[0], *self.right.shape[1:])

    def dense(self) -> Float[Array, "*shape"]:
        """The tensor, float32, with the same bits on every mesh.

        It is a sum over the rank in a fixed order, because the order in a matrix product may depend on the shapes of
        the shards.
        """
        left, right = self.left.astype(jnp.float32), self.right.astype(jnp.float32)
        left = left.reshape(*left.shape, *(1,) * (right.ndim - 1))

        def add(k: Any, total: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
            return total + left[:, k] * right[k]

        zero = jnp.zeros(self.shape, jnp.float32)
        return jax.lax.fori_loop(0, self.rank, add, zero, unroll=min(self.rank, 8)) if self.rank else zero


def factored(left: Float[Any, "out rank"], right: Float[Any, "rank *in"], sharding: NamedSharding) -> Factored:
    """The product of two factors, on the devices that hold a tensor with this sharding, sharded as its dimensions
    are."""
    by_row, by_column = factor_shardings(sharding)
    return Factored(jax.device_put(left, by_row), jax.device_put(right, by_column))


def factor_shardings(sharding: NamedSharding) -> tuple[NamedSharding, NamedSharding]:
    """The shardings of the factors of a tensor with this sharding."""
    first, *others = (*sharding.spec, None)[: max(1, len(sharding.spec))]
    by_row = NamedSharding(sharding.mesh, PartitionSpec(first))
    return by_row, NamedSharding(sharding.mesh, PartitionSpec(None, *others))


def zero_tensor(shape: tuple[int, ...], sharding: NamedSharding) -> Factored:
    """A tensor of zeros that takes no memory."""
    return factored(np.zeros((shape[0], 0), np.float32), np.zeros((0, *shape[1:]), np.float32), sharding)


def concatenated(tensors: Sequence[Any]) -> Any:
    """Tensors with the same last dimension, one below the other: factored if all of them are, else an array."""
    if not all(isinstance(tensor, Factored) for tensor in tensors):
        return jnp.concatenate([t if isinstance(t, jax.Array | np.ndarray) else dense(t) for t in tensors])
    right = jnp.concatenate([tensor.right for tensor in tensors])
    starts = np.cumsum([0, *(tensor.rank for tensor in tensors)])
    lefts = [
        jnp.pad(tensor.left, ((0, 0), (start, len(right) - start - tensor.rank)))
        for tensor, start in zip(tensors, starts[:-1].tolist(), strict=True)
    ]
    return Factored(jnp.concatenate(lefts), right)


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclass(frozen=True)
class Scaled:
    """A tensor in fewer bits: bfloat16 or int8 values, multiplied by one float32 number.

    The fields may be `jax.ShapeDtypeStruct`s, when only the shapes matter.
    """

    values: Shaped[Any, "*shape"]
    scale: Float[Any, ""]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

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
    other: "Array | Factored | Scaled | Seeded | None"
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


def dense(tensor: Array | np.ndarray | Factored | Scaled | Seeded) -> Float[Array, "*shape"]:
    """A direction's tensor in float32, however it is stored."""
    return jnp.asarray(tensor, jnp.float32) if isinstance(tensor, jax.Array | np.ndarray) else tensor.dense()


def dense_tree(direction: Direction) -> Params:
    """The direction as a tree of float32 arrays."""
    return tree_of({name: dense(tensor) for name, tensor in named_leaves(direction).items()})


def inner(a: Direction, b: Direction) -> float:
    """The inner product of two directions, the same on every mesh: summed in float32 within each tensor, then in
    float64."""
    return float(sum(np.float64(part) for part in jax.device_get(_inner_products(a, b))))


@jax.jit
def _inner_products(a: Direction, b: Direction) -> list[Float[Array, ""]]:
    is_stored = lambda tensor: isinstance(tensor, Factored | Scaled | Seeded)  # noqa: E731
    return jax.tree.leaves(jax.tree.map(lambda x, y: order_free_sum(dense(x) * dense(y)), a, b, is_leaf=is_stored))


def is_zero(tensor: Any) -> bool:
    """Whether a direction's tensor is known to be zero because its rank is."""
    return isinstance(tensor, Factored) and tensor.rank == 0


def check_storage(storage: str) -> None:
    """Raise a `UserError` if there is no storage of directions with this name."""
    if storage not in STORAGES:
        raise unknown_name("direction storage", storage, STORAGES)


def stored(direction: Direction, storage: str) -> Direction:
    """A direction with its tensors rounded to `bfloat16` or `int8`, and scaled to the norms that they had.

    The result is a different direction: landscapes along it are exact, but not those of the original direction.
    `Factored` tensors stay as they are, because their factors take little memory.
    """
    return tree_of(
        {
            name: tensor if isinstance(tensor, Factored) else rounded(tensor, storage)
            for name, tensor in named_leaves(direction).items()
        }
    )


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


def in_host_memory(direction: Direction) -> Direction:
    """The direction with numpy arrays instead of arrays on devices. With several processes, each of which has a part of
    an array, it is unchanged."""
    return direction if jax.process_count() > 1 else jax.device_get(direction)


def on_model_mesh(direction: Direction, model: Model, is_streamed: bool = False) -> Direction:
    """The direction with its arrays and factors sharded as the model's parameters are.

    Arguments:
        is_streamed: whether arrays in host memory stay there.
    """
    shardings = named_leaves(model.shardings)

    def placed(tensor: Any, sharding: NamedSharding) -> Any:
        if isinstance(tensor, Factored):
            return factored(tensor.left, tensor.right, sharding)
        if is_streamed and isinstance(tensor, np.ndarray):
            return tensor
        return jax.device_put(tensor, sharding) if isinstance(tensor, jax.Array | np.ndarray) else tensor

    return tree_of({name: placed(tensor, shardings[name]) for name, tensor in named_leaves(direction).items()})


def scaled(tensor: Any, factor: float) -> Any:
    """A direction's tensor multiplied by a number. It stays factors if it is stored as factors."""
    if isinstance(tensor, Factored):
        return replace(tensor, left=tensor.left * factor)
    return (dense(tensor) * factor).astype(tensor.dtype)
