"""The decoder of all families: a configurable transformer in Flax, and its key-value cache.

Parameters have the names and layouts of a Hugging Face checkpoint: the tree's path, joined with dots, *is* the
checkpoint's tensor name, and a linear layer's weight is [out, in]. Converting a checkpoint is therefore renaming
nothing and transposing nothing. Beside each parameter, and where activations need it, stand the logical axes of its
dimensions; `jaxscape.sharding` says over which devices they are split.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial, reduce
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxscape.models import kernels
from jaxscape.models.cache import CPU_ORDER, CacheOrder, Context, KVCache
from jaxscape.models.config import ModelConfig
from jaxscape.models.rope import Rotation, rope, rotation
from jaxscape.runtime.sharding import Axes, constrain

# float32 means float32: accelerators would round products to fewer bits.
_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@runtime_checkable
class SummedWeight(Protocol):
    """A weight that is not an array but, say, a sum of arrays."""

    def apply(self, use: Callable[[Array], Array]) -> Array: ...


def apply_weight(weight: Array | SummedWeight, use: Callable[[Array], Array]) -> Array:
    """`use(weight)`, for a `use` that is linear in the weight.

    The decoder touches its weights here and nowhere else, and only linearly (matrix products, look-ups, scales,
    biases), so anything that can say what a linear function of it gives can stand in for an array.
    """
    if isinstance(weight, jax.Array):
        return use(weight)
    return weight.apply(use)


class LayerContext(NamedTuple):
    """One layer's part of a `Context`, and what is the same for all layers."""

    own: tuple[Array, Array] | None
    slot: Int[Array, ""] | int
    prefix: tuple[Array, Array] | None
    visible: Bool[Array, "batch time slots"]
    rotation: "Rotation | None"


def _named(initializer: Any, axes: Axes) -> Any:
    """The initializer of a parameter whose dimensions have these logical axes."""
    return nn.with_partitioning(initializer, axes)


class Linear(nn.Module):
    features: int
    axes: Axes
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        normal = _named(nn.initializers.normal(0.02), self.axes)
        weight = self.param("weight", normal, (self.features, x.shape[-1]))
        y = apply_weight(weight, lambda w: _einsum("...i,oi->...o", x, w))
        if self.use_bias:
            zeros = _named(nn.initializers.zeros, self.axes[:1])
            bias = self.param("bias", zeros, (self.features,))
            y = y + apply_weight(bias, lambda b: b)
        return y


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467), computed in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        weight = self.param("weight", _named(nn.initializers.ones, (None,)), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.config.rms_norm_eps)
        if not self.config.norm_in_float32:
            normed = normed.astype(x.dtype)
        scaled = apply_weight(weight, lambda w: normed * w)
        return (scaled + self.config.norm_offset * normed if self.config.norm_offset else scaled).astype(x.dtype)


