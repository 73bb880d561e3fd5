"""Model directories of Hugging Face and repositories of its hub, with weights as safetensors."""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

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
    without_default_template,
)
from jaxscape.models.config import ModelConfig
from jaxscape.models.families import TEXT_MODELS, family_of, from_transformers
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import write_whole

DOWNLOAD_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
IGNORE_PATTERNS = ["*/*", "consolidated*"]  # other formats of the same weights
PROCESSOR_TEMPLATES = ("processor_config.json", "chat_template.json")  # in the order of transformers' processors
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# The largest number of layers in a config.json. It is checked first, because transformers makes a list with an entry
# for each layer, which could fill the memory.
MAX_LAYERS = 2**16
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names; values of other dtypes are quantised


def download(name: str) -> Path:
    """Download a model repository into the hub's own cache. Without a network, the cached files are used.

    Arguments:
        name: `REPOSITORY` or `REPOSITORY@REVISION`, with a branch, a tag or a commit.

    Returns:
        The directory of the snapshot.

    Raises:
        UserError: the repository is not in the cache and cannot be downloaded; the message says how to get it.
    """
    repository, _, revision = name.partition("@")
    try:
        snapshot = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=DOWNLOAD_PATTERNS, ignore_patterns=IGNORE_PATTERNS
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


def open_directory(path: Path) -> Checkpoint:
    """Open a model directory that transformers' `save_pretrained` wrote or that was downloaded from the hub.

    Raises:
        UserError: a file is missing, damaged or pickled, or the architecture is not supported.
    """
    transformers_config, config = load_config(path / "config.json")
    tokenizer = _load_tokenizer(path)
    fields = read_json(path / "config.json")
    files = _safetensors_files(path)
    tensors = _find_tensors(files, TEXT_MODELS.get(fields["model_type"], ""))
    if config.num_layers > len(tensors):  # building the shapes of that many layers might never end
        raise UserError(
            f"{path} has only {len(tensors)} tensors for the {config.num_layers} layers of its config.json; one of "
            f"them is damaged, so download the model again."
        )
    if config.tie_word_embeddings and _has_untied_head(tensors):
        # The output head in the files is used although config.json ties it to the embedding, as in transformers.
        config = replace(config, tie_word_embeddings=False)
        transformers_config.tie_word_embeddings = False
    parameters = {
        name: tensor for name, tensor in tensors.items() if not _is_redundant(name, config.tie_word_embeddings)
    }
    return Checkpoint(
        config=config,
        shapes={name: tensor.shape for name, tensor in parameters.items()},
        read=lambda name, index: parameters[name].read(index),
        tokenizer=tokenizer,
        eos_token_ids=_eos_token_ids(path, fields, tokenizer, config.vocab_size),
        transformers_config=transformers_config,
        files=tuple(files),
    )


class _StoredTensor(NamedTuple):
    """A tensor in a safetensors file.

    Attributes:
        name: its name in the file.
    """

    file: Path
    name: str
    shape: tuple[int, ...]

    def read(self, index: Any) -> np.ndarray:
        """The part of the tensor that `index` selects."""
        try:
            with safe_open(self.file, framework="numpy") as file:
                return np.asarray(file.get_slice(self.name)[index])
        except (SafetensorError, OSError) as error:
            raise _damaged(self.file, error) from error


def _find_tensors(files: Sequence[Path], prefix: str) -> dict[str, _StoredTensor]:
    """The tensors of the files whose names begin with `prefix`, by their names without it."""
    tensors: dict[str, _StoredTensor] = {}
    for file in files:
        shapes = _tensor_shapes(file)
        if duplicates := sorted(tensors.keys() & shapes.keys()):
            other = tensors[duplicates[0]].file
            raise UserError(f"{file} and {other} both hold {duplicates[0]}; keep only the model's own files.")
        tensors |= {name: _StoredTensor(file, name, shape) for name, shape in shapes.items()}
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _has_untied_head(tensors: Mapping[str, _StoredTensor]) -> bool:
    """Whether there is an output head that differs from the embedding."""
    if HEAD not in tensors:
        return False
    head, embedding = tensors[HEAD], tensors.get(EMBEDDING)
    return embedding is None or head.shape != embedding.shape or not np.array_equal(head.read(...), embedding.read(...))


def _is_redundant(name: str, is_tied: bool) -> bool:
    """Whether a tensor is not a parameter: RoPE's frequencies in old checkpoints, or a copy of the embedding."""
    return name.endswith("rotary_emb.inv_freq") or (is_tied and name == HEAD)


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
        transformers_config = AutoConfig.from_pretrained(path)
        if model_type in TEXT_MODELS:
            transformers_config = transformers_config.text_config
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
    other_weights = [path.name for path in directory.glob("*.safetensors*") if path.name != "model.safetensors"]
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
        write_whole(directory / "model.safetensors", save(leaves, metadata={"format": "pt"}))
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


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        UserError: the file is missing or damaged, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}; pass a complete directory.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({reason(error)}); fix it, or download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; fix it, or download it again.")
    return content


