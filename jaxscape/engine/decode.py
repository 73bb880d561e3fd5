"""The jitted programs of the engine: `insert` prefills, `decode_chunk` adds tokens, `compact` shrinks the batch.

`jaxscape.engine.layout` describes the batch. All rows take their decode steps together, so one clock counts the steps
of the whole run. In every row's ring of cache slots, the keys and values of step t go to slot t modulo the ring's size;
those of a prompt that is inserted at step t go to the slots just before. The scheduler decides which program runs when.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from jaxscape.directions.point import at_point
from jaxscape.directions.stacked import Stacked
from jaxscape.directions.storage import Direction
from jaxscape.engine.batching import Workload
from jaxscape.engine.layout import BatchLayout, Groups
from jaxscape.engine.platforms import cache_order
from jaxscape.engine.sampling import Sampling, greedy, sample
from jaxscape.models.cache import CacheOrder, Context, KVCache, empty_cache
from jaxscape.models.checkpoint import Params
from jaxscape.models.config import ModelConfig
from jaxscape.models.decoder import forward, head, hidden_states
from jaxscape.models.fusion import fused_config
from jaxscape.models.model import Model
from jaxscape.models.shape import ModelShape
from jaxscape.runtime.hardware import platform_jit
from jaxscape.runtime.sharding import Axes, constrain, map_shards, on_mesh, sharding


class Generated(NamedTuple):
    """The new tokens of each row so far.

    Attributes:
        tokens: int32[B, new]; the first `lengths` tokens of a row count. End tokens are not stored.
        lengths: int32[B], the number of new tokens of each row.
        ended: bool[B], True for a row that takes no further tokens: it met an end token, the limit, or a NaN or
            infinite logit, or it has no unfinished answer.
        finite: bool[B], False for a row that met a NaN or infinite logit.
    """

    tokens: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]
    ended: Bool[Array, " batch"]
    finite: Bool[Array, " batch"]


class Slots(NamedTuple):
    """The state of a batch of B rows at N points; the first B / N rows are at the first point, and so on.

    Attributes:
        generated: the new tokens.
        prompt_lengths, prompt_ids: int32[B], see `Groups`.
        cache: the keys and values of the tokens that follow the prefix, in the ring of each row.
        prefix: the keys and values of the prompts' common prefix, one row for each point; None if they have none.
        coords: float32[N, n], each point's coordinates along the directions that are not added to the weights.
        clock: int32, the number of decode steps so far.
    """

    generated: Generated
    prompt_lengths: Int[Array, " batch"]
    prompt_ids: Int[Array, " batch"]
    cache: KVCache
    prefix: KVCache | None
    coords: Float[Array, "points ndim"]
    clock: Int[Array, ""]


class Insertion(NamedTuple):
    """M groups of prompts to insert, and where they go in a batch of B rows at N points.

    Each array has the same number of entries for each shard of the batch, one shard after the other, and an index into
    groups, rows or points counts from the first one of the shard.

    Attributes:
        groups: int32[M], indices into `Groups`. If fewer groups go to a shard than it prefills, the last one is
            repeated, and no row takes the copies.
        coords: float32[M, n], the coordinates of each group's point.
        new_coords: float32[K, n], the coordinates of the points whose prefix is not cached in the shard yet, filled up
            with the last group's point.
        prefix_source: int32[M], where the prefix of each group comes from: the index, among the batch's N points, of
            the point that has it cached; or -1 - k for point k of `new_coords`.
        row_source: int32[B], the inserted prompt that each row of the batch takes, counted through the M groups; -1 for
            a row that stays as it is.
        point_source: int32[N], which of the M groups brings the new point for each point of the batch; -1 for a point
            that stays as it is.
    """

    groups: Int[Array | np.ndarray, " inserted"]
    coords: Float[Array | np.ndarray, "inserted ndim"]
    new_coords: Float[Array | np.ndarray, "new ndim"]
    prefix_source: Int[Array | np.ndarray, " inserted"]
    row_source: Int[Array | np.ndarray, " batch"]
    point_source: Int[Array | np.ndarray, " points"]


class Weights(NamedTuple):
    """The parameters, and the directions that are not added to them; `Slots.coords` are coordinates along these.

    Low-rank directions of several sets are stacked.
    """

    params: Params
    directions: tuple[Direction, ...] | Stacked = ()


@dataclass(frozen=True)
class StaticArguments:
    """What the programs are compiled for: the static argument of each of them, and therefore hashable."""

    config: ModelConfig
    sampling: Sampling
    eos_token_ids: tuple[int, ...]
    mesh: Mesh
    order: CacheOrder


def static_arguments(model: Model | ModelShape, workload: Workload, is_fused: bool = False) -> StaticArguments:
    """The static arguments for a model on the devices of its mesh.

    Arguments:
        is_fused: whether the programs get fused projections, see `jaxscape.models.fusion`.
    """
    config = model.config.for_length(workload.longest_prompt + workload.sampling.max_new_tokens)
    # The seed is not part of the program: another seed must not compile it again.
    sampling = replace(workload.sampling, seed=0)
    order = cache_order(model.mesh, model.dtype, config)
    return StaticArguments(
        fused_config(config) if is_fused else config, sampling, model.eos_token_ids, model.mesh, order
    )


def empty_slots(static: StaticArguments, dtype: str, layout: BatchLayout) -> Slots:
    """A batch without prompts, sharded over the mesh."""
    slots: Slots = _slots_maker(static, dtype, layout)()
    return slots


@cache
def _slots_maker(static: StaticArguments, dtype: str, layout: BatchLayout) -> Callable[[], Slots]:
    """The compiled `_blank_slots`, of which the next scan of the same sizes makes use too."""
    shardings = jax.tree.map(lambda shape: shape.sharding, slot_shapes(static, dtype, layout))
    return jax.jit(partial(_blank_slots, static, dtype, layout), out_shardings=shardings)


def slot_shapes(static: StaticArguments, dtype: str, layout: BatchLayout) -> Any:
    """`Slots` of `jax.ShapeDtypeStruct`s with shardings: rows and points are sharded over the mesh axis `points`,
    key-value heads over `kv`."""
    slots = jax.eval_shape(partial(_blank_slots, static, dtype, layout))

    def sharded(x: jax.ShapeDtypeStruct, axes: Axes) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(static.mesh, axes, x.shape))

    return jax.tree.map(sharded, slots, _slot_axes(slots, static.order))


def _blank_slots(static: StaticArguments, dtype: str, layout: BatchLayout) -> Slots:
    batch = layout.batch
    cache = partial(empty_cache, static.config, dtype, order=static.order)
    zeros, flags = jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool)
    return Slots(
        generated=Generated(jnp.zeros((batch, static.sampling.max_new_tokens), jnp.int32), zeros, flags, flags),
        prompt_lengths=zeros,
        prompt_ids=zeros,
        cache=cache(batch, layout.ring_slots),
        prefix=cache(layout.points_in_flight, layout.prefix_slots) if layout.prefix_slots else None,
        coords=jnp.zeros((layout.points_in_flight, layout.num_factored), jnp.float32),
        clock=jnp.int32(0),
    )


def _slot_axes(slots: Slots, order: CacheOrder) -> Any:
    """The logical axes of each array of `Slots`."""
    # XLA replicates arrays without elements, such as coordinates along no directions.
    axes: Any = jax.tree.map(lambda x: ("rows" if x.size else None, None)[: x.ndim], slots)
    keys, values = order.axes

    def cache_axes(cache: Any) -> Any:
        return cache._replace(keys=(keys,) * len(cache.keys), values=(values,) * len(cache.values))

    prefix = None if axes.prefix is None else cache_axes(axes.prefix)
    return axes._replace(cache=cache_axes(axes.cache), prefix=prefix)


def _constrained(slots: Slots, order: CacheOrder) -> Slots:
    """The slots with sharding constraints, because with other shardings the next program would be compiled again."""
    return jax.tree.map(lambda x, axes: constrain(x, *axes), slots, _slot_axes(slots, order))


@platform_jit(static_argnames="static", donate_argnames="slots")
def insert(
    weights: Weights,
    slots: Slots,
    prefix: Int[Array, " prefix"],
    groups: Groups,
    insertion: Insertion,
    stream: Key[Array, ""],
    *,
    static: StaticArguments,
) -> Slots:
    """Prefill groups of prompts, each at its point, choose each prompt's first new token, and put them into the batch.

    Arguments:
        slots: the batch; its buffers are donated.
        prefix: int32[prefix], the tokens that all prompts begin with.
        stream: the key that random draws are derived from.
    """
    config, order, count = static.config, static.order, len(insertion.groups)
    group_in_shard = np.arange(count) % (count // static.mesh.shape["points"])
    with on_mesh(static.mesh):
        # 1. The prefix, computed once for each point and copied for each of its groups.
        prefixes = _prefix_caches(weights, slots, prefix, insertion, static)

        # 2. The rest of the prompts, several of them in each line.
        group = jax.tree.map(lambda x: x[insertion.groups], groups)
        lines, width = group.tokens.shape[1:]
        tokens, positions, segments = (x.reshape(-1, width) for x in (group.tokens, group.positions, group.segments))
        params = _params_at(weights, insertion.coords, lines)
        context = Context(prefix=prefixes, segments=segments)
        hidden, cache = hidden_states(config, params, tokens, positions, context, order)

        # 3. The first new token, from the hidden state of each prompt's last token.
        first = (group.first_token + group_in_shard[:, None] * lines * width).reshape(-1)
        prompt_lengths, ids, lengths = (
            x.reshape(-1) for x in (group.prompt_lengths, group.prompt_ids, group.own_lengths)
        )
        last = _tokens_in_shard(hidden, first + jnp.maximum(lengths, 1) - 1)
        nothing = Generated(
            tokens=jnp.zeros((len(ids), static.sampling.max_new_tokens), jnp.int32),
            lengths=jnp.zeros_like(ids),
            ended=lengths == 0,
            finite=jnp.ones(ids.shape, bool),
        )
        logits = head(config, _params_at(weights, insertion.coords, len(ids) // count), last[:, None])
        generated = _append_tokens(static, logits[:, 0], nothing, ids, stream)

        # 4. Keys and values move from the lines to the rings of the rows that take the prompts.
        rings = _filled_rings(slots, insertion, positions, cache, first, lengths, static)
        rows = _take_rows(
            insertion.row_source,
            (slots.generated, slots.prompt_lengths, slots.prompt_ids),
            (generated, prompt_lengths, ids),
            order,
        )
        points = _take_rows(insertion.point_source, (slots.prefix, slots.coords), (prefixes, insertion.coords), order)
        return _constrained(Slots(*rows, rings, *points, slots.clock), order)  # type: ignore[call-arg]


def _params_at(weights: Weights, coords: Float[Array | np.ndarray, "points ndim"], rows: int) -> Params:
    """The parameters for inputs that have `rows` consecutive rows at each of the points."""
    return at_point(weights.params, weights.directions, coords, rows)


def _prefix_caches(
    weights: Weights, slots: Slots, prefix: Int[Array, " prefix"], insertion: Insertion, static: StaticArguments
) -> KVCache | None:
    """The cached prefix of each inserted group: a copy from a point in flight, or computed for a new point."""
    cached = slots.prefix
    if cached is None:
        return None

    def computed() -> KVCache:
        shape = (len(insertion.new_coords), prefix.size)
        tokens, positions = (jnp.broadcast_to(x, shape) for x in (prefix, jnp.arange(prefix.size)))
        params = _params_at(weights, insertion.new_coords, 1)
        return hidden_states(static.config, params, tokens, positions, Context(), static.order)[1]

    new = jax.lax.cond(
        (insertion.prefix_source < 0).any(),
        computed,
        lambda: _gather_rows(cached, jnp.zeros(len(insertion.new_coords), jnp.int32), static.order),
    )
    copies = _gather_rows(cached, jnp.maximum(insertion.prefix_source, 0), static.order)
    taken: KVCache = _take_rows(-1 - insertion.prefix_source, copies, new, static.order)
    return taken


def _filled_rings(
    slots: Slots,
    insertion: Insertion,
    positions: Int[Array, "lines width"],
    cache: KVCache,
    first: Int[Array, " rows"],
    lengths: Int[Array, " rows"],
    static: StaticArguments,
) -> KVCache:
    """The rings of the batch, in which the rows that take a prompt hold its keys and values.

    Arguments:
        positions, cache: the position, and the keys and values, of each token in the packed lines.
        first, lengths: for each inserted prompt, the index of its first token, counted through the lines of its shard,
            and the number of its tokens there.
    """
    order = static.order
    # Slot s of row b's ring takes token number `token[b, s]` of the row's prompt, if the prompt has that many tokens.
    source = jnp.asarray(insertion.row_source)
    takes, row = source >= 0, jnp.maximum(source, 0)
    first, lengths = (x[:, None] for x in _gather_rows((first, lengths), row, order))
    ring = slots.cache.positions.shape[1]
    token = (jnp.arange(ring) - (slots.clock - lengths)) % ring
    is_filled = token < lengths
    index = jnp.where(is_filled, first + token, 0)

    def in_rings(dimensions: str, axes: Axes, old: Array, new: Array) -> Array:
        """The rings of one layer's keys or values, whose dimensions have the order `dimensions`."""
        by_row = (takes, is_filled, index)
        return map_shards(partial(fill, dimensions), (axes, axes, *[("rows",)] * len(by_row)), old, new, *by_row)

    def fill(dimensions: str, old: Array, new: Array, takes: Array, is_filled: Array, index: Array) -> Array:
        """The rings in one shard."""
        heads = [new.shape[dimensions.index(dimension)] for dimension in "kh"]
        by_token = new.transpose(*map(dimensions.index, "bskh")).reshape(-1, *heads)
        filled = jnp.where(is_filled[..., None, None], by_token[index], 0)
        filled = filled.transpose(*map("bskh".index, dimensions))
        # Without this constraint, XLA for TPUs merges old and new rings in the gather's layout, and then copies the
        # rings of every layer back to their own.
        filled = with_layout_constraint(filled, Layout(tuple(range(4))))
        return jnp.where(jnp.expand_dims(takes, [axis for axis in range(4) if dimensions[axis] != "b"]), filled, old)

    done: list[tuple[Array, ...]] = []
    for old, new in zip(zip(*slots.cache[:2], strict=True), zip(*cache[:2], strict=True), strict=True):
        if done:  # one layer after the other: gathering all layers at once would take the memory of a second cache
            new, done[-1] = jax.lax.optimization_barrier((new, done[-1]))
        done.append(tuple(map(in_rings, order.keys_and_values, order.axes, old, new)))
    keys, values = zip(*done, strict=True)
    filled_positions = jnp.where(is_filled, _tokens_in_shard(positions, index), -1)
    return KVCache(keys, values, jnp.where(takes[:, None], filled_positions, slots.cache.positions))