class Embedding(nn.Module):
    """Token embeddings; when they are tied, their transpose is also the output head."""

    config: ModelConfig

    def setup(self) -> None:
        normal = _named(nn.initializers.normal(0.02), ("vocab", "embed"))
        self.weight = self.param("weight", normal, (self.config.vocab_size, self.config.hidden_size))

    def __call__(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time dim"]:
        x = apply_weight(self.weight, lambda w: jnp.take(w, tokens, axis=0, mode="clip"))
        scale = self.config.embedding_scale
        return x if scale == 1 else x * jnp.asarray(scale, x.dtype)

    def attend(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocab"]:
        return apply_weight(self.weight, lambda w: _einsum("...d,vd->...v", x, w))


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al., arXiv 2305.13245)."""

    config: ModelConfig
    order: CacheOrder
    kernel: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time dim"], positions: Int[Array, "batch time"], context: LayerContext
    ) -> tuple[Float[Array, "batch time dim"], tuple[Array, Array]]:
        c, order = self.config, self.order

        q, k, v = self._projected(x)
        if context.rotation is not None:
            q, k = rope(q, context.rotation), rope(k, context.rotation)
        # What a token does not attend to has weight 0, but 0 × NaN would be NaN: values that are not finite become NaN
        # keys instead, which those that attend to them see, and nobody else.
        finite = jnp.isfinite(v).all(-1, keepdims=True)
        k = jnp.where(finite, k, jnp.nan)
        v = jnp.where(finite & (positions[..., None, None] >= 0), v, 0)
        whole = k.swapaxes(1, 2), v.swapaxes(1, 2)
        k, v = (
            constrain(x.transpose(*map("bskh".index, to)), *axes)
            for x, to, axes in zip((k, v), order.both, order.axes, strict=True)
        )

        batch, time = x.shape[:2]
        # The queries of a key-value head are the rows of one product, also when there is one token only.
        q = q.reshape(batch, time, c.num_kv_heads, -1, c.head_dim).transpose(0, 2, 3, 1, 4)
        q = constrain(q, "rows", "kv_heads", "group", None, None)

        def output(y: Float[Array, "batch kv_heads *queries head_dim"]) -> Float[Array, "batch time dim"]:
            y = y.reshape(batch, -1, time, c.head_dim).swapaxes(1, 2).reshape(batch, time, -1)
            return Linear(c.hidden_size, (None, "heads"), c.o_bias, name="o_proj")(y)

        if self.kernel:
            return output(kernels.attention(q * c.score_scale, *whole, positions >= 0)), (k, v)
        q = q.reshape(batch, c.num_kv_heads, -1, c.head_dim)
        new, own, prefix = (k, v), context.own, context.prefix
        if own is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, x, context.slot, axis=to.index("s"))
                for old, x, to in zip(own, new, order.both, strict=True)
            )
        sources = [(k, v)] if own is None or not order.is_read_first else [own, new]
        if prefix is not None and time == 1:
            sources = [prefix, *sources]
        elif prefix is not None:  # many tokens a row: a copy of the prefix beside them costs little
            longer = [
                jnp.concatenate([_repeated(shared, to.index("b"), batch), x], axis=to.index("s"))
                for shared, x, to in zip(prefix, sources[0], order.both, strict=True)
            ]
            sources[0] = (longer[0], longer[1])
        parts = [_scores(q, keys, order) for keys, _ in sources]
        ends = np.cumsum([part.shape[-1] for part in parts])[:-1]
        visible = jnp.split(context.visible, ends, axis=-1)
        capped = (_softcapped(part * c.score_scale, c.attention_softcap) for part in parts)
        weights = _softmax([_masked(part, seen) for part, seen in zip(capped, visible, strict=True)])
        mixed = [_mixed(w.astype(v.dtype), values, order) for w, (_, values) in zip(weights, sources, strict=True)]
        return output(sum(mixed[1:], start=mixed[0]).astype(x.dtype)), (k, v)

    def _projected(self, x: Float[Array, "batch time dim"]) -> list[Float[Array, "batch time _ head_dim"]]:
        """Queries, keys and values, normalised where the family does so."""
        c = self.config
        heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
        if c.is_fused:
            fused = Linear(sum(heads.values()) * c.head_dim, ("heads", None), c.qkv_bias, name="qkv_proj")(x)
            ends = np.cumsum([n * c.head_dim for n in heads.values()])[:-1]
            found = dict(zip(heads, jnp.split(fused, ends, axis=-1), strict=True))
        else:
            axes: dict[str, Axes] = {"q": ("heads", None), "k": ("kv_heads", None), "v": ("kv_heads", None)}
            found = {
                name: Linear(n * c.head_dim, axes[name], c.qkv_bias, name=f"{name}_proj")(x)
                for name, n in heads.items()
            }
        for name in ("q", "k") if c.qk_norm else ():
            whole = found[name]
            each = whole.reshape(*whole.shape[:-1], -1, c.head_dim) if c.qk_norm == "head" else whole
            found[name] = RMSNorm(c, name=f"{name}_norm")(each)
        return [found[name].reshape(*x.shape[:-1], n, c.head_dim) for name, n in heads.items()]


def _repeated(x: Array, axis: int, length: int) -> Array:
    """Each row along an axis, so often that there are `length` of them."""
    return jnp.repeat(x, length // x.shape[axis], axis=axis)


def _softcapped(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """Numbers between -cap and cap (Gemma 2, arXiv 2408.00118)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _masked(scores: Float[Array, "batch kv_heads queries slots"], visible: Bool[Array, "batch time slots"]) -> Array:
    """The scores, with the least number for what is not visible; queries are those of each time in turn."""
    batch, time, slots = visible.shape
    by_time = scores.reshape(batch, -1, time, slots)
    return jnp.where(visible[:, None], by_time, jnp.finfo(jnp.float32).min).reshape(scores.shape)


def _softmax(parts: Sequence[Float[Array, "batch kv_heads queries _"]]) -> list[Array]:
    """Over the last axis of all parts together; put together and split again, they would be copied twice on a TPU."""
    if len(parts) == 1:  # its gradient keeps the result alone
        return [jax.nn.softmax(parts[0], axis=-1)]
    most = reduce(jnp.maximum, (part.max(-1, keepdims=True) for part in parts))
    powers = [jnp.exp(part - most) for part in parts]
    total = sum(part.sum(-1, keepdims=True) for part in powers)
    return [part / total for part in powers]


def _scores(q: Float[Array, "batch kv_heads queries head_dim"], keys: Array, order: CacheOrder) -> Array:
    """float32[batch, kv_heads, queries, slots], of the queries with the keys."""
    return _product("bkqh", q, keys, order.keys, "bkqs", order.queries)


def _mixed(weights: Float[Array, "batch kv_heads queries slots"], values: Array, order: CacheOrder) -> Array:
    """float32[batch, kv_heads, queries, head_dim], the values as they are weighted."""
    return _product("bkqs", weights, values, order.values, "bkqh", order.queries)


def _product(terms: str, x: Array, cached: Float[Array, "_ _ _ _"], order: str, into: str, queries: int) -> Array:
    """In float32. A row of what is cached is that of as many rows as there are for each."""
    rows = cached.shape[order.index("b")]
    if rows < x.shape[0]:
        grouped = x.reshape(rows, -1, *x.shape[1:])
        products = f"n{terms},{order.replace('b', 'n')}->n{into}"
        return _einsum(products, grouped, cached, preferred_element_type=jnp.float32).reshape(*x.shape[:3], -1)
    alone = x.shape[2] == 1
    if alone:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, queries - 1), (0, 0)))
    y = _einsum(f"{terms},{order}->{into}", x, cached, preferred_element_type=jnp.float32)
    # XLA would make one row of it again if one were taken, and not summed up.
    return y.sum(2, keepdims=True) if alone and queries > 1 else y


