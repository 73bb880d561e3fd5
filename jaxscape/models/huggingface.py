"""Hugging Face model directories and hub repositories: safetensors, configuration and tokenizer files only."""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.flax import save
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from jaxscape.models.checkpoint import (
    END_OF_TURN,
    Checkpoint,
    Params,
    named_leaves,
    with_chat_template,
    without_given_template,
)
from jaxscape.models.config import ModelConfig
from jaxscape.models.families import TEXT_MODELS, family_of, from_transformers
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import write_whole

DOWNLOADED = ["*.safetensors", "*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
LEFT = ["*/*", "consolidated*"]  # other formats of the same weights
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
MAX_LAYERS = 2**16  # transformers makes lists of them before anything can be compared
FLOATS = ("F64", "F32", "F16", "BF16")  # what safetensors calls dtypes whose values are weights as they are


def download(name: str) -> Path:
    """The snapshot of `REPOSITORY` or `REPOSITORY@REVISION` in the hub's own cache, from where it is used when there is
    no network; a download that broke off goes on.

    Raises:
        UserError: it is neither there nor to be had; the message tells how to get it.
    """
    repository, _, revision = name.partition("@")
    try:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=DOWNLOADED, ignore_patterns=LEFT
        )
        return Path(found)
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
    except Exception as error:  # of the network, the hub, the disk, or the name: each library has its own
        raise UserError(
            f"{name} is not in the cache and the hub cannot be reached ({reason(error)}); connect to the "
            f"network, or pass a local model directory."
        ) from error


def open_directory(path: Path) -> Checkpoint:
    """Open a model directory that `save_pretrained` or the hub made.

    Raises:
        UserError: a file is missing, damaged or pickled, or the architecture is not supported.
    """
    transformers_config, config = load_config(path / "config.json")
    tokenizer = _tokenizer(path)
    tensors = {file: _tensor_shapes(file) for file in _safetensors_files(path)}
    where: dict[str, Path] = {}
    for file, found in tensors.items():
        if twice := sorted(where.keys() & found.keys()):
            raise UserError(f"{file} and {where[twice[0]]} both hold {twice[0]}; keep only the model's own files.")
        where |= dict.fromkeys(found, file)
    declared = read_json(path / "config.json")
    prefix = TEXT_MODELS.get(declared["model_type"], "")
    shapes = {
        name.removeprefix(prefix): shape
        for found in tensors.values()
        for name, shape in found.items()
        if name.startswith(prefix)
    }

    if config.num_layers > len(shapes):  # the decoder's shapes, each layer made for itself, would not end
        raise UserError(
            f"{path} has only {len(shapes)} tensors for the {config.num_layers} layers of its config.json; one of "
            f"them is damaged, so download the model again."
        )

    def read(name: str, index: Any) -> np.ndarray:
        try:
            with safe_open(where[prefix + name], framework="numpy") as file:
                return np.asarray(file.get_slice(prefix + name)[index])
        except (SafetensorError, OSError) as error:
            raise _damaged(where[prefix + name], error) from error

    # Old checkpoints hold RoPE's frequencies, and some a copy of a tied head: neither is a parameter.
    redundant = {name for name in shapes if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and HEAD in shapes:
        if shapes[HEAD] == shapes.get(EMBEDDING) and np.array_equal(read(HEAD, ...), read(EMBEDDING, ...)):
            redundant.add(HEAD)
        else:  # transformers, too, believes the tensors
            config = replace(config, tie_word_embeddings=False)
            transformers_config.tie_word_embeddings = False
    return Checkpoint(
        config=config,
        shapes={name: shape for name, shape in shapes.items() if name not in redundant},
        read=read,
        tokenizer=tokenizer,
        eos_token_ids=_eos_token_ids(path, declared, tokenizer, config.vocab_size),
        transformers_config=transformers_config,
        files=tuple(tensors),
    )


def load_config(path: Path) -> tuple[PreTrainedConfig, ModelConfig]:
    """A `config.json`, as transformers has it and as the decoder does; of a multimodal model, its text model's.

    Raises:
        UserError: it is missing or damaged, or not of a family, or it has options, that the decoder computes.
    """
    fields = read_json(path)
    model_type, text = fields.get("model_type"), fields.get("text_config")
    layers = (text if isinstance(text, dict) else fields).get("num_hidden_layers")
    try:
        if model_type not in list(TEXT_MODELS):  # it may be anything
            family_of(model_type)
        if isinstance(layers, int) and layers > MAX_LAYERS:
            raise UserError(f"The model's configuration has values that no model can have: {layers} layers.")
        found = AutoConfig.from_pretrained(path)
        if model_type in TEXT_MODELS:
            found = found.text_config
        return found, from_transformers(found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # transformers and its validation raise many types for a damaged configuration
        raise UserError(f"{path} is not a model's configuration ({reason(error)}).") from error


def save_directory(
    directory: Path,
    params: Params,
    transformers_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: Sequence[int],
) -> None:
    """Write a model directory that transformers loads: configuration, tokenizer, and weights in their dtype.

    The weights come last and whole, so that a directory that has them is complete.

    Raises:
        UserError: the directory cannot be written, or holds other weights.
    """
    others = [path.name for path in directory.glob("*.safetensors*") if path.name != "model.safetensors"]
    others += [path.name for path in directory.glob("adapter_config.json")]
    if others:
        raise UserError(
            f"{directory} holds other weights ({others[0]}), which would be loaded instead; choose another."
        )
    leaves = named_leaves(params)
    config = copy.deepcopy(transformers_config)
    if config.pad_token_id is not None and config.pad_token_id < 0:  # old checkpoints say so that they have none
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
        without_given_template(tokenizer).save_pretrained(directory)
        write_whole(directory / "model.safetensors", save(leaves, metadata={"format": "pt"}))
    except (OSError, ValueError) as error:  # transformers checks what it writes
        raise UserError(f"The model cannot be written to {directory} ({error}).") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}; pass a directory that holds a whole model.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); mend it, or download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; mend it, or download it again.")
    return content


