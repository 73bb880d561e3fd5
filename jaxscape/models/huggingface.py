"""Model directories of Hugging Face and repositories of its hub, with weights as safetensors."""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.flax import save
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from jaxscape.models.chat_defaults import without_default_template
from jaxscape.models.checkpoint import Checkpoint, Params, named_leaves
from jaxscape.models.config import ModelConfig
from jaxscape.models.decoder import parameter_shapes
from jaxscape.models.families import TEXT_MODELS, family_of, from_transformers
from jaxscape.models.quantised import CONFIG_FIELDS, dequantised, settings_of
from jaxscape.models.tokenizer import load_language
from jaxscape.models.weights import (
    CONFIG,
    HEAD,
    StoredTensor,
    check_is_model,
    is_redundant,
    stored_tensors,
    tied,
    weight_files,
)
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import read_json, temporary_path, write_whole

DOWNLOAD_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
IGNORE_PATTERNS = ["*/*", "consolidated*"]  # other formats of the same weights
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
# The largest number of layers in a config.json. It is checked first, because transformers makes a list with an entry
# for each layer, which could fill the memory.
MAX_LAYERS = 2**16


def download(name: str, patterns: Sequence[str] = DOWNLOAD_PATTERNS) -> Path:
    """Download a model repository into the hub's own cache. Without a network, the cached files are used.

    Arguments:
        name: `REPOSITORY` or `REPOSITORY@REVISION`, with a branch, a tag or a commit.
        patterns: which files to download.

    Returns:
        The directory of the snapshot.

    Raises:
        UserError: the repository is not in the cache and cannot be downloaded; the message says how to get it.
    """
    repository, _, revision = name.partition("@")
    try:
        snapshot = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=list(patterns), ignore_patterns=IGNORE_PATTERNS
        )
        return Path(snapshot)
    except RevisionNotFoundError as error:
        raise UserError(
            f"{repository} has no revision {revision!r}; give a branch, a tag or a commit of it."
        ) from error
    except GatedRepoError as error:
        raise UserError(
            f"{repository} is gated: ask for access at https://huggingface.co/{repository}, then log in with "
            f"'hf auth login' or set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"The hub has no model {repository}, or it is private: check the name, or log in with 'hf auth login'."
        ) from error
    except Exception as error:  # errors of the network, the hub, the disk and the name have many types
        raise UserError(
            f"{name} is not in the cache and the hub cannot be reached ({reason(error)}); connect to the "
            f"network, or pass a local model directory."
        ) from error


def hub_commits(files: Iterable[Path]) -> dict[str, str]:
    """The commits that files were downloaded from, by the names of their repositories on the hub. Files that are not in
    the hub's cache are left out."""
    folders = [file.absolute().parts[-4:-1] for file in files]  # models--OWNER--NAME, snapshots, COMMIT
    return {
        folder[0].removeprefix("models--").replace("--", "/"): folder[2]
        for folder in folders
        if len(folder) == 3 and folder[0].startswith("models--") and folder[1] == "snapshots"
    }


def open_directory(path: Path) -> Checkpoint:
    """Open a model directory that transformers' `save_pretrained` wrote or that was downloaded from the hub.

    Raises:
        UserError: a file is missing, damaged or pickled, or the architecture is not supported.
    """
    check_is_model(path)
    fields = read_json(path / CONFIG)
    transformers_config, config = load_config(path / CONFIG)
    files = weight_files(path)
    language = load_language(path, transformers_config, fields.get("eos_token_id"))
    tensors, quantisation = dequantised(_stored_parameters(files, fields), settings_of(fields, path), str(path))
    if config.num_layers > len(tensors):  # building the shapes of that many layers might never end
        raise UserError(
            f"{path} has only {len(tensors)} tensors for the {config.num_layers} layers of its config.json; one of "
            f"them is damaged, so download the model again."
        )
    if config.tie_word_embeddings:
        tensors, is_tied = tied(tensors, path)
        config = replace(config, tie_word_embeddings=is_tied)
        transformers_config.tie_word_embeddings = is_tied
    elif HEAD not in tensors and len(tensors) + 1 == len(named_leaves(parameter_shapes(config))):
        raise UserError(
            f"{path} has no {HEAD}, and its config.json does not tie the output head to the embedding: set "
            f"tie_word_embeddings to true there if the model was trained so, or save the model again with its head."
        )
    return Checkpoint(
        config=config,
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        read=lambda name, index: tensors[name].read(index),
        tokenizer=language.tokenizer,
        eos_token_ids=language.eos_token_ids,
        transformers_config=transformers_config,
        files=tuple(files),
        sources=replace(language.sources, quantisation=quantisation),
        other_parts=TEXT_MODELS.get(fields["model_type"], ()),
    )


