"""Decoding on the device: prompts to packed tokens, and the jitted programs that insert them and step their rows.

A batch has slots for rows, equally many for each of its places. The rows of a place are at one landscape point and
share the cache of the text that all prompts begin with; each row has a ring of cache slots for what follows. All rows
take their steps together, so the steps of the whole run are counted by one clock, and what is written at time t goes to
ring slot t modulo the ring's size. A row that is inserted at time t has its prompt in the slots before t. Which
programs run when is decided in `jaxscape.engine`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from jaxscape.errors import UserError, check_seed
from jaxscape.models import Model
from jaxscape.models.checkpoint import Params
from jaxscape.models.config import ModelConfig
from jaxscape.models.decoder import (
    CPU_ORDER,
    GPU_ORDER,
    TPU_ORDER,
    CacheOrder,
    Context,
    KVCache,
    forward,
    head,
    hidden_states,
)
from jaxscape.models.shapes import ModelShape
from jaxscape.perturb import Direction, at_point
from jaxscape.prompts import chat_text
from jaxscape.sharding import Axes, constrain, on, sharding

LENGTH_MULTIPLE = 16  # lengths are padded to a multiple of it, so that few are compiled


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
        max_new_tokens: the most tokens generated for a prompt.
        temperature: 0 takes the most likely token; otherwise logits are divided by it and a token is drawn.
        top_k: draw from the k most likely tokens only; 0 for all.
        top_p: draw from the fewest tokens whose probabilities reach p (Holtzman et al., arXiv 1904.09751).
        seed: of the draws. Every prompt has its own stream, which is the same at every landscape point.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"The number of new tokens must be at least 1, not {self.max_new_tokens}.")
        if not (0 <= self.temperature < float("inf")):
            raise UserError(f"The temperature must be a number from 0 up, not {self.temperature}.")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (all tokens) or more, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}.")
        check_seed(self.seed)


class Groups(NamedTuple):
    """Prompts without the prefix that they share, in groups that are inserted together, each packed into few lines.

    Attributes:
        tokens, positions, segments: int32[G, L, T], the lines of each group. A token's position counts from the
            beginning of its whole prompt, and is -1 for padding; its segment says which text of the line it belongs to.
        first: int32[G, R], where each row's text begins, counted through the group's lines.
        lengths: int32[G, R], its tokens; 0 for a row that only fills up its group.
        starts: int32[G, R], the length of its whole prompt: the position of its first new token.
        rows: int32[G, R], its prompt's number, which its random stream depends on.
    """

    tokens: Int[Array | np.ndarray, "groups lines time"]
    positions: Int[Array | np.ndarray, "groups lines time"]
    segments: Int[Array | np.ndarray, "groups lines time"]
    first: Int[Array | np.ndarray, "groups rows"]
    lengths: Int[Array | np.ndarray, "groups rows"]
    starts: Int[Array | np.ndarray, "groups rows"]
    rows: Int[Array | np.ndarray, "groups rows"]


class Generated(NamedTuple):
    """What rows were completed with so far.

    Attributes:
        tokens: int32[B, new], a row's new tokens, of which the first `lengths` count; an end token is not among
            them.
        ended: the row has met an end token, the limit, or a logit that is NaN or infinite.
        finite: False for a row that met such a logit.
    """

    tokens: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]
    ended: Bool[Array, " batch"]
    finite: Bool[Array, " batch"]


class Slots(NamedTuple):
    """The state of decoding B rows at N places; the first B / N rows are at the first place, and so on.

    Attributes:
        starts, rows: see `Groups`.
        cache: of what follows the prefix, a ring for each row.
        prefix: the cache of the prefix, a row for each place; None if the prompts have none in common.
        coords: float32[N, n], each place's point, along directions that are not yet in the weights.
        clock: int32, the steps so far.
    """

    out: Generated
    starts: Int[Array, " batch"]
    rows: Int[Array, " batch"]
    cache: KVCache
    prefix: KVCache | None
    coords: Float[Array, "places ndim"]
    clock: Int[Array, ""]


class Fill(NamedTuple):
    """Groups to insert, M at most, and where they go.

    Attributes:
        group: int32[M], which of the `Groups`; those that no slot takes are there to keep the shape.
        coords: float32[M, n], each one's point.
        new: float32[K, n], the points whose prefix no place has yet, the last one repeated.
        source: int32[M], where each group's prefix comes from: a place that has it, or -1 - k for the k-th new point.
        of_row: int32[B], the row that each slot takes, counted through the M groups, or -1 to keep its own.
        of_place: int32[N], the group whose point each place takes, or -1.
    """

    group: Int[Array | np.ndarray, " fills"]
    coords: Float[Array | np.ndarray, "fills ndim"]
    new: Float[Array | np.ndarray, "new ndim"]
    source: Int[Array | np.ndarray, " fills"]
    of_row: Int[Array | np.ndarray, " batch"]
    of_place: Int[Array | np.ndarray, " places"]


class Weights(NamedTuple):
    """The model's parameters, and the directions along which `Slots.coords` count; none if they are in the sum."""

    params: Params
    directions: tuple[Direction, ...] = ()


