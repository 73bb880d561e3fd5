"""Rotary position embedding (RoPE): its frequencies from a transformers configuration, and the rotation itself."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxscape.runtime.errors import UserError


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., arXiv 2104.09864), with context extension already applied.

    Attributes:
        frequencies: radians per position, one number for each rotated pair of features. The first
            `2 * len(frequencies)` features of a head are rotated, and the others stay as they are.
        scale: the number that the rotated features are multiplied by.
        long_frequencies: the frequencies that replace `frequencies` in a run whose longest text has more than `context`
            tokens (LongRoPE, Ding et al., arXiv 2402.13753); None for other kinds of RoPE.
        context: the length of the model's original context in tokens; 0 without `long_frequencies`.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    long_frequencies: tuple[float, ...] | None = None
    context: int = 0

    def is_long(self, longest: int) -> bool:
        """Whether `long_frequencies` are used in a run whose longest text has `longest` tokens."""
        return self.long_frequencies is not None and longest > self.context


MAX_HEAD_DIM = 2**16  # far above any real model; a damaged configuration may ask for more than memory can hold


def make_rope(head_dim: int, options: Mapping[str, Any], max_positions: int, may_be_partial: bool = False) -> Rope:
    """RoPE with the scaling that `options` asks for, as transformers computes it.

    Arguments:
        options: a transformers `rope_parameters` dictionary: `rope_theta`, `rope_type` (`default`, `linear`, `llama3`,
            `yarn` or `longrope`) and the parameters of that type.
        max_positions: the length of the model's context in tokens, after its extension.
        may_be_partial: whether models of this family may rotate only a part of each head's features.

    Raises:
        UserError: the type or one of its parameters is not supported, or a value is impossible.
    """
    truncate = bool(options.get("truncate", True))
    unread = {name: value for name, value in options.items() if value is not None and name != "truncate"}
    rope_type = unread.pop("rope_type", "default")
    theta, rotated_part = unread.pop("rope_theta"), unread.pop("partial_rotary_factor", 1.0)
    # These two are no error if the RoPE type does not use them: old configurations give the type under the name `type`
    # too, and name an original context.
    unread.pop("type", None)
    context = unread.pop("original_max_position_embeddings", max_positions)
    size = _rotated_features(head_dim, theta, rotated_part, may_be_partial)
    frequencies = tuple(theta ** (-2 * i / size) for i in range(size // 2))
    match rope_type:
        case "default":
            rope = Rope(frequencies)
        case "linear":
            factor = unread.pop("factor")
            rope = Rope(tuple(frequency / factor for frequency in frequencies))
        case "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor")
            factors = [unread.pop(name) for name in names]
            rope = Rope(tuple(_llama3_frequency(frequency, context, *factors) for frequency in frequencies))
        case "yarn":
            rope = _yarn(frequencies, theta, context, max_positions, truncate, unread)
        case "longrope":
            rope = _longrope(frequencies, context, max_positions, unread)
        case other:
            raise UserError(
                f"The model's RoPE scaling is {other!r}; supported are 'default', 'linear', 'llama3', 'yarn' and "
                f"'longrope'."
            )
    if unread:
        raise UserError(f"The model's RoPE has parameters that are not supported: {', '.join(sorted(unread))}.")
    return rope


def _rotated_features(head_dim: int, theta: int | float, rotated_part: int | float, may_be_partial: bool) -> int:
    """The number of rotated features of a head, after checking the values that all types of RoPE have."""
    if not 0 < theta < math.inf:
        raise UserError(f"The model's RoPE has the base {theta}: rope_theta must be positive and finite.")
    if rotated_part != 1.0 and not may_be_partial:
        raise UserError(
            f"The model rotates only a part of each head (partial_rotary_factor={rotated_part}), which its "
            f"architecture does not support."
        )
    size = int(head_dim * rotated_part)
    if size < 2 or size % 2 or size > head_dim or size > MAX_HEAD_DIM:
        raise UserError(
            f"The model rotates {size} of the {head_dim} features of a head; it must be an even number from 2 to "
            f"{min(head_dim, MAX_HEAD_DIM)}."
        )
    return size


def _llama3_frequency(frequency: float, context: int, factor: float, low: float, high: float) -> float:
    """A frequency with Llama 3.1's scaling.

    Frequencies of more than `high` turns in the original context are kept, those of fewer than `low` turns are divided
    by `factor`, and those between are interpolated.
    """
    turns = context * frequency / (2 * math.pi)
    kept_part = min(max((turns - low) / (high - low), 0.0), 1.0)
    return frequency * (kept_part + (1 - kept_part) / factor)


def _yarn(
    frequencies: tuple[float, ...],
    theta: int | float,
    context: int,
    max_positions: int,
    truncate: bool,
    options: dict[str, Any],
) -> Rope:
    """YaRN (Peng et al., arXiv 2309.00071); removes its parameters from `options`.

    As with Llama 3.1, high frequencies are kept and low ones divided by `factor`, but the frequencies between are
    interpolated by their index. `scale` makes the attention weights sharper.
    """
    factor = options.pop("factor", max_positions / context)
    fast, slow = options.pop("beta_fast", None) or 32, options.pop("beta_slow", None) or 1
    mscale, mscale_all_dim = options.pop("mscale", None), options.pop("mscale_all_dim", None)

    def sharpness(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    scale = sharpness(mscale) / sharpness(mscale_all_dim) if mscale and mscale_all_dim else sharpness()
    scale = options.pop("attention_factor", scale)
    # The indices of the frequencies that make `fast` and `slow` turns in the original context.
    low, high = (
        len(frequencies) * math.log(context / (turns * 2 * math.pi)) / math.log(theta) for turns in (fast, slow)
    )
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * len(frequencies) - 1)
    high += 0.001 if low == high else 0
    divided_parts = [min(max((i - low) / (high - low), 0), 1) for i in range(len(frequencies))]
    scaled = (f * (1 - part + part / factor) for f, part in zip(frequencies, divided_parts, strict=True))
    return Rope(tuple(scaled), scale)


def _longrope(frequencies: tuple[float, ...], context: int, max_positions: int, options: dict[str, Any]) -> Rope:
    """LongRoPE (Ding et al., arXiv 2402.13753); removes its parameters from `options`."""
    short, long = (options.pop(name) for name in ("short_factor", "long_factor"))
    if not len(short) == len(long) == len(frequencies):
        raise UserError(
            f"The model's LongRoPE has {len(short)} short and {len(long)} long factors for {len(frequencies)} "
            f"frequencies; the three numbers must be equal."
        )
    factor = options.pop("factor", max_positions / context)
    scale = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    short_frequencies, long_frequencies = (
        tuple(frequency / divisor for frequency, divisor in zip(frequencies, divisors, strict=True))
        for divisors in (short, long)
    )
    return Rope(short_frequencies, options.pop("attention_factor", scale), long_frequencies, context)


class Rotation(NamedTuple):
    """The cosine and sine of each token's angles, float32, times `Rope.scale`, for both halves of the features.

    The sines of the first half are negated, as `apply_rope` needs them.
    """

    cos: Float[Array, "batch time 1 2 half"]
    sin: Float[Array, "batch time 1 2 half"]


def make_rotation(rope: Rope, positions: Int[Array, "batch time"]) -> Rotation:
    """The rotation of tokens at these positions, computed once for all layers that share a `Rope`."""
    angles = positions[..., None] * jnp.asarray(rope.frequencies, jnp.float32)
    cos, sin = rope.scale * jnp.cos(angles), rope.scale * jnp.sin(angles)
    halves = jnp.stack([cos, cos], axis=-2), jnp.stack([-sin, sin], axis=-2)
    # Without this barrier, XLA computes them again in every layer.
    cos, sin = jax.lax.optimization_barrier(halves)
    return Rotation(cos[:, :, None], sin[:, :, None])


def apply_rope(
    x: Float[Array, "batch time heads head_dim"], rotation: Rotation
) -> Float[Array, "batch time heads head_dim"]:
    """Rotate the pairs (i, i + n / 2) of each head's first n features (Su et al., arXiv 2104.09864), in float32."""
    size = 2 * rotation.cos.shape[-1]
    if size < x.shape[-1]:
        return jnp.concatenate([apply_rope(x[..., :size], rotation), x[..., size:]], axis=-1)
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    return (halves * rotation.cos + jnp.flip(halves, -2) * rotation.sin).reshape(x.shape).astype(x.dtype)