def _tokens_in_shard(x: Shaped[Array, "lines width ..."], index: Int[Array, "rows ..."]) -> Array:
    """`x` at the tokens with these numbers, counted through the lines of the shard that the row is in."""
    take = lambda x, index: x.reshape(-1, *x.shape[2:])[index]  # noqa: E731
    return map_shards(take, (("rows",), ("rows",)), x, index)


def _take_rows(index: Int[Array | np.ndarray, " rows"], old: Any, new: Any, order: CacheOrder) -> Any:
    """Two trees merged array by array: row i is row `index[i]` of the new array, counted from the first row of the
    shard that row i is in; or the old row if that is negative."""

    def merge(row_axis: int, old: Array, new: Array, index: Array) -> Array:
        is_kept = jnp.expand_dims(index < 0, [axis for axis in range(old.ndim) if axis != row_axis])
        return jnp.where(is_kept, old, jnp.take(new, jnp.maximum(index, 0), axis=row_axis))

    return _map_rows(merge, index, order, old, new)


def _gather_rows(tree: Any, index: Int[Array | np.ndarray, " rows"], order: CacheOrder) -> Any:
    """The tree with row `index[i]` of each array as its row i, counted from the first row of the shard of row i."""
    return _map_rows(lambda row_axis, x, index: jnp.take(x, index, axis=row_axis), index, order, tree)