@dataclass(frozen=True)
class Program:
    """What the programs are compiled for; hashable, so that it can be a static argument of `jax.jit`."""

    config: ModelConfig
    sampling: Sampling
    eos_token_ids: tuple[int, ...]
    mesh: Mesh
    order: CacheOrder


def make_program(model: Model | ModelShape, rows: Sequence[Sequence[int]], sampling: Sampling) -> Program:
    """The program for a model and prompts, on the devices of its mesh."""
    longest = max(map(len, rows)) + sampling.max_new_tokens
    orders = {"cpu": CPU_ORDER, "tpu": TPU_ORDER}
    order = orders.get(model.mesh.devices.flat[0].platform, GPU_ORDER)
    # Another seed is another stream, not another program.
    sampling = replace(sampling, seed=0)
    return Program(model.config.for_length(longest), sampling, model.eos_token_ids, model.mesh, order)


def tokenize(model: Model, prompts: Sequence[str], system_prompt: str, max_new_tokens: int) -> list[list[int]]:
    """Each prompt's tokens in the model's chat format; see `chat_text` and `encode`."""
    return encode(model, [chat_text(model.tokenizer, prompt, system_prompt) for prompt in prompts], max_new_tokens)


def encode(model: Model, texts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    """The tokens of what the model is given for each prompt.

    Raises:
        UserError: there are no prompts, or a prompt and its new tokens exceed the model's context.
    """
    if not texts:
        raise UserError("There are no prompts.")
    rows: list[list[int]] = model.tokenizer(list(texts), add_special_tokens=False)["input_ids"]  # they are spelled out
    for number, row in enumerate(rows, 1):
        if len(row) + max_new_tokens > model.config.max_positions:
            raise UserError(
                f"Prompt {number} has {len(row)} tokens, which with {max_new_tokens} new ones exceeds the model's "
                f"context of {model.config.max_positions}; shorten it or lower --max-new-tokens."
            )
        if not row:
            raise UserError(f"Prompt {number} is empty.")
        if max(row) >= model.config.vocab_size:
            raise UserError(
                f"The tokenizer gives token {max(row)}, but the model has only {model.config.vocab_size} of them; "
                f"they do not belong together."
            )
    return rows


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, leaving each at least one of its own."""
    shortest = min(map(len, rows)) - 1
    return next((i for i in range(shortest) if any(row[i] != rows[0][i] for row in rows)), shortest)


def pack(rows: Sequence[Sequence[int]], prefix: int, group_size: int, inserts: int = 1, points: int = 1) -> Groups:
    """Rows without their first `prefix` tokens, in groups of `group_size`, all of one shape.

    Several rows share a line; the line is as long as leaves the least padding. `points` devices have equal shares of
    the lines of `inserts` groups, which are inserted together.
    """
    multiple = points // math.gcd(points, inserts)
    texts = [row[prefix:] for row in rows]
    groups = [range(i, min(i + group_size, len(texts))) for i in range(0, len(texts), group_size)]
    longest = round_up(max(map(len, texts)))
    widths = range(longest, longest + 8 * LENGTH_MULTIPLE, LENGTH_MULTIPLE)
    counts = [max(max(_lines(texts, group, width)) + 1 for group in groups) for width in widths]
    shapes = [(-(-count // multiple) * multiple, width) for count, width in zip(counts, widths, strict=True)]
    lines, width = min(shapes, key=lambda shape: (shape[0] * shape[1], shape[1]))
    tokens, segments = (np.zeros((len(groups), lines, width), np.int32) for _ in range(2))
    positions = np.full_like(tokens, -1)
    first, lengths, starts, numbers = (np.zeros((len(groups), group_size), np.int32) for _ in range(4))
    for g, group in enumerate(groups):
        filled = np.zeros(lines, int)
        for r, (number, line) in enumerate(zip(group, _lines(texts, group, width), strict=True)):
            text, begin = texts[number], filled[line]
            span = (g, line, slice(begin, begin + len(text)))
            tokens[span], positions[span], segments[span] = text, prefix + np.arange(len(text)), r
            first[g, r], lengths[g, r] = line * width + begin, len(text)
            starts[g, r], numbers[g, r] = prefix + len(text), number
            filled[line] += len(text)
    return Groups(tokens, positions, segments, first, lengths, starts, numbers)


def _lines(texts: Sequence[Sequence[int]], group: Sequence[int], width: int) -> list[int]:
    """The line of each of a group's texts: the longest are placed first, each in the first line that has room."""
    free: list[int] = []
    chosen = {}
    for number in sorted(group, key=lambda number: -len(texts[number])):
        size = len(texts[number])
        line = next((i for i, room in enumerate(free) if room >= size), len(free))
        if line == len(free):
            free.append(width)
        free[line] -= size
        chosen[number] = line
    return [chosen[number] for number in group]


def round_up(length: int) -> int:
    """A length with its padding."""
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def ring_size(groups: Groups, max_new_tokens: int) -> int:
    """The cache slots of a row: for the longest text and what is generated."""
    return round_up(int(np.max(groups.lengths))) + max_new_tokens


class SlotSizes(NamedTuple):
    """How many slots there are, and of what size.

    Attributes:
        ring, prefix: cache slots of a row, and of the prefix of a place.
        ndim: coordinates of a place.
    """

    places: int
    batch: int
    ring: int
    prefix: int
    ndim: int


def most_new_points(inserts: int, groups: int) -> int:
    """The most points that so many groups belong to, which come in the points' order, `groups` of each."""
    return min(inserts, (inserts - 2) // groups + 2)


def empty_slots(program: Program, dtype: str, sizes: SlotSizes) -> Slots:
    """Slots without rows, each on the devices that it belongs to."""
    where = jax.tree.map(lambda shape: shape.sharding, slot_shapes(program, dtype, sizes))
    slots: Slots = jax.jit(partial(_blank, program, dtype, sizes), out_shardings=where)()
    return slots


def slot_shapes(program: Program, dtype: str, sizes: SlotSizes) -> Any:
    """The shapes, dtypes and shardings of slots: rows and places over one axis of the mesh, key-value heads over the
    other."""
    slots = jax.eval_shape(partial(_blank, program, dtype, sizes))

    def placed(x: jax.ShapeDtypeStruct, axes: Axes) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(program.mesh, axes, x.shape))

    return jax.tree.map(placed, slots, _slot_axes(slots, program.order))


def _blank(program: Program, dtype: str, sizes: SlotSizes) -> Slots:
    config, (places, batch, ring, prefix, ndim) = program.config, sizes

    def cache(batch: int, slots: int) -> KVCache:
        lengths = {"b": batch, "k": config.num_kv_heads, "h": config.head_dim, "s": slots}
        keys, values = (jnp.zeros([lengths[dimension] for dimension in order], dtype) for order in program.order.both)
        count = config.num_layers
        return KVCache((keys,) * count, (values,) * count, jnp.full((batch, slots), -1, jnp.int32))

    numbers, flags = jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool)
    return Slots(
        out=Generated(jnp.zeros((batch, program.sampling.max_new_tokens), jnp.int32), numbers, flags, flags),
        starts=numbers,
        rows=numbers,
        cache=cache(batch, ring),
        prefix=cache(places, prefix) if prefix else None,
        coords=jnp.zeros((places, ndim), jnp.float32),
        clock=jnp.int32(0),
    )


