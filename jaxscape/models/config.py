"""What the decoder needs to know about a model: its shape, and the options in which families differ."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from jaxscape.models.rope import Rope
from jaxscape.runtime.errors import UserError


@dataclass(frozen=True)
class LayerKind:
    """What a layer's attention does with positions.

    Attributes:
        rope: None if it does not see them.
        window: the number of tokens, its own included, that a token attends to; None for all.
    """

    rope: Rope | None
    window: int | None = None


Norms = tuple[str | None, str | None, str | None, str | None]
"""The names of a layer's norms before attention, after it, before the feed-forward layer, and after it."""
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
    """The shape and the options of a decoder: hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
        layers: the kinds of the layers, which take turns.
        is_fused: queries, keys and values are made by one matrix, and gate and up by one.
        qk_norm: queries and keys are normalised, each head by itself or all heads together.
        norm_offset: what is added to the weights of norms.
        norm_in_float32: norms are scaled by their weights before they are rounded, and not after.
        attention_scale: of the products of queries and keys; None for `head_dim ** -0.5`.
        attention_softcap, logit_softcap: the largest absolute value of scores and of logits, which they approach as
            a hyperbolic tangent does.
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
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        wrong = [name for name in (*sizes, "head_dim") if not 1 <= getattr(self, name) < 2**31]
        wrong += ["max_positions"] * (self.max_positions < 1)
        if self.head_dim % 2:
            wrong.append("head_dim")
        if not 0 <= self.rms_norm_eps < math.inf:
            wrong.append("rms_norm_eps")
        wrong += [name for name in ("attention_softcap", "logit_softcap") if not (getattr(self, name) or 1) > 0]
        if any(kind.window is not None and not 1 <= kind.window < 2**31 for kind in self.layers):
            wrong.append("sliding_window")
        if not self.layers:
            wrong.append("layers")
        if wrong:
            raise UserError(f"The model's configuration has values that no model can have: {', '.join(wrong)}.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"The model has {self.num_heads} query heads, which is not a multiple of its "
                f"{self.num_kv_heads} key-value heads; its configuration is damaged."
            )

    def kind(self, layer: int) -> LayerKind:
        return self.layers[layer % len(self.layers)]

    @property
    def score_scale(self) -> float:
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def for_length(self, longest: int) -> "ModelConfig":
        """The configuration for texts of which the longest has so many tokens, all those that are to come included.

        LongRoPE has two sets of frequencies, and keys of one mean nothing to queries of the other.
        """

        def chosen(rope: Rope | None) -> Rope | None:
            if rope is None or rope.long_frequencies is None:
                return rope
            return Rope(rope.frequencies if longest <= rope.context else rope.long_frequencies, rope.scale)

        return replace(self, layers=tuple(LayerKind(chosen(kind.rope), kind.window) for kind in self.layers))
