"""The configurations of models for forecasts: of known ones by name or hub id, of others from their config.json."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import AutoConfig

from jaxscape.models.config import ModelConfig
from jaxscape.models.families import from_transformers
from jaxscape.models.huggingface import HUB_ID, download, load_config
from jaxscape.models.lora import is_adapter
from jaxscape.models.weights import CONFIG
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.remote import fetched
from jaxscape.runtime.texts import did_you_mean

_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim"),
)


class KnownModel(NamedTuple):
    """A model that is known by its shapes.

    Attributes:
        family: transformers' `model_type`.
        fields: fields of its transformers configuration.
        hub_ids: repositories of the hub whose models have these shapes, in every revision.
    """

    family: str
    fields: Mapping[str, Any]
    hub_ids: tuple[str, ...]


def _known(
    family: str, sizes: tuple[int, ...], owner: str, repositories: str, is_tied: bool = False, **fields: Any
) -> KnownModel:
    """A known model.

    Arguments:
        sizes: the values of `_FIELDS`.
        owner: the owner of its repositories on the hub.
        repositories: their names, separated by spaces.
        is_tied: whether the output head is the embedding table.
        fields: fields in which the model differs from the defaults of its family.
    """
    # The context's length changes no shape. It is larger than any plan needs, so that it limits none.
    all_fields = dict(zip(_FIELDS, sizes, strict=True)) | {"max_position_embeddings": 2**20} | fields
    hub_ids = tuple(f"{owner}/{name}" for name in repositories.split())
    return KnownModel(family, all_fields | {"tie_word_embeddings": is_tied}, hub_ids)


SHAPES = {
    "llama-2-7b": _known(
        "llama", (32000, 4096, 11008, 32, 32, 32, 128), "meta-llama", "Llama-2-7b-hf Llama-2-7b-chat-hf"
    ),
    "llama-2-13b": _known(
        "llama", (32000, 5120, 13824, 40, 40, 40, 128), "meta-llama", "Llama-2-13b-hf Llama-2-13b-chat-hf"
    ),
    "llama-2-70b": _known(
        "llama", (32000, 8192, 28672, 80, 64, 8, 128), "meta-llama", "Llama-2-70b-hf Llama-2-70b-chat-hf"
    ),
    "llama-3-8b": _known(
        "llama",
        (128256, 4096, 14336, 32, 32, 8, 128),
        "meta-llama",
        "Meta-Llama-3-8B Meta-Llama-3-8B-Instruct Meta-Llama-3.1-8B Meta-Llama-3.1-8B-Instruct "
        "Llama-3.1-8B Llama-3.1-8B-Instruct",
    ),
    "llama-3-70b": _known(
        "llama",
        (128256, 8192, 28672, 80, 64, 8, 128),
        "meta-llama",
        "Meta-Llama-3-70B Meta-Llama-3-70B-Instruct Meta-Llama-3.1-70B Meta-Llama-3.1-70B-Instruct "
        "Llama-3.1-70B Llama-3.1-70B-Instruct Llama-3.3-70B-Instruct",
    ),
    "llama-3.2-1b": _known(
        "llama", (128256, 2048, 8192, 16, 32, 8, 64), "meta-llama", "Llama-3.2-1B Llama-3.2-1B-Instruct", is_tied=True
    ),
    "llama-3.2-3b": _known(
        "llama", (128256, 3072, 8192, 28, 24, 8, 128), "meta-llama", "Llama-3.2-3B Llama-3.2-3B-Instruct", is_tied=True
    ),
    "vicuna-7b": _known(
        "llama", (32000, 4096, 11008, 32, 32, 32, 128), "lmsys", "vicuna-7b-v1.3 vicuna-7b-v1.5 vicuna-7b-v1.5-16k"
    ),
    "vicuna-13b": _known(
        "llama", (32000, 5120, 13824, 40, 40, 40, 128), "lmsys", "vicuna-13b-v1.3 vicuna-13b-v1.5 vicuna-13b-v1.5-16k"
    ),
    "mistral-7b": _known(
        "mistral",
        (32000, 4096, 14336, 32, 32, 8, 128),
        "mistralai",
        "Mistral-7B-v0.1 Mistral-7B-Instruct-v0.1",
        sliding_window=4096,
    ),
    "mistral-7b-v0.2": _known(
        "mistral", (32000, 4096, 14336, 32, 32, 8, 128), "mistralai", "Mistral-7B-Instruct-v0.2", sliding_window=None
    ),
    "mistral-7b-v0.3": _known(
        "mistral",
        (32768, 4096, 14336, 32, 32, 8, 128),
        "mistralai",
        "Mistral-7B-v0.3 Mistral-7B-Instruct-v0.3",
        sliding_window=None,
    ),
    "qwen2.5-7b": _known("qwen2", (152064, 3584, 18944, 28, 28, 4, 128), "Qwen", "Qwen2.5-7B Qwen2.5-7B-Instruct"),
    "qwen2.5-14b": _known("qwen2", (152064, 5120, 13824, 48, 40, 8, 128), "Qwen", "Qwen2.5-14B Qwen2.5-14B-Instruct"),
    "qwen2.5-32b": _known("qwen2", (152064, 5120, 27648, 64, 40, 8, 128), "Qwen", "Qwen2.5-32B Qwen2.5-32B-Instruct"),
    "qwen2.5-72b": _known("qwen2", (152064, 8192, 29568, 80, 64, 8, 128), "Qwen", "Qwen2.5-72B Qwen2.5-72B-Instruct"),
    "qwen3-8b": _known("qwen3", (151936, 4096, 12288, 36, 32, 8, 128), "Qwen", "Qwen3-8B Qwen3-8B-Base"),
    "qwen3-32b": _known("qwen3", (151936, 5120, 25600, 64, 64, 8, 128), "Qwen", "Qwen3-32B"),
    "gemma-2-9b": _known(
        "gemma2", (256000, 3584, 14336, 42, 16, 8, 256), "google", "gemma-2-9b gemma-2-9b-it", is_tied=True
    ),
    "gemma-2-27b": _known(
        "gemma2", (256000, 4608, 36864, 46, 32, 16, 128), "google", "gemma-2-27b gemma-2-27b-it", is_tied=True
    ),
    "gemma-3-4b": _known(
        "gemma3_text",
        (262208, 2560, 10240, 34, 8, 4, 256),
        "google",
        "gemma-3-4b-pt gemma-3-4b-it",
        is_tied=True,
        sliding_window=1024,
    ),
    "gemma-3-27b": _known(
        "gemma3_text",
        (262208, 5376, 21504, 62, 32, 16, 128),
        "google",
        "gemma-3-27b-pt gemma-3-27b-it",
        is_tied=True,
        sliding_window=1024,
    ),
    "phi-3-mini": _known(
        "phi3", (32064, 3072, 8192, 32, 32, 32, 96), "microsoft", "Phi-3-mini-128k-instruct Phi-3.5-mini-instruct"
    ),
    "phi-3-mini-4k": _known(
        "phi3", (32064, 3072, 8192, 32, 32, 32, 96), "microsoft", "Phi-3-mini-4k-instruct", sliding_window=2047
    ),
    "phi-4": _known(
        "phi3", (100352, 5120, 17920, 40, 40, 10, 128), "microsoft", "phi-4 Phi-4-reasoning Phi-4-reasoning-plus"
    ),
    "phi-4-mini": _known(
        "phi3",
        (200064, 3072, 8192, 32, 24, 8, 128),
        "microsoft",
        "Phi-4-mini-instruct Phi-4-mini-reasoning",
        is_tied=True,
    ),
    "smollm3-3b": _known(
        "smollm3", (128256, 2048, 11008, 36, 16, 4, 128), "HuggingFaceTB", "SmolLM3-3B SmolLM3-3B-Base", is_tied=True
    ),
    "olmo-2-7b": _known(
        "olmo2",
        (100352, 4096, 11008, 32, 32, 32, 128),
        "allenai",
        "OLMo-2-1124-7B OLMo-2-1124-7B-SFT OLMo-2-1124-7B-DPO OLMo-2-1124-7B-Instruct",
    ),
    "smollm2-135m": _known(
        "llama", (49152, 576, 1536, 30, 9, 3, 64), "HuggingFaceTB", "SmolLM2-135M SmolLM2-135M-Instruct", is_tied=True
    ),
}
"""The known models, by name."""

_NAMES_BY_HUB_ID = {hub_id.lower(): name for name, model in SHAPES.items() for hub_id in model.hub_ids}


def shape_config(source: str) -> ModelConfig:
    """The configuration of a model, without its weights.

    Arguments:
        source: a name in `SHAPES`, a `config.json`, a directory that has one, or a hub id, `REPOSITORY` or
            `REPOSITORY@REVISION`. The hub ids in `SHAPES` need no network, and of others only `config.json` is
            downloaded. As on the hub, upper and lower case are the same.

    Raises:
        UserError: there is no such model, or its `config.json` cannot be downloaded or read, see
            `jaxscape.models.huggingface.load_config`.
    """
    if source in SHAPES:
        return _known_config(source)
    path = fetched(source)
    if source and path.exists():  # as a path, an empty name is the current directory
        if is_adapter(path) and not (path / CONFIG).exists():
            raise UserError(f"{source} holds a LoRA adapter, not a whole model: give its base model.")
        return load_config(path / CONFIG if path.is_dir() else path)[1]
    if not HUB_ID.fullmatch(source):
        hint = did_you_mean(source, SHAPES)
        raise UserError(
            f"Unknown model {source!r}{hint}: give a name ({', '.join(SHAPES)}), a hub id such as "
            f"'meta-llama/Llama-2-7b-chat-hf', a config.json, or a directory that has one."
        )
    if name := _NAMES_BY_HUB_ID.get(source.partition("@")[0].lower()):
        return _known_config(name)
    path = download(source, (CONFIG,)) / CONFIG
    if not path.exists():
        raise UserError(f"The hub's {source} has no {CONFIG}: give the id of the model that it was made from.")
    return load_config(path)[1]


def _known_config(name: str) -> ModelConfig:
    family, fields, _ = SHAPES[name]
    return from_transformers(AutoConfig.for_model(family, **fields))