def _slot_axes(slots: Slots, order: CacheOrder) -> Any:
    axes: Any = jax.tree.map(lambda x: ("rows", None)[: x.ndim], slots)
    keys, values = order.axes

    def heads(cache: Any) -> Any:
        return cache._replace(keys=(keys,) * len(cache.keys), values=(values,) * len(cache.values))

    return axes._replace(cache=heads(axes.cache), prefix=None if axes.prefix is None else heads(axes.prefix))


def _split(slots: Slots, order: CacheOrder) -> Slots:
    return jax.tree.map(lambda x, axes: constrain(x, *axes), slots, _slot_axes(slots, order))


@partial(jax.jit, static_argnames="program", donate_argnames="slots")
def insert(
    weights: Weights,
    slots: Slots,
    prefix: Int[Array, " prefix"],
    groups: Groups,
    fill: Fill,
    stream: Key[Array, ""],
    *,
    program: Program,
) -> Slots:
    """Prefill groups of prompts, each at its point, choose their first tokens, and put them into slots.

    The prefix is computed once for each point, and all groups of the point get a copy.
    """
    with on(program.mesh):
        return _split(_inserted(weights, slots, prefix, groups, fill, stream, program), program.order)


def _inserted(
    weights: Weights,
    slots: Slots,
    prefix: Int[Array, " prefix"],
    groups: Groups,
    fill: Fill,
    stream: Key[Array, ""],
    program: Program,
) -> Slots:
    config, order, fills = program.config, program.order, len(fill.group)

    def taken(index: Int[Array | np.ndarray, " kept"], old: Any, new: Any) -> Any:
        """The rows of each array in `new` with these numbers, and where one is negative, the old row."""
        numbers = jnp.asarray(index)

        def merge(old: Array, new: Array, row: int) -> Array:
            kept = jnp.expand_dims(numbers < 0, [axis for axis in range(old.ndim) if axis != row])
            return jnp.where(kept, old, jnp.take(new, jnp.maximum(numbers, 0), axis=row))

        return _by_row(merge, order, old, new)

    def params_at(coords: Float[Array | np.ndarray, "points ndim"], rows: int) -> Params:
        """The parameters for inputs of `rows` rows for each of the points."""
        return at_point(weights.params, weights.directions, jnp.repeat(jnp.asarray(coords), rows, axis=0))

    def prefill_prefix() -> KVCache:
        shape = (len(fill.new), prefix.size)
        tokens, positions = (jnp.broadcast_to(x, shape) for x in (prefix, jnp.arange(prefix.size)))
        return hidden_states(config, params_at(fill.new, 1), tokens, positions, Context(), order)[1]

    shared = slots.prefix
    if shared is not None:
        computed = jax.lax.cond(
            (fill.source < 0).any(),
            prefill_prefix,
            lambda: _rows_of(shared, jnp.zeros(len(fill.new), jnp.int32), order),
        )
        shared = taken(-1 - fill.source, _rows_of(shared, jnp.maximum(fill.source, 0), order), computed)

    group = jax.tree.map(lambda x: x[fill.group], groups)
    lines, width = group.tokens.shape[1:]
    tokens, positions, segments = (x.reshape(-1, width) for x in (group.tokens, group.positions, group.segments))
    x, cache = hidden_states(
        config, params_at(fill.coords, lines), tokens, positions, Context(prefix=shared, segments=segments), order
    )
    first = (group.first + jnp.arange(fills)[:, None] * lines * width).reshape(-1)
    starts, rows, lengths = (x.reshape(-1) for x in (group.starts, group.rows, group.lengths))
    last = x.reshape(-1, x.shape[-1])[first + jnp.maximum(lengths, 1) - 1]
    nothing = Generated(
        tokens=jnp.zeros((len(rows), program.sampling.max_new_tokens), jnp.int32),
        lengths=jnp.zeros_like(rows),
        ended=lengths == 0,
        finite=jnp.ones(rows.shape, bool),
    )
    logits = head(config, params_at(fill.coords, len(rows) // fills), last[:, None])
    out = _choose(program, logits[:, 0], nothing, rows, stream)

    # Ring slot s of a row holds the text's token number `place`, if it has that many.
    fresh, row = fill.of_row >= 0, jnp.maximum(fill.of_row, 0)
    ring = slots.cache.positions.shape[1]
    place = (jnp.arange(ring) - (slots.clock - lengths[row][:, None])) % ring
    there = place < lengths[row][:, None]
    index = jnp.where(there, first[row][:, None] + place, 0)

    def ringed(to: str, old: Array, new: Array) -> Array:
        """The rings with the fresh rows' keys or values, whose dimensions are in the order `to`."""
        by_token = new.transpose(*map(to.index, "bskh")).reshape(-1, config.num_kv_heads, config.head_dim)
        filled = jnp.where(there[..., None, None], by_token[index], 0).transpose(*map("bskh".index, to))
        # Without it, XLA for TPUs would merge the rings as the gather lays them, and copy those of all layers back.
        filled = with_layout_constraint(filled, Layout(tuple(range(4))))
        return jnp.where(jnp.expand_dims(fresh, [axis for axis in range(4) if to[axis] != "b"]), filled, old)

    done: list[tuple[Array, Array]] = []
    for old, new in zip(zip(*slots.cache[:2], strict=True), zip(*cache[:2], strict=True), strict=True):
        if done:  # one layer after the other: what is gathered for all would be a second cache
            new, done[-1] = jax.lax.optimization_barrier((new, done[-1]))
        done.append((ringed(order.keys, old[0], new[0]), ringed(order.values, old[1], new[1])))
    keys, values = zip(*done, strict=True)
    filled = jnp.where(fresh[:, None], jnp.where(there, positions.reshape(-1)[index], -1), slots.cache.positions)
    rings = KVCache(keys, values, filled)
    changed = taken(fill.of_row, (slots.out, slots.starts, slots.rows), (out, starts, rows))
    kept = taken(fill.of_place, (slots.prefix, slots.coords), (shared, fill.coords))
    return Slots(*changed, rings, *kept, slots.clock)  # type: ignore[call-arg]


def _by_row(function: Callable[..., Array], order: CacheOrder, *trees: Any) -> Any:
    """`function(*arrays, axis of their rows)` for the arrays of trees like one another; caches among them have rows
    where `order` says."""

    def cached(*caches: KVCache) -> KVCache:
        keys, values, positions = zip(*caches, strict=True)
        return KVCache(
            tuple(function(*each, order.keys.index("b")) for each in zip(*keys, strict=True)),
            tuple(function(*each, order.values.index("b")) for each in zip(*values, strict=True)),
            function(*positions, 0),
        )

    def one(*each: Any) -> Any:
        return cached(*each) if isinstance(each[0], KVCache) else function(*each, 0)

    return jax.tree.map(one, *trees, is_leaf=lambda x: isinstance(x, KVCache))


def _rows_of(tree: Any, numbers: Int[Array | np.ndarray, " kept"], order: CacheOrder) -> Any:
    """The rows with these numbers, of each array."""
    return _by_row(lambda x, row: jnp.take(x, jnp.asarray(numbers), axis=row), order, tree)


@partial(jax.jit, static_argnames="program", donate_argnames="slots")
def decode_chunk(
    weights: Weights,
    slots: Slots,
    alive: Bool[Array | np.ndarray, " batch"],
    stream: Key[Array, ""],
    steps: Int[Array | np.ndarray, ""],
    *,
    program: Program,
) -> tuple[Slots, Generated]:
    """Add up to `steps` tokens to the rows that are alive.

    Returns:
        The slots, and a copy of what was generated so far, on every device, which lives on when the slots are donated
        to the next chunk.
    """
    with on(program.mesh):
        slots = _split(_decoded(weights, slots, alive, stream, steps, program), program.order)
        return slots, jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), slots.out)