def _stored_parameters(files: Sequence[Path], fields: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The stored tensors of the text model."""
    tensors = stored_tensors(files)
    if unmerged := [tensor for name, tensor in tensors.items() if ".lora_" in name]:
        raise UserError(
            f"{unmerged[0].file} holds the factors of a LoRA adapter beside the weights ({unmerged[0].name}); merge "
            f"them with PEFT's merge_and_unload, and save the merged model."
        )
    others = TEXT_MODELS.get(fields["model_type"], ())
    return {name: tensor for name, tensor in tensors.items() if not is_redundant(name) and not name.startswith(others)}


def load_config(path: Path) -> tuple[PreTrainedConfig, ModelConfig]:
    """Read a `config.json` as transformers' configuration and as the decoder's.

    For a multimodal model, both are those of its text model.

    Raises:
        UserError: the file is missing or damaged, or the family or one of its options is not supported.
    """
    fields = read_json(path)
    model_type, text_fields = fields.get("model_type"), fields.get("text_config")
    num_layers = (text_fields if isinstance(text_fields, dict) else fields).get("num_hidden_layers")
    try:
        if model_type not in list(TEXT_MODELS):  # a list, because a damaged model_type may not be hashable
            family_of(model_type)
        if isinstance(num_layers, int) and num_layers > MAX_LAYERS:
            raise UserError(f"The model's configuration has values that no model can have: {num_layers} layers.")
        settings_of(fields, path.parent)
        transformers_config = AutoConfig.from_pretrained(path)
        if model_type in TEXT_MODELS:
            is_tied = transformers_config.tie_word_embeddings  # the text model's own field is not used
            transformers_config = transformers_config.text_config
            transformers_config.tie_word_embeddings = is_tied
        for name in CONFIG_FIELDS:  # the weights are dequantised when they are read
            if hasattr(transformers_config, name):
                delattr(transformers_config, name)
        return transformers_config, from_transformers(transformers_config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # transformers and its validation raise many types for a damaged configuration
        raise UserError(
            f"{path} is not a valid model configuration ({reason(error)}); fix it, or download it again."
        ) from error


def save_directory(
    directory: Path,
    params: Params,
    transformers_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: Sequence[int],
) -> None:
    """Write a model directory that transformers loads: configuration, tokenizer, and weights in their dtype.

    The weights are written last and atomically, so a directory that has weights is complete.

    Raises:
        UserError: the directory cannot be written, or holds other weights.
    """
    written = directory / "model.safetensors"
    own = {written.name, temporary_path(written).name}  # the latter if a process ended while it wrote them
    other_weights = [path.name for path in directory.glob("*.safetensors*") if path.name not in own]
    other_weights += [path.name for path in directory.glob("adapter_config.json")]
    if other_weights:
        raise UserError(
            f"{directory} holds other weights ({other_weights[0]}), which would be loaded instead of the model; choose "
            f"another directory."
        )
    leaves = named_leaves(params)
    config = copy.deepcopy(transformers_config)
    # A negative id is how old checkpoints say that they have no padding token.
    if config.pad_token_id is not None and config.pad_token_id < 0:
        config.pad_token_id = None
    config.architectures = [family_of(config.model_type).architecture]
    config.dtype = str(next(iter(leaves.values())).dtype)
    config.eos_token_id = list(eos_token_ids)
    generation = GenerationConfig(
        eos_token_id=list(eos_token_ids), bos_token_id=config.bos_token_id, pad_token_id=config.pad_token_id
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(directory)
        generation.save_pretrained(directory)
        without_default_template(tokenizer).save_pretrained(directory)
        write_whole(written, save(leaves, metadata={"format": "pt"}))
    except OSError as error:
        raise UserError(
            f"The model cannot be written to {directory} ({reason(error)}); make room there, or choose another "
            f"directory."
        ) from error
    except ValueError as error:  # transformers validates what it writes
        raise UserError(
            f"The model cannot be written to {directory} ({reason(error)}); correct the configuration that it was "
            f"loaded from."
        ) from error
