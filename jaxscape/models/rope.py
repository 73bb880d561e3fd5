"""What the decoder needs to know about a model: its shape, and the options in which families differ."""

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


MAX_HEAD_DIM = 2**16  # far more than any model has; a damaged configuration may have more than can be made


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


class Rotation(NamedTuple):
    """The cosines, and the sines with the signs that they have in `rope`, of each token's angles, in float32."""

    cos: Float[Array, "batch time 1 2 half"]
    sin: Float[Array, "batch time 1 2 half"]


def rotation(by: Rope, positions: Int[Array, "batch time"]) -> Rotation:
    angles = positions[..., None] * jnp.asarray(by.frequencies, jnp.float32)
    cos, sin = by.scale * jnp.cos(angles), by.scale * jnp.sin(angles)
    # All layers read them: behind a barrier, they are not computed again in each.
    both = jnp.stack([cos, cos], axis=-2), jnp.stack([-sin, sin], axis=-2)
    cos, sin = jax.lax.optimization_barrier(both)
    return Rotation(cos[:, :, None], sin[:, :, None])


def rope(x: Float[Array, "batch time heads head_dim"], by: Rotation) -> Float[Array, "batch time heads head_dim"]:
    """Rotate the pairs (i, i + n / 2) of each head's first n features (Su et al., arXiv 2104.09864), in float32."""
    size = 2 * by.cos.shape[-1]
    if size < x.shape[-1]:
        return jnp.concatenate([rope(x[..., :size], by), x[..., size:]], axis=-1)
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    return (halves * by.cos + jnp.flip(halves, -2) * by.sin).reshape(x.shape).astype(x.dtype)
