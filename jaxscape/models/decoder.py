"""The decoder: a Llama-architecture transformer in Flax, and its key-value cache.

Parameters have the names and layouts of a Hugging Face checkpoint: the tree's path, joined with dots, *is* the
checkpoint's tensor name, and a linear layer's weight is [out, in]. Converting a checkpoint is therefore renaming
nothing and transposing nothing. Beside each parameter, and where activations need it, stand the logical axes of its
dimensions; `jaxscape.sharding` says over which devices they are split.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxscape.models.config import ModelConfig
from jaxscape.sharding import Axes, constrain

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


class KVCache(NamedTuple):
    """Keys and values per layer, and the position that each slot holds.

    A slot whose position is -1 holds nothing and is never attended to. A query at position p attends to the slots
    with positions 0 to p, so where in the cache a token lies does not matter, and rows may be padded on either side.
    Keys have their slots last and values their features: so both products of attention read them as they lie.
    """

    keys: tuple[Float[Array, "batch kv_heads head_dim slots"], ...]
    values: tuple[Float[Array, "batch kv_heads slots head_dim"], ...]
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


class Memory(NamedTuple):
    """One layer's part of a `Context`, and what is the same for all layers."""

    own: tuple[Array, Array] | None
    slot: Int[Array, ""] | int
    prefix: tuple[Array, Array] | None
    visible: Bool[Array, "batch time slots"]
    rotation: "Rotation"


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

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        weight = self.param("weight", _named(nn.initializers.ones, (None,)), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return apply_weight(weight, lambda w: normed.astype(x.dtype) * w)


class Embedding(nn.Module):
    """Token embeddings; when they are tied, their transpose is also the output head."""

    config: ModelConfig

    def setup(self) -> None:
        normal = _named(nn.initializers.normal(0.02), ("vocab", "embed"))
        self.weight = self.param("weight", normal, (self.config.vocab_size, self.config.hidden_size))

    def __call__(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time dim"]:
        return apply_weight(self.weight, lambda w: jnp.take(w, tokens, axis=0, mode="clip"))

    def attend(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocab"]:
        return apply_weight(self.weight, lambda w: _einsum("...d,vd->...v", x, w))


class Rotation(NamedTuple):
    """The cosines, and the sines with the signs that they have in `rope`, of each token's angles, in float32."""

    cos: Float[Array, "batch time 1 2 half"]
    sin: Float[Array, "batch time 1 2 half"]


def rotation(config: ModelConfig, positions: Int[Array, "batch time"]) -> Rotation:
    angles = positions[..., None] * jnp.asarray(config.rope_frequencies, jnp.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    # All layers read them: behind a barrier, they are not computed again in each.
    both = jnp.stack([cos, cos], axis=-2), jnp.stack([-sin, sin], axis=-2)
    cos, sin = jax.lax.optimization_barrier(both)
    return Rotation(cos[:, :, None], sin[:, :, None])


def rope(x: Float[Array, "batch time heads head_dim"], by: Rotation) -> Float[Array, "batch time heads head_dim"]:
    """Rotate the pairs (i, i + head_dim / 2) of each head (Su et al., arXiv 2104.09864), in float32."""
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    return (halves * by.cos + jnp.flip(halves, -2) * by.sin).reshape(x.shape).astype(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al., arXiv 2305.13245)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time dim"], positions: Int[Array, "batch time"], memory: Memory
    ) -> tuple[Float[Array, "batch time dim"], tuple[Array, Array]]:
        c = self.config

        def project(name: str, heads: int, axis: str) -> Float[Array, "batch time heads head_dim"]:
            y = Linear(heads * c.head_dim, (axis, None), c.attention_bias, name=name)(x)
            return y.reshape(*y.shape[:-1], heads, c.head_dim)

        q = rope(project("q_proj", c.num_heads, "heads"), memory.rotation)
        k = rope(project("k_proj", c.num_kv_heads, "kv_heads"), memory.rotation).transpose(0, 2, 3, 1)
        v = project("v_proj", c.num_kv_heads, "kv_heads").swapaxes(1, 2)
        k, v = (constrain(x, "rows", "kv_heads", None, None) for x in (k, v))
        # What a token does not attend to has weight 0, but 0 × NaN would be NaN: values that are not finite become NaN
        # keys instead, which those that attend to them see, and nobody else.
        finite = jnp.isfinite(v).all(-1, keepdims=True)
        k = jnp.where(finite.swapaxes(2, 3), k, jnp.nan)
        v = jnp.where(finite & (positions[:, None, :, None] >= 0), v, 0)
        if memory.own is not None:
            old_k, old_v = memory.own
            k = jax.lax.dynamic_update_slice_in_dim(old_k, k, memory.slot, axis=3)
            v = jax.lax.dynamic_update_slice_in_dim(old_v, v, memory.slot, axis=2)

        batch, time = x.shape[:2]
        # The queries of a key-value head are the rows of one product, also when there is one token only.
        q = q.reshape(batch, time, c.num_kv_heads, -1, c.head_dim).transpose(0, 2, 3, 1, 4)
        q = constrain(q, "rows", "kv_heads", "group", None, None)
        q = q.reshape(batch, c.num_kv_heads, -1, c.head_dim)
        prefix, keys, values = memory.prefix, k, v
        if prefix is not None and time > 1:  # many tokens a row: a copy of the prefix beside them costs little
            each = [jnp.repeat(x, batch // len(x), axis=0) for x in prefix]
            keys, values = jnp.concatenate([each[0], k], axis=3), jnp.concatenate([each[1], v], axis=2)
            prefix = None
        scores = _einsum("bkqh,bkhs->bkqs", q, keys, preferred_element_type=jnp.float32)
        if prefix is not None:
            grouped = q.reshape(len(prefix[0]), -1, *q.shape[1:])
            shared = _einsum("nbkqh,nkhp->nbkqp", grouped, prefix[0], preferred_element_type=jnp.float32)
            scores = jnp.concatenate([shared.reshape(*scores.shape[:-1], -1), scores], axis=-1)
        scores = scores.reshape(batch, -1, time, scores.shape[-1]) * c.head_dim**-0.5
        scores = jnp.where(memory.visible[:, None], scores, jnp.finfo(jnp.float32).min)
        probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(*q.shape[:3], -1)
        split = probabilities.shape[-1] - values.shape[2]
        y = _einsum("bkqs,bksh->bkqh", probabilities[..., split:], values)
        if prefix is not None:
            shared = probabilities[..., :split].reshape(*shared.shape)
            y += _einsum("nbkqp,nkph->nbkqh", shared, prefix[1]).reshape(y.shape)
        y = y.reshape(batch, -1, time, c.head_dim).swapaxes(1, 2).reshape(batch, time, -1)
        return Linear(c.hidden_size, (None, "heads"), c.attention_bias, name="o_proj")(y), (k, v)


class MLP(nn.Module):
    """SwiGLU feed-forward layer (Shazeer, arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch time dim"]) -> Float[Array, "batch time dim"]:
        c = self.config
        gate = Linear(c.intermediate_size, ("mlp", None), c.mlp_bias, name="gate_proj")(x)
        up = Linear(c.intermediate_size, ("mlp", None), c.mlp_bias, name="up_proj")(x)
        return Linear(c.hidden_size, (None, "mlp"), c.mlp_bias, name="down_proj")(nn.silu(gate) * up)


class Layer(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time dim"], *attention_inputs: Any
    ) -> tuple[Float[Array, "batch time dim"], tuple[Array, Array]]:
        epsilon = self.config.rms_norm_eps
        y, key_value = Attention(self.config, name="self_attn")(
            RMSNorm(epsilon, name="input_layernorm")(x), *attention_inputs
        )
        x = constrain(x + y, "rows", None, None)
        y = MLP(self.config, name="mlp")(RMSNorm(epsilon, name="post_attention_layernorm")(x))
        return constrain(x + y, "rows", None, None), key_value


class Layers(nn.Module):
    """The stack, unrolled: each layer's cache is its own buffer, which XLA updates in place."""

    config: ModelConfig
    remat: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time dim"], positions: Int[Array, "batch time"], context: Context
    ) -> tuple[Float[Array, "batch time dim"], KVCache]:
        cache, prefix = context.cache, context.prefix
        slots = positions
        if cache is not None:
            slots = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, context.slot, axis=1)
        visible, rotations = _visible(positions, slots, context), rotation(self.config, positions)
        keys, values = [], []
        layer = nn.remat(Layer) if self.remat else Layer
        for i in range(self.config.num_layers):
            memory = Memory(
                own=None if cache is None else (cache.keys[i], cache.values[i]),
                slot=context.slot,
                prefix=None if prefix is None else (prefix.keys[i], prefix.values[i]),
                visible=visible,
                rotation=rotations,
            )
            x, (k, v) = layer(self.config, name=str(i))(x, positions, memory)
            keys.append(k)
            values.append(v)
        return x, KVCache(tuple(keys), tuple(values), slots)


def _visible(
    positions: Int[Array, "batch time"], slots: Int[Array, "batch slots"], context: Context
) -> Bool[Array, "batch time all_slots"]:
    """Which slots, those of the prefix first, each token attends to."""
    visible = (slots[:, None] >= 0) & (slots[:, None] <= positions[..., None])
    if context.segments is not None:
        visible &= context.segments[:, :, None] == context.segments[:, None, :]
    if context.prefix is not None:
        shared = jnp.ones((*positions.shape, context.prefix.positions.shape[1]), bool)
        visible = jnp.concatenate([shared, visible], axis=-1)
    return visible


class Backbone(nn.Module):
    """Embedding, layers and final norm; `attend` is the tied output head."""

    config: ModelConfig
    remat: bool

    def setup(self) -> None:
        self.embed_tokens = Embedding(self.config)
        self.layers = Layers(self.config, self.remat)
        self.norm = RMSNorm(self.config.rms_norm_eps)

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

    def setup(self) -> None:
        self.model = Backbone(self.config, self.remat)
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
        return logits.astype(jnp.float32)


def forward(
    config: ModelConfig,
    params: dict[str, Any],
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "batch time"],
    context: Context = Context(),  # noqa: B008 (immutable)
    *,
    remat: bool = False,
) -> tuple[Float[Array, "batch time vocab"], KVCache]:
    """The decoder as a pure function.

    Arguments:
        tokens: int32[B, T].
        positions: int32[B, T], each token's place in its text; -1 marks padding.
        context: what they can attend to besides one another, see `Context`.
        remat: let a gradient keep each layer's input alone and compute the rest again: less memory, a third more time.

    Returns:
        float32[B, T, V] logits, and the cache with these tokens in it (T slots if it was started here).
    """
    output: Any = Decoder(config, remat).apply({"params": params}, tokens, positions, context)
    return output


def hidden_states(
    config: ModelConfig,
    params: dict[str, Any],
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "batch time"],
    context: Context,
) -> tuple[Float[Array, "batch time dim"], KVCache]:
    """`forward` up to the output head, for those who need the logits of few tokens."""
    output: Any = Decoder(config).apply({"params": params}, tokens, positions, context, method="states")
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