class MLP(nn.Module):
    """SwiGLU or GeGLU feed-forward layer (Shazeer, arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch time dim"]) -> Float[Array, "batch time dim"]:
        c = self.config
        if c.is_fused:
            both = Linear(2 * c.intermediate_size, ("mlp", None), c.mlp_bias, name="gate_up_proj")(x)
            gate, up = (constrain(part, "rows", None, "mlp") for part in jnp.split(both, 2, axis=-1))
        else:
            gate = Linear(c.intermediate_size, ("mlp", None), c.mlp_bias, name="gate_proj")(x)
            up = Linear(c.intermediate_size, ("mlp", None), c.mlp_bias, name="up_proj")(x)
        active = nn.silu(gate) if c.activation == "silu" else nn.gelu(gate, approximate=True)
        return Linear(c.hidden_size, (None, "mlp"), c.mlp_bias, name="down_proj")(active * up)


class Layer(nn.Module):
    config: ModelConfig
    order: CacheOrder
    kernel: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time dim"], *attention_inputs: Any
    ) -> tuple[Float[Array, "batch time dim"], tuple[Array, Array]]:
        c = self.config

        def norm(name: str | None, x: Float[Array, "batch time dim"]) -> Float[Array, "batch time dim"]:
            return x if name is None else RMSNorm(c, name=name)(x)

        before_attention, after_attention, before_mlp, after_mlp = c.norms
        attention = Attention(c, self.order, self.kernel, name="self_attn")
        y, key_value = attention(norm(before_attention, x), *attention_inputs)
        x = constrain(x + norm(after_attention, y), "rows", None, None)
        y = MLP(c, name="mlp")(norm(before_mlp, x))
        return constrain(x + norm(after_mlp, y), "rows", None, None), key_value


class Layers(nn.Module):
    """The stack, unrolled: each layer's cache is its own buffer, which XLA updates in place."""

    config: ModelConfig
    remat: bool
    order: CacheOrder
    kernel: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time dim"], positions: Int[Array, "batch time"], context: Context
    ) -> tuple[Float[Array, "batch time dim"], KVCache]:
        cache, prefix = context.cache, context.prefix
        slots = positions
        if cache is not None:
            slots = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, context.slot, axis=1)
        c = self.config
        kinds = [c.kind(i) for i in range(c.num_layers)]
        visible = {
            window: _visible(positions, slots, context, self.order, window)
            for window in dict.fromkeys(kind.window for kind in kinds)
        }
        rotations = {
            rope: None if rope is None else rotation(rope, positions)
            for rope in dict.fromkeys(kind.rope for kind in kinds)
        }
        keys, values = [], []
        layer = nn.remat(Layer) if self.remat else Layer
        for i, kind in enumerate(kinds):
            layer_context = LayerContext(
                own=None if cache is None else (cache.keys[i], cache.values[i]),
                slot=context.slot,
                prefix=None if prefix is None else (prefix.keys[i], prefix.values[i]),
                visible=visible[kind.window],
                rotation=rotations[kind.rope],
            )
            x, (k, v) = layer(c, self.order, self.kernel, name=str(i))(x, positions, layer_context)
            keys.append(k)
            values.append(v)
        return x, KVCache(tuple(keys), tuple(values), slots)


