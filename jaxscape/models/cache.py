"""The decoder of all families: a configurable transformer in Flax, and its key-value cache.

Parameters have the names and layouts of a Hugging Face checkpoint: the tree's path, joined with dots, *is* the
checkpoint's tensor name, and a linear layer's weight is [out, in]. Converting a checkpoint is therefore renaming
nothing and transposing nothing. Beside each parameter, and where activations need it, stand the logical axes of its
dimensions; `jaxscape.sharding` says over which devices they are split.
"""

from typing import NamedTuple

from jaxtyping import Array, Float, Int

from jaxscape.runtime.sharding import Axes


class CacheOrder(NamedTuple):
    """The order of a cache's dimensions: b rows, k key-value heads, s slots, h features of a head.

    Attributes:
        is_read_first: attention reads the cache before a step's tokens are written to it. XLA for TPUs updates it in
            place then, and otherwise in on-chip memory, from where all of it goes back; on a CPU it is the other way.
        queries: rows of a product that has one query only, the others being zero. XLA for TPUs gives products with one
            row to the vector unit, which takes several times as long for them as reading the cache does.
    """

    keys: str
    values: str
    is_read_first: bool = True
    queries: int = 1

    @property
    def both(self) -> tuple[str, str]:
        return self.keys, self.values

    @property
    def axes(self) -> tuple[Axes, Axes]:
        """The logical axes of keys and of values."""
        names = {"b": "rows", "k": "kv_heads"}
        keys, values = (tuple(names.get(dimension) for dimension in order) for order in self.both)
        return keys, values


# The orders in which attention reads what lies there, and copies nothing. On a CPU, keys have their slots last.
CPU_ORDER = CacheOrder("bkhs", "bksh", is_read_first=False)
GPU_ORDER, TPU_ORDER = CacheOrder("bksh", "bksh"), CacheOrder("bksh", "bksh", queries=8)


class KVCache(NamedTuple):
    """Keys and values per layer, their dimensions in a `CacheOrder`, and the position that each slot holds.

    A slot whose position is -1 holds nothing and is never attended to. A query at position p attends to the slots
    with positions 0 to p, so where in the cache a token lies does not matter, and rows may be padded on either side.
    """

    keys: tuple[Float[Array, "_ _ _ _"], ...]
    values: tuple[Float[Array, "_ _ _ _"], ...]
    positions: Int[Array, "batch slots"]


class Context(NamedTuple):
    """What the tokens of a call can attend to besides one another.

    Attributes:
        cache: what earlier calls returned for these rows, or None to start one.
        slot: the first of the cache slots that this call's tokens are written to.
        prefix: the cache of a text that the rows begin with, which is read once for all of them. Where it has several
            rows, N, the first is for the first B / N rows of the call, and so on. Its tokens stand at the positions
            before the rows' own.
        segments: int32[B, T]; where several texts are packed into a row, which of them each token belongs to. A token
            attends to its own text alone. Only without `cache`.
    """

    cache: KVCache | None = None
    slot: Int[Array, ""] | int = 0
    prefix: KVCache | None = None
    segments: Int[Array, "batch time"] | None = None
