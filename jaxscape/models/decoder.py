"""The decoder of all model families: one configurable transformer in Flax.

Parameters have the names and layouts of a Hugging Face checkpoint: a parameter's path, joined with dots, is the
checkpoint's tensor name, and the weight of a linear layer is [out, in]. So a checkpoint is loaded without renaming or
transposing. Each parameter is declared with the logical axes of its dimensions; `jaxscape.runtime.sharding` maps them
to axes of the mesh.

Letters of einsum strings and shapes: b rows of the batch, t tokens, k key-value heads, g query heads of each key-value
head, q queries of each key-value head (g × t, g first), s keys (cache slots or tokens), h features of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial, reduce
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxscape.models import decode_attention, kernels
from jaxscape.models.cache import CPU_ORDER, CacheOrder, Context, KeysValues, KVCache
from jaxscape.models.config import ModelConfig
from jaxscape.models.rope import Rotation, apply_rope, make_rotation
from jaxscape.runtime.sharding import Axes, constrain

# The precision is given because accelerators, by default, round the float32 inputs of matrix products to fewer bits.
_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@dataclass(frozen=True)
class Product:
    """The use of a matrix W [out, in] in the product x Wᵀ, for inputs x [B, ..., in]."""

    x: Array

    def __call__(self, weight: Array) -> Array:
        return _product(self.x, weight)

    def of_factors(self, left: Array, right: Array) -> Array:
        """x Wᵀ for W = leftᵀ right, which is not formed: two thin products.

        Arguments:
            left, right: [rank, out] and [rank, in]; or [N, rank, out] and [N, rank, in] for N matrices, each of which
                belongs to B / N consecutive rows.
        """
        return _product(_product(self.x, right), left.swapaxes(-1, -2))


@dataclass(frozen=True)
class LookUp:
    """The use of a matrix W [vocab, in] as a table: the rows of W for tokens [B, T]."""

    tokens: Int[Array, "batch time"]

    def __call__(self, weight: Array) -> Array:
        return jnp.take(weight, self.tokens, axis=0, mode="clip")

    def of_factors(self, left: Array, right: Array) -> Array:
        """As `Product.of_factors`: the rows of W = leftᵀ right, with `left` [rank, vocab] or [N, rank, vocab]."""
        tables = left.swapaxes(-1, -2)
        if tables.ndim == 2:
            return _product(self(tables), right.swapaxes(-1, -2))
        by_matrix = self.tokens.reshape(len(tables), -1, 1)
        rows = jnp.take_along_axis(tables, by_matrix, axis=1, mode="clip")
        return _product(rows.reshape(*self.tokens.shape, -1), right.swapaxes(-1, -2))


def _product(x: Float[Array, "*batch in"], weight: Array) -> Float[Array, "*batch out"]:
    """x Wᵀ for a matrix [out, in]; with N matrices [N, out, in], each is that of B / N consecutive rows of x."""
    if weight.ndim == 2:
        return _einsum("...i,oi->...o", x, weight)
    by_matrix = x.reshape(len(weight), -1, x.shape[-1])
    return _einsum("nbi,noi->nbo", by_matrix, weight).reshape(*x.shape[:-1], -1)


@runtime_checkable
class SummedWeight(Protocol):
    """A weight that is not one array but, for example, a sum of arrays. `apply_weight` says how the decoder uses it."""

    def apply(self, use: Any) -> Array: ...


def apply_weight(weight: Array | SummedWeight, use: Callable[[Array], Array]) -> Array:
    """`use(weight)`, for a function `use` that is linear in the weight.

    The decoder uses its weights only through this function (matrix products, look-ups, scales, biases). So any object
    that can compute a linear function of itself can replace an array: a perturbed weight or a LoRA weight, for example.
    A matrix is used by a `Product` or a `LookUp`, which can also be computed from factors of the matrix.
    """
    if isinstance(weight, jax.Array):
        return use(weight)
    return weight.apply(use)


def _partitioned(initializer: Any, axes: Axes) -> Any:
    """The initializer of a parameter whose dimensions have the logical axes `axes`."""
    return nn.with_partitioning(initializer, axes)


class Linear(nn.Module):
    """A linear layer, x Wᵀ + b, whose weight [out, in] has the logical axes `axes`."""

    features: int
    axes: Axes
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        normal = _partitioned(nn.initializers.normal(0.02), self.axes)
        weight = self.param("weight", normal, (self.features, x.shape[-1]))
        y = apply_weight(weight, Product(x))
        if self.use_bias:
            zeros = _partitioned(nn.initializers.zeros, self.axes[:1])
            bias = self.param("bias", zeros, (self.features,))
            y = y + apply_weight(bias, lambda b: b)
        return y


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467), computed in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        weight = self.param("weight", _partitioned(nn.initializers.ones, (None,)), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.config.rms_norm_eps)
        if not self.config.norm_in_float32:
            normed = normed.astype(x.dtype)
        scaled = apply_weight(weight, lambda w: normed * w)
        return (scaled + self.config.norm_offset * normed if self.config.norm_offset else scaled).astype(x.dtype)


class Embedding(nn.Module):
    """Token embeddings. When embeddings are tied, the same table is the output head (`attend`)."""

    config: ModelConfig

    def setup(self) -> None:
        normal = _partitioned(nn.initializers.normal(0.02), ("vocab", "embed"))
        self.weight = self.param("weight", normal, (self.config.vocab_size, self.config.hidden_size))

    def __call__(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time dim"]:
        x = apply_weight(self.weight, LookUp(tokens))
        scale = self.config.embedding_scale
        return x if scale == 1 else x * jnp.asarray(scale, x.dtype)

    def attend(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocab"]:
        return apply_weight(self.weight, Product(x))


class LayerContext(NamedTuple):
    """One layer's part of a `Context`, and the mask and the rotation, which all layers of its kind share.

    Attributes:
        cache, prefix: this layer's keys and values in the cache and in the prefix.
        slot: as in `Context`.
        visible: True where a token attends to a key. The keys are, in this order, those of the prefix, of the cache
            and of the new tokens; the last only if there is no cache or it is read before it is written to.
        rotation: RoPE's rotation of the new tokens; None for a layer without RoPE.
    """

    cache: KeysValues | None
    slot: Int[Array, ""] | int
    prefix: KeysValues | None
    visible: Bool[Array, "batch time keys"]
    rotation: Rotation | None


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al., arXiv 2305.13245).

    A call returns the output, and this layer's keys and values with dimensions in the order `order`: the cache with the
    new tokens written to it, or, without a cache, the keys and values of the new tokens.
    """

    config: ModelConfig
    order: CacheOrder
    kernel: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time dim"], positions: Int[Array, "batch time"], context: LayerContext
    ) -> tuple[Float[Array, "batch time dim"], KeysValues]:
        q, k, v = self._projections(x)  # [b, t, heads, h]
        if context.rotation is not None:
            q, k = apply_rope(q, context.rotation), apply_rope(k, context.rotation)
        # The kernel for decode steps does not read values that are masked.
        uses_decode_kernel = self.order.kernel and context.cache is not None and x.shape[1] == 1
        if not uses_decode_kernel:
            k, v = _without_nonfinite_values(k, v, positions)
        heads_first = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [b, k, t, h], as the kernel takes them
        new = self._in_cache_order(k, v)
        q = self._grouped(q)  # [b, k, g, t, h]
        if self.kernel:
            y = kernels.attention(q * self.config.score_scale, *heads_first, positions >= 0)
            return self._output(y), new
        if uses_decode_kernel:
            y, updated = self._attend_with_kernel(q[..., 0, :], new, context)
        else:
            y, updated = self._attend(q, new, context)
        return self._output(y.astype(x.dtype)), updated

    def _projections(self, x: Float[Array, "batch time dim"]) -> list[Float[Array, "batch time _ head_dim"]]:
        """Queries, keys and values, with query and key norms if the family has them."""
        c = self.config
        heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
        if c.is_fused:
            fused = Linear(sum(heads.values()) * c.head_dim, ("heads", None), c.qkv_bias, name="qkv_proj")(x)
            ends = np.cumsum([n * c.head_dim for n in heads.values()])[:-1]
            projections = dict(zip(heads, jnp.split(fused, ends, axis=-1), strict=True))
        else:
            axes: dict[str, Axes] = {"q": ("heads", None), "k": ("kv_heads", None), "v": ("kv_heads", None)}
            projections = {
                name: Linear(n * c.head_dim, axes[name], c.qkv_bias, name=f"{name}_proj")(x)
                for name, n in heads.items()
            }
        for name in ("q", "k") if c.qk_norm else ():
            y = projections[name]
            if c.qk_norm == "head":
                y = y.reshape(*y.shape[:-1], -1, c.head_dim)
            projections[name] = RMSNorm(c, name=f"{name}_norm")(y)
        return [projections[name].reshape(*x.shape[:-1], n, c.head_dim) for name, n in heads.items()]

    def _grouped(
        self, q: Float[Array, "batch time heads head_dim"]
    ) -> Float[Array, "batch kv_heads group time head_dim"]:
        """Queries grouped by key-value head, so that all queries of such a head are rows of one matrix product, even
        those of a single token."""
        batch, time, _, head_dim = q.shape
        q = q.reshape(batch, time, self.config.num_kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
        return constrain(q, "rows", "kv_heads", "group", None, None)

    def _in_cache_order(
        self, k: Float[Array, "batch time kv_heads head_dim"], v: Float[Array, "batch time kv_heads head_dim"]
    ) -> KeysValues:
        """Keys and values with the dimensions of the cache, sharded as the cache is."""
        key_axes, value_axes = self.order.axes
        k = constrain(k.transpose(*map("bskh".index, self.order.keys)), *key_axes)
        v = constrain(v.transpose(*map("bskh".index, self.order.values)), *value_axes)
        return k, v

    def _attend(
        self, q: Float[Array, "batch kv_heads group time head_dim"], new: KeysValues, context: LayerContext
    ) -> tuple[Float[Array, "batch kv_heads queries head_dim"], KeysValues]:
        """The float32 output of the queries' attention to the prefix, the cache and the new tokens; and the cache with
        the new tokens written to it."""
        c, order, cache = self.config, self.order, context.cache
        batch, kv_heads, _, time, head_dim = q.shape
        q = q.reshape(batch, kv_heads, -1, head_dim)

        updated = new if cache is None else _write(cache, new, context.slot, order)
        # Keys and values to attend to. They are not concatenated, because that would copy the cache.
        sources = [cache, new] if cache is not None and order.is_read_first else [updated]
        if context.prefix is not None and time == 1:
            sources = [context.prefix, *sources]
        elif context.prefix is not None:  # for many tokens, a copy of the prefix costs little
            sources = [_prepend(context.prefix, sources[0], order), *sources[1:]]
        scores = [_scores(q, keys, order) for keys, _ in sources]
        visible = jnp.split(context.visible, np.cumsum([part.shape[-1] for part in scores])[:-1], axis=-1)
        capped = (_softcapped(part * c.score_scale, c.attention_softcap) for part in scores)
        weights = _softmax([_masked(part, mask) for part, mask in zip(capped, visible, strict=True)])
        pairs = zip(weights, (values for _, values in sources), strict=True)
        outputs = [_weighted_values(w.astype(values.dtype), values, order) for w, values in pairs]
        return sum(outputs[1:], start=outputs[0]), updated

    def _attend_with_kernel(
        self, q: Float[Array, "batch kv_heads group head_dim"], new: KeysValues, context: LayerContext
    ) -> tuple[Float[Array, "batch kv_heads group head_dim"], KeysValues]:
        """`_attend` for one new token in each row, by the GPU kernel; the output has the dtype of the queries."""
        assert context.cache is not None
        updated = _write(context.cache, new, context.slot, self.order)
        sources = [updated] if context.prefix is None else [context.prefix, updated]
        scale, softcap = self.config.score_scale, self.config.attention_softcap
        return decode_attention.attention(q, sources, context.visible[:, 0], scale=scale, softcap=softcap), updated

    def _output(self, y: Float[Array, "batch kv_heads *queries head_dim"]) -> Float[Array, "batch time dim"]:
        """The output projection of all heads. The dimensions `queries` of y are [g, t] or [q]."""
        c = self.config
        batch = y.shape[0]
        y = y.reshape(batch, c.num_heads, -1, c.head_dim).swapaxes(1, 2)  # [b, t, heads, h]
        y = y.reshape(*y.shape[:2], -1)
        return Linear(c.hidden_size, (None, "heads"), c.o_bias, name="o_proj")(y)


def _without_nonfinite_values(
    k: Float[Array, "batch time kv_heads head_dim"],
    v: Float[Array, "batch time kv_heads head_dim"],
    positions: Int[Array, "batch time"],
) -> tuple[Float[Array, "batch time kv_heads head_dim"], Float[Array, "batch time kv_heads head_dim"]]:
    """Keys and values in which a value that is NaN or infinite affects only the tokens that attend to it.

    A masked value has the weight 0, but 0 × NaN is NaN. So values that are not finite are replaced by 0 and their keys
    by NaN, and the mask hides the keys' scores from all other tokens. The values of padding are replaced by 0 too.
    """
    is_finite = jnp.isfinite(v).all(-1, keepdims=True)
    k = jnp.where(is_finite, k, jnp.nan)
    v = jnp.where(is_finite & (positions[..., None, None] >= 0), v, 0)
    return k, v


def _write(cache: KeysValues, new: KeysValues, slot: Int[Array, ""] | int, order: CacheOrder) -> KeysValues:
    """The cache with new tokens written to the slots from `slot` on."""
    keys = jax.lax.dynamic_update_slice_in_dim(cache[0], new[0], slot, axis=order.keys.index("s"))
    values = jax.lax.dynamic_update_slice_in_dim(cache[1], new[1], slot, axis=order.values.index("s"))
    return keys, values


def _prepend(prefix: KeysValues, rows: KeysValues, order: CacheOrder) -> KeysValues:
    """New arrays with each row's keys and values: first those of its prefix, then its own."""

    def joined(shared: Array, own: Array, dimensions: str) -> Array:
        row_axis, slot_axis = dimensions.index("b"), dimensions.index("s")
        return jnp.concatenate([_repeat_rows(shared, row_axis, own.shape[row_axis]), own], axis=slot_axis)

    return joined(prefix[0], rows[0], order.keys), joined(prefix[1], rows[1], order.values)


def _repeat_rows(x: Array, axis: int, length: int) -> Array:
    """The array with each row along an axis repeated equally often, `length` rows in total."""
    return jnp.repeat(x, length // x.shape[axis], axis=axis)


def _scores(q: Float[Array, "batch kv_heads queries head_dim"], keys: Array, order: CacheOrder) -> Array:
    """Products of queries and keys, float32[b, k, q, s]: "bkqh,bksh->bkqs" for keys in the order "bksh"."""
    return _cache_einsum("bkqh", q, order.keys, keys, "bkqs", order.min_queries)


def _weighted_values(
    weights: Float[Array, "batch kv_heads queries keys"], values: Array, order: CacheOrder
) -> Float[Array, "batch kv_heads queries head_dim"]:
    """Weighted sums of values, float32[b, k, q, h]: "bkqs,bksh->bkqh" for values in the order "bksh"."""
    return _cache_einsum("bkqs", weights, order.values, values, "bkqh", order.min_queries)


def _cache_einsum(
    x_dims: str, x: Array, cache_dims: str, cached: Float[Array, "_ _ _ _"], output_dims: str, min_queries: int
) -> Array:
    """`einsum(f"{x_dims},{cache_dims}->{output_dims}", x, cached)` in float32; the third dimension of x is queries.

    The cached array may have fewer rows than x, N: each is shared by len(x) / N consecutive rows of x.
    """
    rows = cached.shape[cache_dims.index("b")]
    if rows < x.shape[0]:
        # Usually "nbkqh,nksh->nbkqs" and "nbkqs,nksh->nbkqh", with n cached rows, each shared by b rows of x.
        grouped = x.reshape(rows, -1, *x.shape[1:])
        equation = f"n{x_dims},{cache_dims.replace('b', 'n')}->n{output_dims}"
        return _einsum(equation, grouped, cached, preferred_element_type=jnp.float32).reshape(*x.shape[:3], -1)
    # Usually "bkqh,bksh->bkqs" and "bkqs,bksh->bkqh".
    equation = f"{x_dims},{cache_dims}->{output_dims}"
    if x.shape[2] > 1:
        return _einsum(equation, x, cached, preferred_element_type=jnp.float32)
    # A single query is padded with zeros to `min_queries`. The results of the padding are zeros too, so the sum of all
    # results is that of the query. If its result were sliced out instead, XLA would undo the padding.
    x = jnp.pad(x, ((0, 0), (0, 0), (0, min_queries - 1), (0, 0)))
    y = _einsum(equation, x, cached, preferred_element_type=jnp.float32)
    return y.sum(2, keepdims=True) if min_queries > 1 else y


def _softcapped(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """cap × tanh(x / cap), which lies between -cap and cap (Gemma 2, arXiv 2408.00118)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _masked(scores: Float[Array, "batch kv_heads queries keys"], visible: Bool[Array, "batch time keys"]) -> Array:
    """The scores, with the lowest float32 number for keys that are not visible."""
    batch, time, keys = visible.shape
    by_time = scores.reshape(batch, -1, time, keys)  # [b, k × g, t, s]
    return jnp.where(visible[:, None], by_time, jnp.finfo(jnp.float32).min).reshape(scores.shape)


def _softmax(parts: Sequence[Float[Array, "batch kv_heads queries _"]]) -> list[Array]:
    """Softmax over the last axis of all parts together; the result has the same parts.

    Concatenating the parts and splitting the result would copy them twice on a TPU.
    """
    if len(parts) == 1:  # its gradient keeps only its result, which saves memory in training
        return [jax.nn.softmax(parts[0], axis=-1)]
    largest = reduce(jnp.maximum, (part.max(-1, keepdims=True) for part in parts))
    powers = [jnp.exp(part - largest) for part in parts]
    total = sum(part.sum(-1, keepdims=True) for part in powers)
    return [part / total for part in powers]


class MLP(nn.Module):
    """SwiGLU or GeGLU feed-forward layer (Shazeer, arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch time dim"]) -> Float[Array, "batch time dim"]:
        c = self.config
        if c.is_fused:
            gate_up = Linear(2 * c.intermediate_size, ("mlp", None), c.mlp_bias, name="gate_up_proj")(x)
            gate, up = (constrain(part, "rows", None, "mlp") for part in jnp.split(gate_up, 2, axis=-1))
        else:
            gate = Linear(c.intermediate_size, ("mlp", None), c.mlp_bias, name="gate_proj")(x)
            up = Linear(c.intermediate_size, ("mlp", None), c.mlp_bias, name="up_proj")(x)
        active = nn.silu(gate) if c.activation == "silu" else nn.gelu(gate, approximate=True)
        return Linear(c.hidden_size, (None, "mlp"), c.mlp_bias, name="down_proj")(active * up)


class Layer(nn.Module):
    """Attention and the feed-forward layer, each with a residual connection and norms (see `ModelConfig.norms`)."""

    config: ModelConfig
    order: CacheOrder
    kernel: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time dim"], positions: Int[Array, "batch time"], context: LayerContext
    ) -> tuple[Float[Array, "batch time dim"], KeysValues]:
        c = self.config

        def norm(name: str | None, x: Float[Array, "batch time dim"]) -> Float[Array, "batch time dim"]:
            return x if name is None else RMSNorm(c, name=name)(x)

        before_attention, after_attention, before_mlp, after_mlp = c.norms
        attention = Attention(c, self.order, self.kernel, name="self_attn")
        y, keys_values = attention(norm(before_attention, x), positions, context)
        x = constrain(x + norm(after_attention, y), "rows", None, None)
        y = MLP(c, name="mlp")(norm(before_mlp, x))
        return constrain(x + norm(after_mlp, y), "rows", None, None), keys_values


class Layers(nn.Module):
    """The layers, in a Python loop instead of `jax.lax.scan`, so that each layer's cache is a buffer of its own, which
    XLA can update in place. Layers of equal shapes are traced and lowered once."""

    config: ModelConfig
    remat: bool
    order: CacheOrder
    kernel: bool
    shares_trace: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time dim"], positions: Int[Array, "batch time"], context: Context
    ) -> tuple[Float[Array, "batch time dim"], KVCache]:
        c, cache, prefix = self.config, context.cache, context.prefix
        slot_positions = positions
        if cache is not None:
            slot_positions = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, context.slot, axis=1)
        kinds = [c.kind(i) for i in range(c.num_layers)]
        # Masks and rotations are computed once for all layers of a kind.
        visible = {
            window: _visible(positions, slot_positions, context, self.order, window)
            for window in dict.fromkeys(kind.window for kind in kinds)
        }
        rotations = {
            rope: None if rope is None else make_rotation(rope, positions)
            for rope in dict.fromkeys(kind.rope for kind in kinds)
        }
        keys, values = [], []
        layer = nn.remat(Layer) if self.remat else Layer
        if self.shares_trace:
            layer = nn.jit(layer)
        for i, kind in enumerate(kinds):
            layer_context = LayerContext(
                cache=None if cache is None else (cache.keys[i], cache.values[i]),
                slot=context.slot,
                prefix=None if prefix is None else (prefix.keys[i], prefix.values[i]),
                visible=visible[kind.window],
                rotation=rotations[kind.rope],
            )
            x, (k, v) = layer(c, self.order, self.kernel, name=str(i))(x, positions, layer_context)
            keys.append(k)
            values.append(v)
        return x, KVCache(tuple(keys), tuple(values), slot_positions)


def _visible(
    positions: Int[Array, "batch time"],
    slot_positions: Int[Array, "batch slots"],
    context: Context,
    order: CacheOrder,
    window: int | None,
) -> Bool[Array, "batch time keys"]:
    """The mask `LayerContext.visible` of the layers with this window.

    Arguments:
        positions: the positions of the new tokens.
        slot_positions: the position of the token in each cache slot after the new tokens are written; without a cache,
            the same as `positions`.
    """

    def in_window(keys: Int[Array, "batch keys"]) -> Bool[Array, "batch time keys"] | Bool[Array, ""]:
        return jnp.array(True) if window is None else keys[:, None] > positions[..., None] - window

    key_positions = slot_positions
    if context.cache is not None and order.is_read_first:
        # Old tokens in the slots that are about to be written to are no longer visible.
        empty = jnp.full_like(positions, -1)
        remaining = jax.lax.dynamic_update_slice_in_dim(slot_positions, empty, context.slot, axis=1)
        key_positions = jnp.concatenate([remaining, positions], axis=1)
    is_causal = (key_positions[:, None] >= 0) & (key_positions[:, None] <= positions[..., None])
    visible = is_causal & in_window(key_positions)
    if context.segments is not None:
        visible &= context.segments[:, :, None] == context.segments[:, None, :]
    if context.prefix is not None:
        prefix_positions = _repeat_rows(context.prefix.positions, 0, len(positions))
        prefix_visible = (prefix_positions[:, None] >= 0) & in_window(prefix_positions)
        prefix_visible = jnp.broadcast_to(prefix_visible, (*positions.shape, prefix_positions.shape[1]))
        visible = jnp.concatenate([prefix_visible, visible], axis=-1)
    return visible


class Backbone(nn.Module):
    """Embedding, layers and final norm; `attend` is the output head of tied embeddings."""

    config: ModelConfig
    remat: bool
    order: CacheOrder
    kernel: bool
    shares_trace: bool

    def setup(self) -> None:
        self.embed_tokens = Embedding(self.config)
        self.layers = Layers(self.config, self.remat, self.order, self.kernel, self.shares_trace)
        self.norm = RMSNorm(self.config)

    def __call__(
        self, tokens: Int[Array, "batch time"], positions: Int[Array, "batch time"], context: Context
    ) -> tuple[Float[Array, "batch time dim"], KVCache]:
        x = constrain(self.embed_tokens(tokens), "rows", None, None)
        x, cache = self.layers(x, positions, context)
        return self.norm(x), cache

    def attend(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocab"]:
        return self.embed_tokens.attend(x)


class Decoder(nn.Module):
    """A causal language model: tokens to next-token logits; see `forward`."""

    config: ModelConfig
    remat: bool = False
    order: CacheOrder = CPU_ORDER
    kernel: bool = False
    shares_trace: bool = True

    def setup(self) -> None:
        self.model = Backbone(self.config, self.remat, self.order, self.kernel, self.shares_trace)
        if not self.config.tie_word_embeddings:
            self.lm_head = Linear(self.config.vocab_size, ("vocab", "embed"))

    def __call__(
        self, tokens: Int[Array, "batch time"], positions: Int[Array, "batch time"], context: Context
    ) -> tuple[Float[Array, "batch time vocab"], KVCache]:
        x, cache = self.model(tokens, positions, context)
        return self.head(x), cache

    def states(
        self, tokens: Int[Array, "batch time"], positions: Int[Array, "batch time"], context: Context
    ) -> tuple[Float[Array, "batch time dim"], KVCache]:
        return self.model(tokens, positions, context)

    def head(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocab"]:
        logits = self.model.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)
        return _softcapped(logits.astype(jnp.float32), self.config.logit_softcap)


def forward(
    config: ModelConfig,
    params: dict[str, Any],
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "batch time"],
    context: Context = Context(),  # noqa: B008 (immutable)
    *,
    remat: bool = False,
    order: CacheOrder = CPU_ORDER,
    kernel: bool = False,
) -> tuple[Float[Array, "batch time vocab"], KVCache]:
    """Next-token logits and the kv cache: the decoder as a pure function.

    Arguments:
        params: the decoder's parameters; a leaf is an array or a `SummedWeight`.
        tokens: int32[B, T].
        positions: int32[B, T], each token's position in its text, from 0; -1 marks padding.
        context: what the tokens attend to besides those of their own row, see `Context`.
        remat: keep only each layer's input for the backward pass, and compute the rest again there: a gradient takes
            less memory and about a third more time.
        order: the order of dimensions of all caches, those in the context and the returned one.
        kernel: compute attention with JAX's TPU kernel, see `jaxscape.models.kernels`; only without a context.

    Returns:
        float32[B, T, V] logits, and the cache with these tokens in it (a new one of T slots if the context has none).
    """
    output: Any = Decoder(config, remat, order, kernel).apply({"params": params}, tokens, positions, context)
    return output


def hidden_states(
    config: ModelConfig,
    params: dict[str, Any],
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "batch time"],
    context: Context,
    order: CacheOrder,
    *,
    shares_trace: bool = True,
) -> tuple[Float[Array, "batch time dim"], KVCache]:
    """The final hidden states [B, T, D] and the cache: `forward` without the output head, for callers that need the
    logits of few tokens.

    Arguments:
        shares_trace: whether layers of equal shapes are traced once. Set it to False to intercept each module's call.
    """
    decoder = Decoder(config, order=order, shares_trace=shares_trace)
    output: Any = decoder.apply({"params": params}, tokens, positions, context, method="states")
    return output