def _decoded(
    weights: Weights,
    slots: Slots,
    alive: Bool[Array | np.ndarray, " batch"],
    stream: Key[Array, ""],
    steps: Int[Array | np.ndarray, ""],
    program: Program,
) -> Slots:
    batch, ring = slots.cache.positions.shape
    coords = jnp.repeat(slots.coords, batch // len(slots.coords), axis=0)
    params = at_point(weights.params, weights.directions, coords)

    def unfinished(carry: tuple[Int[Array, ""], Slots]) -> Bool[Array, ""]:
        return (carry[0] < steps) & ~carry[1].out.ended.all()

    def step(carry: tuple[Int[Array, ""], Slots]) -> tuple[Int[Array, ""], Slots]:
        count, slots = carry
        out = slots.out
        last = jnp.take_along_axis(out.tokens, jnp.maximum(out.lengths - 1, 0)[:, None], axis=1)
        positions = jnp.where(out.ended, -1, slots.starts + out.lengths - 1)[:, None]
        context = Context(slots.cache, slots.clock % ring, slots.prefix)
        logits, cache = forward(program.config, params, last, positions, context, order=program.order)
        out = _choose(program, logits[:, 0], out, slots.rows, stream)
        return count + 1, _split(slots._replace(out=out, cache=cache, clock=slots.clock + 1), program.order)

    slots = slots._replace(out=slots.out._replace(ended=slots.out.ended | ~alive))
    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), slots))[1]


