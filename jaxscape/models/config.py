"""The configuration of the decoder: the sizes of a model, and the options in which model families differ."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from jaxscape.models.rope import Rope
from jaxscape.runtime.errors import UserError


@dataclass(frozen=True)
class LayerKind:
    """How a layer's attention depends on positions.

    Attributes:
        rope: the layer's RoPE; None if it has no position embedding.
        window: the number of tokens, itself included, that a token attends to; None for no limit.
    """

    rope: Rope | None
    window: int | None = None


Norms = tuple[str | None, str | None, str | None, str | None]
"""The names of a layer's norms: before attention, after it, before the feed-forward layer, after it; None: no norm."""
NORMS_BEFORE: Norms = ("input_layernorm", None, "post_attention_layernorm", None)
NORMS_AFTER: Norms = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
NORMS_AROUND: Norms = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and options of a decoder. It is hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
        max_positions: the length of the model's context in tokens.
        layers: the kinds of the layers, which repeat: layer i has the kind `layers[i % len(layers)]`.
        qkv_bias, o_bias, mlp_bias: whether the projections of queries, keys and values, the output projection, and
            the feed-forward layer have biases.
        is_fused: whether one matrix projects to queries, keys and values, and another to gate and up.
        qk_norm: how queries and keys are normalised: each head by itself ("head"), all heads together ("heads"), or not
            at all (None).
        norm_offset: a number that is added to the weights of norms.
        norm_in_float32: whether norms multiply by their weights in float32, before rounding to the activations' dtype.
        embedding_scale: the number that token embeddings are multiplied by.
        attention_scale: the number that products of queries and keys are multiplied by; None for `head_dim ** -0.5`.
        attention_softcap, logit_softcap: the cap c of attention scores and of logits, which become c × tanh(x / c);
            None for no cap.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    layers: tuple[LayerKind, ...]
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    is_fused: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norms: Norms = NORMS_BEFORE
    qk_norm: Literal["head", "heads"] | None = None
    norm_offset: float = 0.0
    norm_in_float32: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        )
        wrong = [name for name in sizes if not 1 <= getattr(self, name) < 2**31]  # sizes must fit an int32
        if self.max_positions < 1:
            wrong.append("max_positions")
        if self.head_dim % 2 and "head_dim" not in wrong:
            wrong.append("head_dim")
        if not 0 <= self.rms_norm_eps < math.inf:
            wrong.append("rms_norm_eps")
        wrong += [name for name in ("attention_softcap", "logit_softcap") if not (getattr(self, name) or 1) > 0]
        problems = [f"{name}={getattr(self, name)}" for name in wrong]
        windows = [kind.window for kind in self.layers if kind.window is not None]
        problems += [f"sliding_window={window}" for window in sorted(set(windows)) if not 1 <= window < 2**31]
        if not self.layers:
            problems.append("no layers")
        if problems:
            raise UserError(f"The model's configuration has values that no model can have: {', '.join(problems)}.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"The model has {self.num_heads} query heads, which is not a multiple of its "
                f"{self.num_kv_heads} key-value heads; its configuration is damaged."
            )

    def kind(self, layer: int) -> LayerKind:
        """The kind of a layer, counted from 0."""
        return self.layers[layer % len(self.layers)]

    @property
    def score_scale(self) -> float:
        """The number that products of queries and keys are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def for_length(self, longest: int) -> "ModelConfig":
        """The configuration for a run whose longest text has `longest` tokens, new tokens included.

        LongRoPE has two sets of frequencies. A run uses one of them for all its texts, because keys that are rotated
        with one set do not match queries that are rotated with the other.
        """

        def without_choice(rope: Rope | None) -> Rope | None:
            if rope is None or rope.long_frequencies is None:
                return rope
            return Rope(rope.long_frequencies if rope.is_long(longest) else rope.frequencies, rope.scale)

        return replace(self, layers=tuple(LayerKind(without_choice(kind.rope), kind.window) for kind in self.layers))

    def has_long_rope(self, longest: int) -> bool:
        """Whether `for_length` chooses the second set of LongRoPE's frequencies, the one for long texts."""
        return any(kind.rope is not None and kind.rope.is_long(longest) for kind in self.layers)
