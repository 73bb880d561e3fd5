"""What the decoder needs to know about a model: its shape, and the options in which families differ."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxscape.errors import UserError


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., arXiv 2104.09864), any context-extending scaling applied.

    Attributes:
        frequencies: in radians per position, of each pair of features that is rotated: of a head, the first
            `2 * len(frequencies)` features, the others staying as they are.
        scale: of the rotated features.
        long_frequencies: those of a run that has texts of more than `context` tokens (LongRoPE, Ding et al., arXiv
            2402.13753).
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    long_frequencies: tuple[float, ...] | None = None
    context: int = 0


@dataclass(frozen=True)
class LayerKind:
    """What a layer's attention does with positions.

    Attributes:
        rope: None if it does not see them.
        window: the number of tokens, its own included, that a token attends to; None for all.
    """

    rope: Rope | None
    window: int | None = None


MAX_HEAD_DIM = 2**16  # far more than any model has; a damaged configuration may have more than can be made

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


def make_rope(head_dim: int, options: Mapping[str, Any], max_positions: int, may_be_partial: bool = False) -> Rope:
    """RoPE with the scaling that `options` asks for, as transformers computes it.

    Arguments:
        options: a transformers `rope_parameters` dictionary: `rope_theta`, `rope_type` (`default`, `linear`, `llama3`,
            `yarn` or `longrope`) and the parameters of that type.
        max_positions: of the model, its context extended.
        may_be_partial: whether the family can leave a part of each head as it is.

    Raises:
        UserError: the scaling, or a parameter of it, is not one of those.
    """
    truncate = bool(options.get("truncate", True))
    left = {name: value for name, value in options.items() if value is not None and name != "truncate"}
    kind = left.pop("rope_type", "default")
    base, part = left.pop("rope_theta"), left.pop("partial_rotary_factor", 1.0)
    # Old configurations say it twice; types without a use for the original context may name it.
    left.pop("type", None)
    context = left.pop("original_max_position_embeddings", max_positions)
    if not 0 < base < math.inf:
        raise UserError(f"The model's RoPE has the base {base}, which no model can have.")
    if part != 1.0 and not may_be_partial:
        raise UserError("The model rotates only a part of each head, which its architecture cannot.")
    size = int(head_dim * part)
    if size < 2 or size % 2 or size > head_dim or size > MAX_HEAD_DIM:
        raise UserError(f"The model rotates {size} of a head's {head_dim} features, which no model can.")
    plain = tuple(base ** (-2 * i / size) for i in range(size // 2))
    match kind:
        case "default":
            rope = Rope(plain)
        case "linear":
            factor = left.pop("factor")
            rope = Rope(tuple(frequency / factor for frequency in plain))
        case "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor")
            factors = [left.pop(name) for name in names]
            rope = Rope(tuple(_llama3_frequency(frequency, context, *factors) for frequency in plain))
        case "yarn":
            rope = _yarn(plain, base, context, max_positions, truncate, left)
        case "longrope":
            rope = _longrope(plain, context, max_positions, left)
        case other:
            raise UserError(
                f"The model's RoPE scaling is {other!r}; supported are 'default', 'linear', 'llama3', 'yarn' and "
                f"'longrope'."
            )
    if left:
        raise UserError(f"The model's RoPE has parameters that are not supported: {', '.join(sorted(left))}.")
    return rope


def _llama3_frequency(frequency: float, context: int, factor: float, low: float, high: float) -> float:
    """Llama 3.1's scaling: long waves are slowed by `factor`, short ones kept, those between interpolated."""
    turns = context * frequency / (2 * math.pi)
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    return frequency * (kept + (1 - kept) / factor)


def _yarn(
    plain: tuple[float, ...], base: float, context: int, max_positions: int, truncate: bool, left: dict[str, Any]
) -> Rope:
    """YaRN (Peng et al., arXiv 2309.00071): as Llama 3.1's, but interpolated over pairs; and sharper attention."""
    factor = left.pop("factor", max_positions / context)
    fast, slow = left.pop("beta_fast", None) or 32, left.pop("beta_slow", None) or 1
    both = [left.pop(name, None) for name in ("mscale", "mscale_all_dim")]

    def sharpness(times: float = 1.0) -> float:
        return 0.1 * times * math.log(factor) + 1 if factor > 1 else 1.0

    scale = sharpness(both[0]) / sharpness(both[1]) if all(both) else sharpness()
    scale = left.pop("attention_factor", scale)
    ends = [len(plain) * math.log(context / (turns * 2 * math.pi)) / math.log(base) for turns in (fast, slow)]
    if truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], 2 * len(plain) - 1)
    high += 0.001 if low == high else 0
    slowed = [min(max((i - low) / (high - low), 0), 1) for i in range(len(plain))]
    return Rope(tuple(f * (1 - part + part / factor) for f, part in zip(plain, slowed, strict=True)), scale)


def _longrope(plain: tuple[float, ...], context: int, max_positions: int, left: dict[str, Any]) -> Rope:
    short, long = (left.pop(name) for name in ("short_factor", "long_factor"))
    if not len(short) == len(long) == len(plain):
        raise UserError(f"The model's LongRoPE has {len(short)} and {len(long)} factors for {len(plain)} frequencies.")
    factor = left.pop("factor", max_positions / context)
    scale = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    frequencies, long_frequencies = (
        tuple(f / by for f, by in zip(plain, factors, strict=True)) for factors in (short, long)
    )
    return Rope(frequencies, left.pop("attention_factor", scale), long_frequencies, context)