def _load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    settings = path / "tokenizer_config.json"
    if settings.exists() and "auto_map" in read_json(settings):
        raise UserError(
            f"The tokenizer in {path} needs code of its own ('auto_map' in {settings.name}), which jaxscape never "
            f"runs; use a model with a standard tokenizer."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, clean_up_tokenization_spaces=False)
    except Exception as error:  # transformers and tokenizers raise many types for a missing or damaged tokenizer
        raise UserError(
            f"The tokenizer in {path} cannot be loaded ({reason(error)}); download its files again."
        ) from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processor_template(path)
    return with_chat_template(tokenizer)


def _processor_template(path: Path) -> str | None:
    """The chat template that a directory has for the processor of a multimodal model; None if there is none.

    transformers' tokenizers do not read it, so it counts only where the tokenizer has no template of its own.
    """
    for file in (path / name for name in PROCESSOR_TEMPLATES):
        template = read_json(file).get("chat_template") if file.exists() else None
        if not isinstance(template, str | None):
            raise UserError(f"The chat_template in {file} is {template!r:.60}, not a text; download it again.")
        if template is not None:
            return template
    return None


def _eos_token_ids(
    path: Path, config_fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[int, ...]:
    """The ids of all end tokens that the model's files name, and of the added tokens that are in `END_OF_TURN`.

    All are needed, because chat models end a turn and a text with different tokens.
    """
    generation = path / "generation_config.json"
    values = [config_fields.get("eos_token_id"), tokenizer.eos_token_id]
    if generation.exists():
        values.append(read_json(generation).get("eos_token_id"))
    ids = [token for value in values if value is not None for token in (value if isinstance(value, list) else [value])]
    if wrong := [token for token in ids if type(token) is not int or not 0 <= token < vocab_size]:
        raise UserError(
            f"{path} names the end token {wrong[0]!r:.60}, which is not one of its {vocab_size} tokens; correct "
            f"eos_token_id in its config.json or generation_config.json."
        )
    added_tokens = tokenizer.added_tokens_decoder.items()
    end_of_turn = {number for number, token in added_tokens if token.content in END_OF_TURN and number < vocab_size}
    return tuple(sorted({*ids, *end_of_turn}))


def _safetensors_files(path: Path) -> list[Path]:
    """The files that hold a model directory's weights.

    Raises:
        UserError: there are none, or the index is damaged or names files that are missing.
    """
    index = path / "model.safetensors.index.json"
    if index.exists():
        return _indexed_files(path, index)
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]  # other files, such as a saved direction, are not the model's
    if files := sorted(path.glob("*.safetensors")):
        return files
    if any(file.suffix in PICKLE_SUFFIXES for file in path.iterdir()):
        raise UserError(pickled_message(path))
    raise UserError(f"{path} has no .safetensors file: finish its download, or convert its weights to safetensors.")


def _indexed_files(path: Path, index: Path) -> list[Path]:
    """The files that the index of a sharded checkpoint names, all of them in the directory `path`."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        files = [path / Path(name).name for name in names]  # never outside the directory
        missing = [file.name for file in files if not file.exists()]
    except (KeyError, AttributeError, TypeError, OSError) as error:  # OSError: no file can have such a name
        raise UserError(f"{index} has no table of tensors ('weight_map'); download it again.") from error
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(
            f"{path} lacks the weight files {', '.join(missing[:5])}{more} that its index names; finish its download."
        )
    return files


def pickled_message(path: Path) -> str:
    """The error message for weights that are pickled."""
    return (
        f"The weights in {path} are pickled, and loading a pickle can run any code; convert them to safetensors "
        f"first, for example with transformers' save_pretrained."
    )


def _tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors, by name.

    Raises:
        UserError: the file is damaged, or a tensor is quantised.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            tensors = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            dtypes = {name: tensor.get_dtype() for name, tensor in tensors.items()}
            shapes = {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error
    if quantised := sorted(name for name, dtype in dtypes.items() if dtype not in FLOAT_DTYPES):
        name = quantised[0]
        raise UserError(
            f"{file} holds {name} as {dtypes[name]}: quantised weights must be converted to float32, bfloat16 or "
            f"float16 first."
        )
    return shapes


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(
        f"{file} cannot be read as safetensors ({reason(error)}); it is truncated or damaged, so download it again."
    )