@partial(jax.jit, static_argnames="program")
def compact(
    slots: Slots,
    rows: Int[Array | np.ndarray, " fewer"],
    places: Int[Array | np.ndarray, " fewer_places"],
    *,
    program: Program,
) -> Slots:
    """Some of the rows and their places, gathered into fewer slots; the old ones stay as they are."""
    moved = _rows_of((slots.out, slots.starts, slots.rows, slots.cache), rows, program.order)
    kept = _rows_of((slots.prefix, slots.coords), places, program.order)
    with on(program.mesh):
        return _split(Slots(*moved, *kept, slots.clock), program.order)  # type: ignore[call-arg]


def _choose(
    program: Program,
    logits: Float[Array, "batch vocab"],
    out: Generated,
    rows: Int[Array, " batch"],
    stream: Key[Array, ""],
) -> Generated:
    """Add a token to the rows that go on; a row ends at an end token, the limit, or a logit that is not finite."""
    highest = logits.max(-1)
    finite = jnp.isfinite(highest) & jnp.isfinite(logits.min(-1))
    if program.sampling.temperature == 0:
        # What argmax gives, in two passes that XLA vectorises on a CPU, where argmax takes a tenth of a step.
        token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        chosen = jnp.where(logits == highest[:, None], token, logits.shape[-1] - 1).min(-1)
    else:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(stream, rows)
        chosen = sample(logits, jax.vmap(jax.random.fold_in)(keys, out.lengths), program.sampling)
    going = ~out.ended & finite & ~jnp.isin(chosen, jnp.asarray(program.eos_token_ids, jnp.int32))
    lengths = out.lengths + going
    here = going[:, None] & (jnp.arange(out.tokens.shape[1]) == out.lengths[:, None])
    return Generated(
        tokens=jnp.where(here, chosen[:, None], out.tokens),
        lengths=lengths,
        ended=~going | (lengths == out.tokens.shape[1]),
        finite=out.finite & (finite | out.ended),
    )


def sample(logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"], sampling: Sampling) -> Int[Array, " batch"]:
    """A draw for each row. Top-k and top-p act on the logits after the temperature, in this order."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The most likely token is always kept: nothing stands before it.
        least = jnp.where(before < sampling.top_p, descending, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
