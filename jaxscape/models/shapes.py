"""The shapes of models that runs are often planned for, and of any configuration: what a plan needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import AutoConfig

from jaxscape.errors import UserError
from jaxscape.models.checkpoint import Params, parameter_shardings
from jaxscape.models.config import ModelConfig, rope_frequencies
from jaxscape.models.decoder import parameter_shapes

_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
SHAPES = {
    "llama-2-7b": (32000, 4096, 11008, 32, 32, 32, 128),
    "llama-2-13b": (32000, 5120, 13824, 40, 40, 40, 128),
    "llama-2-70b": (32000, 8192, 28672, 80, 64, 8, 128),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 8, 128),
    "llama-3-70b": (128256, 8192, 28672, 80, 64, 8, 128),
    "vicuna-7b": (32000, 4096, 11008, 32, 32, 32, 128),
    "vicuna-13b": (32000, 5120, 13824, 40, 40, 40, 128),
    "mistral-7b": (32000, 4096, 14336, 32, 32, 8, 128),
    "qwen2.5-7b": (152064, 3584, 18944, 28, 28, 4, 128),
    "qwen2.5-14b": (152064, 5120, 13824, 48, 40, 8, 128),
    "qwen2.5-32b": (152064, 5120, 27648, 64, 40, 8, 128),
    "qwen2.5-72b": (152064, 8192, 29568, 80, 64, 8, 128),
    "gemma-2-9b": (256000, 3584, 14336, 42, 16, 8, 256),
    "gemma-2-27b": (256000, 4608, 36864, 46, 32, 16, 128),
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, 64),
}
"""By name: vocabulary, width, width of the feed-forward layer, layers, query and key-value heads, size of a head."""
TIED = ("gemma-2-9b", "gemma-2-27b", "smollm2-135m")


@dataclass(frozen=True, eq=False)
class ModelShape:
    """A model without weights: what `jaxscape.models.Model` has, as far as plans and programs need it.

    Attributes:
        params: a tree of `jax.ShapeDtypeStruct`, each with its sharding.
    """

    config: ModelConfig
    params: Params
    mesh: Mesh
    dtype: str
    eos_token_ids: tuple[int, ...] = (0,)


def model_shape(config: ModelConfig, mesh: Mesh, dtype: str) -> ModelShape:
    where = parameter_shardings(config, mesh)
    shapes = jax.tree.map(
        lambda leaf, there: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=there),
        parameter_shapes(config),
        where,
    )
    return ModelShape(config, shapes, mesh, dtype)


def shape_config(source: str) -> ModelConfig:
    """The shapes of a model known by name, or of a `config.json`, a file or in a directory, of any decoder that is
    built of the same parts.

    Raises:
        UserError: there is no such model, or its configuration does not say what is needed.
    """
    if source in SHAPES:
        sizes: dict[str, Any] = dict(zip(_FIELDS, SHAPES[source], strict=True))
        return _config(sizes, source in TIED)
    path = Path(source)
    if not path.exists():
        raise UserError(
            f"There is no model {source!r} to plan for: give a name ({', '.join(SHAPES)}), a config.json, or a "
            f"directory that has one."
        )
    try:
        found = AutoConfig.from_pretrained(path)
        heads = found.num_attention_heads
        sizes = {
            "vocab_size": found.vocab_size,
            "hidden_size": found.hidden_size,
            "intermediate_size": found.intermediate_size,
            "num_layers": found.num_hidden_layers,
            "num_heads": heads,
            "num_kv_heads": getattr(found, "num_key_value_heads", None) or heads,
            "head_dim": getattr(found, "head_dim", None) or found.hidden_size // heads,
        }
        return _config(sizes, bool(found.tie_word_embeddings))
    except UserError:
        raise
    except Exception as error:  # transformers raises many types for what is missing or damaged
        raise UserError(f"{source} has no configuration to plan with ({type(error).__name__}: {error}).") from error


def _config(sizes: dict[str, Any], is_tied: bool) -> ModelConfig:
    # Neither the context's length nor RoPE's base changes a shape.
    frequencies = rope_frequencies(sizes["head_dim"], {"rope_theta": 1e4})
    return ModelConfig(
        **sizes, max_positions=2**20, rms_norm_eps=1e-5, rope_frequencies=frequencies, tie_word_embeddings=is_tied
    )
