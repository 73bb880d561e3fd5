"""The kv cache: its arrays, the order of their dimensions, and what else the tokens of a decoder call attend to."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxscape.models.config import ModelConfig
from jaxscape.runtime.sharding import Axes

KeysValues = tuple[Float[Array, "_ _ _ _"], Float[Array, "_ _ _ _"]]
"""One layer's keys and values; a `CacheOrder` says the order of their dimensions."""


class CacheOrder(NamedTuple):
    """The order of the dimensions of cached keys and values: b rows, k key-value heads, s slots, h features of a head.

    Attributes:
        keys, values: the order of the dimensions of keys and of values, for example "bksh".
        is_read_first: whether attention reads the cache before the new tokens are written to it. XLA for TPUs updates
            the cache in place only in this case; otherwise it updates a copy in on-chip memory and writes all of it
            back. On a CPU it is faster to write first.
        min_queries: the least number of queries in a matrix product with the cache; a single query is padded with zero
            rows to this number. XLA for TPUs computes a product with one row on the vector unit, which takes several
            times as long as reading the cache.
        kernel: whether the attention of a single new token to the cache is computed by the GPU kernel of
            `jaxscape.models.decode_attention`, for which the cache has the order "bksh" and is not read first.
    """

    keys: str
    values: str
    is_read_first: bool = True
    min_queries: int = 1
    kernel: bool = False

    @property
    def keys_and_values(self) -> tuple[str, str]:
        return self.keys, self.values

    @property
    def axes(self) -> tuple[Axes, Axes]:
        """The logical axes of keys and of values."""
        names = {"b": "rows", "k": "kv_heads"}
        keys, values = (tuple(names.get(dimension) for dimension in order) for order in self.keys_and_values)
        return keys, values


# For each platform, the order in which attention reads the cache without transposing it, which would be a copy. On a
# CPU the last dimension of keys is the slots.
CPU_ORDER = CacheOrder("bkhs", "bksh", is_read_first=False)
TPU_ORDER = CacheOrder("bksh", "bksh", min_queries=8)
GPU_ORDER = CacheOrder("bksh", "bksh", is_read_first=False, kernel=True)
GPU_ORDER_WITHOUT_KERNEL = CacheOrder("bksh", "bksh")


class KVCache(NamedTuple):
    """Keys and values of each layer.

    A query at position p attends to the slots whose tokens have positions from 0 to p, or only to the last of them if
    the layer has a window. The order of the slots does not matter, so a token may lie in any slot, and rows may be
    padded on either side.

    Attributes:
        keys, values: one array for each layer; a `CacheOrder` says the order of its dimensions.
        positions: int32[B, S], the position of the token in each slot; -1 for an empty slot, which no query attends to.
    """

    keys: tuple[Float[Array, "_ _ _ _"], ...]
    values: tuple[Float[Array, "_ _ _ _"], ...]
    positions: Int[Array, "batch slots"]


def empty_cache(config: ModelConfig, dtype: str, rows: int, slots: int, order: CacheOrder) -> KVCache:
    """A cache without tokens, for `rows` texts of up to `slots` tokens."""
    lengths = {"b": rows, "k": config.num_kv_heads, "h": config.head_dim, "s": slots}
    keys, values = (jnp.zeros([lengths[dimension] for dimension in dims], dtype) for dims in order.keys_and_values)
    count = config.num_layers
    return KVCache((keys,) * count, (values,) * count, jnp.full((rows, slots), -1, jnp.int32))


class Context(NamedTuple):
    """What the tokens of a decoder call, B rows of T tokens, attend to besides the tokens of their own row.

    Attributes:
        cache: the cache that earlier calls returned for these rows; None starts a new one.
        slot: the first of the T cache slots that this call's tokens are written to.
        prefix: the cache of the texts that the rows begin with. It may have fewer rows, N: each is shared by B / N
            consecutive rows of the call. Its tokens have the positions before those of the call's tokens.
        segments: int32[B, T], the number of the text that each token belongs to, if several texts are packed into a
            row; None if each row is one text. A token attends only to the prefix and to its own text. Not supported
            together with `cache`.
    """

    cache: KVCache | None = None
    slot: Int[Array, ""] | int = 0
    prefix: KVCache | None = None
    segments: Int[Array, "batch time"] | None = None
