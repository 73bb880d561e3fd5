"""What a decoder needs to know about a model, and where that is read from."""

import math
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from jaxscape.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-architecture decoder: hashable, so that it can be a static argument of `jax.jit`.

    `rope_frequencies` are the `head_dim / 2` angular frequencies in radians per position, any context-extending
    scaling applied, so that the decoder knows one kind of RoPE only.
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
    rope_frequencies: tuple[float, ...]
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        wrong = [name for name in (*sizes, "head_dim", "max_positions") if getattr(self, name) < 1]
        if self.head_dim % 2:
            wrong.append("head_dim")
        if not 0 <= self.rms_norm_eps < math.inf:
            wrong.append("rms_norm_eps")
        if wrong:
            raise UserError(f"The model's configuration has values that no model can have: {', '.join(wrong)}.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"The model has {self.num_heads} query heads, which is not a multiple of its "
                f"{self.num_kv_heads} key-value heads; its configuration is damaged."
            )


def from_transformers(config: PreTrainedConfig) -> ModelConfig:
    """The configuration of a transformers model.

    Raises:
        UserError: the architecture, or an option of it, is not one that the decoder computes.
    """
    if config.model_type != "llama":
        raise UserError(f"The model's architecture is {config.model_type!r}, but only 'llama' is supported.")
    unsupported = {
        name: value
        for name, expected in {"hidden_act": "silu", "pretraining_tp": 1, "quantization_config": None}.items()
        if (value := getattr(config, name, expected)) != expected
    }
    if unsupported:
        options = ", ".join(f"{name}={value!r}" for name, value in unsupported.items())
        raise UserError(f"The model's configuration has options that are not supported: {options}.")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        max_positions=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_frequencies=rope_frequencies(head_dim, config.rope_parameters),
        tie_word_embeddings=config.tie_word_embeddings,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )


def rope_frequencies(head_dim: int, rope: dict[str, Any]) -> tuple[float, ...]:
    """RoPE frequencies (Su et al., arXiv 2104.09864) after the scaling that `rope` asks for.

    `rope` is a transformers `rope_parameters` dictionary: `rope_theta`, `rope_type` (`default`, `linear` or `llama3`)
    and the parameters of that type.
    """
    if not 0 < rope["rope_theta"] < math.inf:
        raise UserError(f"The model's RoPE has the base {rope['rope_theta']}, which no model can have.")
    base = [rope["rope_theta"] ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    match rope.get("rope_type", "default"):
        case "default":
            return tuple(base)
        case "linear":
            return tuple(frequency / rope["factor"] for frequency in base)
        case "llama3":
            return tuple(_llama3_frequency(frequency, rope) for frequency in base)
        case other:
            raise UserError(f"The model's RoPE scaling is {other!r}; supported are 'default', 'linear' and 'llama3'.")


def _llama3_frequency(frequency: float, rope: dict[str, Any]) -> float:
    """Llama 3.1's scaling: long waves are slowed by `factor`, short ones kept, those between interpolated."""
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    return frequency * (kept + (1 - kept) / rope["factor"])