def _tokenizer(path: Path) -> PreTrainedTokenizerBase:
    settings = path / "tokenizer_config.json"
    if settings.exists() and "auto_map" in read_json(settings):
        raise UserError(f"The tokenizer in {path} needs code of its own, which is never run; use a standard one.")
    try:
        return with_chat_template(AutoTokenizer.from_pretrained(path, clean_up_tokenization_spaces=False))
    except Exception as error:  # transformers and tokenizers raise many types for a missing or damaged tokenizer
        raise UserError(f"The tokenizer in {path} cannot be loaded ({reason(error)}).") from error


def _eos_token_ids(
    path: Path, declared: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[int, ...]:
    """Every end token that the model's files name: chat models end a turn and a text with different ones."""
    generation = path / "generation_config.json"
    stated = [declared.get("eos_token_id"), tokenizer.eos_token_id]
    if generation.exists():
        stated.append(read_json(generation).get("eos_token_id"))
    ids = [token for value in stated if value is not None for token in (value if isinstance(value, list) else [value])]
    if wrong := [token for token in ids if type(token) is not int or not 0 <= token < vocab_size]:
        raise UserError(f"{path} names the end token {wrong[0]!r}, which is not one of its {vocab_size} tokens.")
    added = tokenizer.added_tokens_decoder.items()
    ends = {number for number, token in added if token.content in END_OF_TURN and number < vocab_size}
    return tuple(sorted({*ids, *ends}))


def _safetensors_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
            files = [path / Path(name).name for name in names]  # in this directory, whatever the index says
            missing = [file.name for file in files if not file.exists()]
        except (KeyError, AttributeError, TypeError, OSError) as error:  # the last for a name that no file can have
            raise UserError(f"{index} has no table of tensors ('weight_map'); download it again.") from error
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise UserError(f"{path} lacks the weight files {', '.join(missing[:5])}{more} that its index names.")
        return files
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]  # whatever else lies there, a direction perhaps
    if files := sorted(path.glob("*.safetensors")):
        return files
    if any(file.suffix in PICKLED for file in path.iterdir()):
        raise UserError(pickled_message(path))
    raise UserError(f"{path} has no .safetensors file: finish its download, or convert its weights to safetensors.")


def pickled_message(path: Path) -> str:
    return (
        f"The weights in {path} are pickled, and loading a pickle can run any code; convert them to safetensors "
        f"first, for example with transformers' save_pretrained."
    )


def _tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            found = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            dtypes = {name: tensor.get_dtype() for name, tensor in found.items()}
            shapes = {name: tuple(tensor.get_shape()) for name, tensor in found.items()}
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error
    if others := sorted(name for name, dtype in dtypes.items() if dtype not in FLOATS):
        raise UserError(
            f"{file} holds {others[0]} as {dtypes[others[0]]}: quantised weights must be converted to float32, "
            f"bfloat16 or float16 first."
        )
    return shapes


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(
        f"{file} cannot be read as safetensors ({reason(error)}); it is truncated or damaged, so download it again."
    )
