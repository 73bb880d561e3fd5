"""The decoder: a Llama-architecture transformer in Flax, and its key-value cache.

Parameters have the names and layouts of a Hugging Face checkpoint: the tree's path, joined with dots, *is* the
checkpoint's tensor name, and a linear layer's weight is [out, in]. Converting a checkpoint is therefore renaming
nothing and transposing nothing.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxscape.models.config import ModelConfig

HIGHEST = jax.lax.Precision.HIGHEST  # float32 means float32: accelerators would round products to fewer bits


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
    """

    keys: tuple[Float[Array, "batch kv_heads slots head_dim"], ...]
    values: tuple[Float[Array, "batch kv_heads slots head_dim"], ...]
    positions: Int[Array, "batch slots"]

    def padded(self, extra: int) -> "KVCache":
        """This cache with `extra` empty slots after the present ones."""

        def grow(x: Array) -> Array:
            return jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0)))

        return KVCache(
            keys=tuple(map(grow, self.keys)),
            values=tuple(map(grow, self.values)),
            positions=jnp.pad(self.positions, ((0, 0), (0, extra)), constant_values=-1),
        )


class Linear(nn.Module):
    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        weight = self.param("weight", nn.initializers.normal(0.02), (self.features, x.shape[-1]))
        y = apply_weight(weight, lambda w: jnp.einsum("...i,oi->...o", x, w, precision=HIGHEST))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + apply_weight(bias, lambda b: b)
        return y


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467), computed in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return apply_weight(weight, lambda w: normed.astype(x.dtype) * w)


class Embedding(nn.Module):
    """Token embeddings; when they are tied, their transpose is also the output head."""

    config: ModelConfig

    def setup(self) -> None:
        shape = (self.config.vocab_size, self.config.hidden_size)
        self.weight = self.param("weight", nn.initializers.normal(0.02), shape)

    def __call__(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time dim"]:
        return apply_weight(self.weight, lambda w: jnp.take(w, tokens, axis=0, mode="clip"))

    def attend(self, x: Float[Array, "batch time dim"]) -> Float[Array, "batch time vocab"]:
        return apply_weight(self.weight, lambda w: jnp.einsum("...d,vd->...v", x, w, precision=HIGHEST))


def rope(
    x: Float[Array, "batch time heads head_dim"], angles: Float[Array, "batch time half"]
) -> Float[Array, "batch time heads head_dim"]:
    """Rotate the pairs (i, i + head_dim / 2) of each head by `angles`, in float32."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al., arXiv 2305.13245)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time dim"],
        positions: Int[Array, "batch time"],
        slot_positions: Int[Array, "batch slots"],
        cached: tuple[Array, Array] | None,
        slot: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "batch time dim"], tuple[Array, Array]]:
        c = self.config

        def project(name: str, heads: int) -> Float[Array, "batch time heads head_dim"]:
            y = Linear(heads * c.head_dim, c.attention_bias, name=name)(x)
            return y.reshape(*y.shape[:-1], heads, c.head_dim)

        angles = positions[..., None] * jnp.asarray(c.rope_frequencies, jnp.float32)
        q = rope(project("q_proj", c.num_heads), angles)
        k = rope(project("k_proj", c.num_kv_heads), angles).swapaxes(1, 2)
        v = project("v_proj", c.num_kv_heads).swapaxes(1, 2)
        v = jnp.where(positions[:, None, :, None] >= 0, v, 0)  # padding has weight 0, and 0 × NaN would be NaN
        if cached is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=2)
                for old, new in zip(cached, (k, v), strict=True)
            )

        q = q.reshape(*q.shape[:2], c.num_kv_heads, -1, c.head_dim)
        scores = jnp.einsum("btkgh,bksh->bkgts", q, k, precision=HIGHEST, preferred_element_type=jnp.float32)
        visible = (slot_positions[:, None] >= 0) & (slot_positions[:, None] <= positions[..., None])
        scores = jnp.where(visible[:, None, None], scores * c.head_dim**-0.5, jnp.finfo(jnp.float32).min)
        probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        y = jnp.einsum("bkgts,bksh->btkgh", probabilities, v, precision=HIGHEST)
        y = y.reshape(*x.shape[:2], c.num_heads * c.head_dim)
        return Linear(c.hidden_size, c.attention_bias, name="o_proj")(y), (k, v)


class MLP(nn.Module):
    """SwiGLU feed-forward layer (Shazeer, arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch time dim"]) -> Float[Array, "batch time dim"]:
        c = self.config
        gate = Linear(c.intermediate_size, c.mlp_bias, name="gate_proj")(x)
        up = Linear(c.intermediate_size, c.mlp_bias, name="up_proj")(x)
        return Linear(c.hidden_size, c.mlp_bias, name="down_proj")(nn.silu(gate) * up)


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
        x = x + y
        return x + MLP(self.config, name="mlp")(RMSNorm(epsilon, name="post_attention_layernorm")(x)), key_value


class Layers(nn.Module):
    """The stack, unrolled: each layer's cache is its own buffer, which XLA updates in place."""

    config: ModelConfig
    remat: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time dim"],
        positions: Int[Array, "batch time"],
        cache: KVCache | None,
        slot: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "batch time dim"], KVCache]:
        slots = positions
        if cache is not None:
            slots = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, slot, axis=1)
        keys, values = [], []
        layer = nn.remat(Layer) if self.remat else Layer
        for i in range(self.config.num_layers):
            cached = None if cache is None else (cache.keys[i], cache.values[i])
            x, (k, v) = layer(self.config, name=str(i))(x, positions, slots, cached, slot)
            keys.append(k)
            values.append(v)
        return x, KVCache(tuple(keys), tuple(values), slots)