def _map_rows(
    function: Callable[..., Array], index: Int[Array | np.ndarray, " rows"], order: CacheOrder, *trees: Any
) -> Any:
    """A tree of `function(row_axis, *arrays, index)` for the corresponding arrays of trees, computed shard by shard, so
    that no rows are sent. `row_axis` is 0; only for keys and values it is the one that `order` says."""

    def mapped(axes: Axes, *arrays: Array) -> Array:
        in_shard = partial(function, axes.index("rows"))
        return map_shards(in_shard, (*[axes] * len(arrays), ("rows",)), *arrays, jnp.asarray(index))

    def map_cache(*caches: KVCache) -> KVCache:
        keys, values, positions = zip(*caches, strict=True)
        key_axes, value_axes = order.axes
        return KVCache(
            tuple(mapped(key_axes, *layer) for layer in zip(*keys, strict=True)),
            tuple(mapped(value_axes, *layer) for layer in zip(*values, strict=True)),
            mapped(("rows",), *positions),
        )

    def map_leaf(*leaves: Any) -> Any:
        return map_cache(*leaves) if isinstance(leaves[0], KVCache) else mapped(("rows",), *leaves)

    return jax.tree.map(map_leaf, *trees, is_leaf=lambda x: isinstance(x, KVCache))


@platform_jit(static_argnames="static", donate_argnames="slots")
def decode_chunk(
    weights: Weights,
    slots: Slots,
    is_alive: Bool[Array | np.ndarray, " batch"],
    stream: Key[Array, ""],
    steps: Int[Array | np.ndarray, ""],
    *,
    static: StaticArguments,
) -> tuple[Slots, Generated]:
    """Add up to `steps` tokens to each row that has an unfinished answer (`is_alive`).

    Arguments:
        slots: the batch; its buffers are donated.

    Returns:
        The batch, and a copy of its generated tokens on every device, which stays valid when the batch is donated to
        the next call.
    """
    batch, ring = slots.cache.positions.shape
    with on_mesh(static.mesh):
        params = _params_at(weights, slots.coords, batch // len(slots.coords))

        def is_unfinished(carry: tuple[Int[Array, ""], Slots]) -> Bool[Array, ""]:
            return (carry[0] < steps) & ~carry[1].generated.ended.all()

        def step(carry: tuple[Int[Array, ""], Slots]) -> tuple[Int[Array, ""], Slots]:
            count, slots = carry
            generated = slots.generated
            last = jnp.take_along_axis(generated.tokens, jnp.maximum(generated.lengths - 1, 0)[:, None], axis=1)
            position = slots.prompt_lengths + generated.lengths - 1
            positions = jnp.where(generated.ended, -1, position)[:, None]
            context = Context(slots.cache, slots.clock % ring, slots.prefix)
            logits, cache = forward(static.config, params, last, positions, context, order=static.order)
            generated = _append_tokens(static, logits[:, 0], generated, slots.prompt_ids, stream)
            slots = slots._replace(generated=generated, cache=cache, clock=slots.clock + 1)
            return count + 1, _constrained(slots, static.order)

        ended = slots.generated.ended | ~is_alive
        slots = slots._replace(generated=slots.generated._replace(ended=ended))
        slots = jax.lax.while_loop(is_unfinished, step, (jnp.int32(0), slots))[1]
        slots = _constrained(slots, static.order)
        return slots, jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), slots.generated)


