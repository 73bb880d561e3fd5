"""The kv cache: its arrays, the order of their dimensions, and what else the tokens of a call attend to."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int

from jaxscape.runtime.sharding import Axes

KeysValues = tuple[Float[Array, "_ _ _ _"], Float[Array, "_ _ _ _"]]
"""One layer's keys and values, with the dimensions of a `CacheOrder`."""


class CacheOrder(NamedTuple):
    """The order of the dimensions of cached keys and values: b rows, k key-value heads, s slots, h features of a head.

    Attributes:
        keys, values: the order, for example "bksh".
        is_read_first: attention reads the cache before the new tokens are written to it. XLA for TPUs updates the cache
            in place only in this case; otherwise it updates a copy in on-chip memory and writes all of it back. On a
            CPU it is faster to write first.
        min_queries: a product with a single query is padded with zero rows to this many. XLA for TPUs computes a
            product of one row on the vector unit, which takes several times as long as reading the cache.
    """

    keys: str
    values: str
    is_read_first: bool = True
    min_queries: int = 1

    @property
    def keys_and_values(self) -> tuple[str, str]:
        return self.keys, self.values

    @property
    def axes(self) -> tuple[Axes, Axes]:
        """The logical axes of keys and of values."""
        names = {"b": "rows", "k": "kv_heads"}
        keys, values = (tuple(names.get(dimension) for dimension in order) for order in self.keys_and_values)
        return keys, values


# The orders in which attention reads a cache without copying it. On a CPU the slots of keys are the last dimension.
CPU_ORDER = CacheOrder("bkhs", "bksh", is_read_first=False)
GPU_ORDER, TPU_ORDER = CacheOrder("bksh", "bksh"), CacheOrder("bksh", "bksh", min_queries=8)


class KVCache(NamedTuple):
    """Keys and values of each layer.

    A query at position p attends to the slots with the positions 0 to p. So a token may lie in any slot, and rows may
    be padded on either side.

    Attributes:
        keys, values: one array for each layer, with the dimensions of a `CacheOrder`.
        positions: int32[B, S], the position of the token in each slot; -1 for an empty slot, which no query attends to.
    """

    keys: tuple[Float[Array, "_ _ _ _"], ...]
    values: tuple[Float[Array, "_ _ _ _"], ...]
    positions: Int[Array, "batch slots"]


class Context(NamedTuple):
    """What the B rows of T tokens in a call attend to besides one another.

    Attributes:
        cache: the cache that earlier calls returned for these rows; None starts a new one.
        slot: the first of the T cache slots that this call's tokens are written to.
        prefix: the cache of a text that rows begin with. It may have fewer rows, N: each is shared by B / N consecutive
            rows of the call. Its tokens stand at the positions before the rows' own.
        segments: int32[B, T], for rows of several packed texts, the text that each token belongs to. A token attends
            only to its own text. Not supported together with `cache`.
    """

    cache: KVCache | None = None
    slot: Int[Array, ""] | int = 0
    prefix: KVCache | None = None
    segments: Int[Array, "batch time"] | None = None