class Backbone(nn.Module):
    """Embedding, layers and final norm; `attend` is the tied output head."""

    config: ModelConfig
    remat: bool

    def setup(self) -> None:
        self.embed_tokens = Embedding(self.config)
        self.layers = Layers(self.config, self.remat)
        self.norm = RMSNorm(self.config.rms_norm_eps)

    def __call__(
        self, tokens: Int[Array, "batch time"], positions: Int[Array, "batch time"], *cache_inputs: Any
    ) -> tuple[Float[Array, "batch time dim"], KVCache]:
        x, cache = self.layers(self.embed_tokens(tokens), positions, *cache_inputs)
        return self.norm(x), cache

    def attend(self, x: Float[Array, "batch time dim"]) -> Float[Array, "batch time vocab"]:
        return self.embed_tokens.attend(x)


class Decoder(nn.Module):
    """A causal language model: tokens to next-token logits.

    `Decoder(config).apply({"params": params}, tokens, positions, cache, slot)`.

    Arguments:
        tokens: int32[B, T].
        positions: int32[B, T], each token's place in its row's text; -1 marks padding.
        cache: what earlier calls returned (padded with empty slots for these tokens), or None to start one.
        slot: the first of the T cache slots that these tokens go to.
        last_only: compute the logits of the last column alone, as generation needs.

    Returns:
        float32[B, T or 1, V] logits, and the cache with these tokens in it (T slots if it was started here).

    With `remat`, a gradient keeps each layer's input alone and computes the rest again: less memory, a third more time.
    """

    config: ModelConfig
    remat: bool = False

    def setup(self) -> None:
        self.model = Backbone(self.config, self.remat)
        if not self.config.tie_word_embeddings:
            self.lm_head = Linear(self.config.vocab_size)

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        positions: Int[Array, "batch time"],
        cache: KVCache | None = None,
        slot: Int[Array, ""] | int = 0,
        *,
        last_only: bool = False,
    ) -> tuple[Float[Array, "batch out_time vocab"], KVCache]:
        x, cache = self.model(tokens, positions, cache, slot)
        x = x[:, -1:] if last_only else x
        logits = self.model.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)
        return logits.astype(jnp.float32), cache


def forward(
    config: ModelConfig,
    params: dict[str, Any],
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "batch time"],
    cache: KVCache | None = None,
    slot: Int[Array, ""] | int = 0,
    *,
    last_only: bool = False,
    remat: bool = False,
) -> tuple[Float[Array, "batch out_time vocab"], KVCache]:
    """`Decoder` as a pure function; see there."""
    output: Any = Decoder(config, remat).apply({"params": params}, tokens, positions, cache, slot, last_only=last_only)
    return output


@lru_cache
def parameter_shapes(config: ModelConfig) -> dict[str, Any]:
    """The decoder's parameter tree with `jax.ShapeDtypeStruct` leaves; nothing is computed."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens, tokens)["params"]