@platform_jit(static_argnames="static")
def compact(
    slots: Slots,
    rows: Int[Array | np.ndarray, " fewer"],
    points: Int[Array | np.ndarray, " fewer_points"],
    *,
    static: StaticArguments,
) -> Slots:
    """A smaller batch with the given rows and points of `slots`, whose buffers are not donated.

    Arguments:
        rows, points: the same number for each shard of the batch, counted from its first row and point.
    """
    moved = (slots.generated, slots.prompt_lengths, slots.prompt_ids, slots.cache)
    with on_mesh(static.mesh):
        by_row = _gather_rows(moved, rows, static.order)
        by_point = _gather_rows((slots.prefix, slots.coords), points, static.order)
        return _constrained(Slots(*by_row, *by_point, slots.clock), static.order)  # type: ignore[call-arg]


def _append_tokens(
    static: StaticArguments,
    logits: Float[Array, "batch vocab"],
    generated: Generated,
    prompt_ids: Int[Array, " batch"],
    stream: Key[Array, ""],
) -> Generated:
    """Add a token to the rows that go on. A row ends at an end token, the limit, or a NaN or infinite logit."""
    is_finite = jnp.isfinite(logits.max(-1)) & jnp.isfinite(logits.min(-1))
    if static.sampling.temperature == 0:
        chosen = greedy(logits)
    else:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(stream, prompt_ids)
        chosen = sample(logits, jax.vmap(jax.random.fold_in)(keys, generated.lengths), static.sampling)
    goes_on = ~generated.ended & is_finite & ~jnp.isin(chosen, jnp.asarray(static.eos_token_ids, jnp.int32))
    lengths = generated.lengths + goes_on
    limit = generated.tokens.shape[1]
    is_new = goes_on[:, None] & (jnp.arange(limit) == generated.lengths[:, None])
    return Generated(
        tokens=jnp.where(is_new, chosen[:, None], generated.tokens),
        lengths=lengths,
        ended=~goes_on | (lengths == limit),
        finite=generated.finite & (is_finite | generated.ended),
    )