def _visible(
    positions: Int[Array, "batch time"],
    slots: Int[Array, "batch slots"],
    context: Context,
    order: CacheOrder,
    window: int | None,
) -> Bool[Array, "batch time sources"]:
    """Which slots each token attends to: of the prefix, of the cache, and, where this is read as it was before them, of
    the tokens themselves."""

    def near(slots: Int[Array, "batch slots"]) -> Bool[Array, "batch time slots"] | Bool[Array, ""]:
        return jnp.array(True) if window is None else slots[:, None] > positions[..., None] - window

    if context.cache is not None and order.is_read_first:
        nothing = jnp.full_like(positions, -1)
        left = jax.lax.dynamic_update_slice_in_dim(slots, nothing, context.slot, axis=1)
        slots = jnp.concatenate([left, positions], axis=1)
    visible = (slots[:, None] >= 0) & (slots[:, None] <= positions[..., None]) & near(slots)
    if context.segments is not None:
        visible &= context.segments[:, :, None] == context.segments[:, None, :]
    if context.prefix is not None:
        before = _repeated(context.prefix.positions, 0, len(positions))
        shared = jnp.broadcast_to(near(before), (*positions.shape, before.shape[1]))
        visible = jnp.concatenate([shared, visible], axis=-1)
    return visible


class Backbone(nn.Module):
    """Embedding, layers and final norm; `attend` is the tied output head."""

    config: ModelConfig
    remat: bool
    order: CacheOrder
    kernel: bool

    def setup(self) -> None:
        self.embed_tokens = Embedding(self.config)
        self.layers = Layers(self.config, self.remat, self.order, self.kernel)
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

    def setup(self) -> None:
        self.model = Backbone(self.config, self.remat, self.order, self.kernel)
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
    """The decoder as a pure function.

    Arguments:
        tokens: int32[B, T].
        positions: int32[B, T], each token's place in its text; -1 marks padding.
        context: what they can attend to besides one another, see `Context`.
        remat: let a gradient keep each layer's input alone and compute the rest again: less memory, a third more time.
        order: of all caches, those in the context and the one that is returned.
        kernel: compute attention by JAX's kernel for TPUs, see `jaxscape.models.kernels`; only without a context.

    Returns:
        float32[B, T, V] logits, and the cache with these tokens in it (T slots if it was started here).
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
) -> tuple[Float[Array, "batch time dim"], KVCache]:
    """`forward` up to the output head, for those who need the logits of few tokens."""
    decoder = Decoder(config, order=order)
    output: Any = decoder.apply({"params": params}, tokens, positions, context, method="states")
    return output


def head(config: ModelConfig, params: dict[str, Any], x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocab"]:
    """The logits of hidden states, float32."""
    output: Any = Decoder(config).apply({"params": params}, x, method="head")
    return output


@lru_cache
def parameter_shapes(config: ModelConfig) -> dict[str, Any]:
    """The decoder's parameter tree with `jax.ShapeDtypeStruct` leaves; nothing is computed."""
    return nn.unbox(_parameters(config))


@lru_cache
def parameter_axes(config: ModelConfig) -> dict[str, Any]:
    """The logical axes of each parameter's dimensions, in a tree like the parameters; see `jaxscape.sharding`."""
    return jax.tree.map(
        lambda boxed: boxed.names, _parameters(config), is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
    )


def _parameters(config: ModelConfig) -> dict[str, Any]:
    """As Flax makes them: each shape in a box with its axes."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens, tokens, Context())["params"]
