"""The configurations of well-known models by name, and of any other model from its config.json, for forecasts."""

from pathlib import Path

from transformers import AutoConfig

from jaxscape.models.config import ModelConfig
from jaxscape.models.families import from_transformers
from jaxscape.models.huggingface import load_config
from jaxscape.runtime.errors import UserError

_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim"),
)
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "llama-2-7b": ("llama", (32000, 4096, 11008, 32, 32, 32, 128)),
    "llama-2-13b": ("llama", (32000, 5120, 13824, 40, 40, 40, 128)),
    "llama-2-70b": ("llama", (32000, 8192, 28672, 80, 64, 8, 128)),
    "llama-3-8b": ("llama", (128256, 4096, 14336, 32, 32, 8, 128)),
    "llama-3-70b": ("llama", (128256, 8192, 28672, 80, 64, 8, 128)),
    "llama-3.2-1b": ("llama", (128256, 2048, 8192, 16, 32, 8, 64)),
    "llama-3.2-3b": ("llama", (128256, 3072, 8192, 28, 24, 8, 128)),
    "vicuna-7b": ("llama", (32000, 4096, 11008, 32, 32, 32, 128)),
    "vicuna-13b": ("llama", (32000, 5120, 13824, 40, 40, 40, 128)),
    "mistral-7b": ("mistral", (32000, 4096, 14336, 32, 32, 8, 128)),
    "qwen2.5-7b": ("qwen2", (152064, 3584, 18944, 28, 28, 4, 128)),
    "qwen2.5-14b": ("qwen2", (152064, 5120, 13824, 48, 40, 8, 128)),
    "qwen2.5-32b": ("qwen2", (152064, 5120, 27648, 64, 40, 8, 128)),
    "qwen2.5-72b": ("qwen2", (152064, 8192, 29568, 80, 64, 8, 128)),
    "qwen3-8b": ("qwen3", (151936, 4096, 12288, 36, 32, 8, 128)),
    "qwen3-32b": ("qwen3", (151936, 5120, 25600, 64, 64, 8, 128)),
    "gemma-2-9b": ("gemma2", (256000, 3584, 14336, 42, 16, 8, 256)),
    "gemma-2-27b": ("gemma2", (256000, 4608, 36864, 46, 32, 16, 128)),
    "gemma-3-4b": ("gemma3_text", (262208, 2560, 10240, 34, 8, 4, 256)),
    "gemma-3-27b": ("gemma3_text", (262208, 5376, 21504, 62, 32, 16, 128)),
    "phi-3-mini": ("phi3", (32064, 3072, 8192, 32, 32, 32, 96)),
    "phi-4": ("phi3", (100352, 5120, 17920, 40, 40, 10, 128)),
    "phi-4-mini": ("phi3", (200064, 3072, 8192, 32, 24, 8, 128)),
    "smollm3-3b": ("smollm3", (128256, 2048, 11008, 36, 16, 4, 128)),
    "olmo-2-7b": ("olmo2", (100352, 4096, 11008, 32, 32, 32, 128)),
    "smollm2-135m": ("llama", (49152, 576, 1536, 30, 9, 3, 64)),
}
"""For each model: its family in transformers, and the values of `_FIELDS`."""

TIED = (
    *("llama-3.2-1b", "llama-3.2-3b", "gemma-2-9b", "gemma-2-27b", "gemma-3-4b", "gemma-3-27b", "phi-4-mini"),
    *("smollm3-3b", "smollm2-135m"),
)
"""Models whose output head is their embedding table."""


def shape_config(source: str) -> ModelConfig:
    """The configuration of a model, without its weights.

    Arguments:
        source: a name in `SHAPES`, a `config.json`, or a directory that has one.

    Raises:
        UserError: there is no such model, or its `config.json` cannot be read, see
            `jaxscape.models.huggingface.load_config`.
    """
    if source in SHAPES:
        family, sizes = SHAPES[source]
        fields = dict(zip(_FIELDS, sizes, strict=True))
        # The context's length changes no shape. It is larger than any plan needs, so that it limits none.
        config = AutoConfig.for_model(
            family, **fields, tie_word_embeddings=source in TIED, max_position_embeddings=2**20
        )
        return from_transformers(config)
    path = Path(source)
    if not path.exists():
        raise UserError(
            f"Unknown model {source!r}: give a name ({', '.join(SHAPES)}), a config.json, or a directory that has one."
        )
    _, config = load_config(path / "config.json" if path.is_dir() else path)
    return config