def head(config: ModelConfig, params: dict[str, Any], x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocab"]:
    """The float32 logits of hidden states: the output head of `forward`."""
    output: Any = Decoder(config).apply({"params": params}, x, method="head")
    return output


@lru_cache
def parameter_shapes(config: ModelConfig) -> dict[str, Any]:
    """The decoder's parameter tree with `jax.ShapeDtypeStruct` leaves, in float32; nothing is computed."""
    return nn.unbox(_parameters(config))


@lru_cache
def parameter_axes(config: ModelConfig) -> dict[str, Any]:
    """A tree like the parameters with the logical axes of their dimensions; see `jaxscape.runtime.sharding`."""
    return jax.tree.map(
        lambda boxed: boxed.names, _parameters(config), is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
    )


def _parameters(config: ModelConfig) -> dict[str, Any]:
    """The parameters' shapes as Flax returns them: each in a `nn.Partitioned` box with its logical axes.

    Only the first layer is traced, because all layers have the same parameters.
    """
    decoder, tokens = Decoder(replace(config, num_layers=1)), jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(decoder.init, jax.random.key(0), tokens, tokens, Context())["params"]
    (layer,) = params["model"]["layers"].values()
    return params | {"model": params["model"] | {"layers": {str(i): layer for i in range(config.num_layers)}}}
