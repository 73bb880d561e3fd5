"""GGUF files: their configuration and tensors, read without torch."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, TokenType
from transformers import AutoConfig, PreTrainedConfig

from jaxscape.models.chat_defaults import END_OF_TURN, template_source
from jaxscape.models.checkpoint import Checkpoint, Sources, tensor_shapes
from jaxscape.models.config import LayerKind, ModelConfig
from jaxscape.models.decoder import parameter_shapes
from jaxscape.models.families import from_transformers
from jaxscape.models.gguf_tokenizer import read_tokenizer, token_types
from jaxscape.models.rope import Rope
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import check_not_pointer
from jaxscape.runtime.texts import listed

# RoPE scaling of Llama 3.1 (factor 8) and 3.2 (factor 32). A GGUF file has only the divisors of the frequencies that
# follow from it, so `_config` tries which factor gives these divisors.
LLAMA3_FACTORS = (8.0, 32.0)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# The softcaps that llama.cpp uses for a Gemma 2 file that does not name any.
GEMMA2_SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}

ROPE_DIVISORS, SHORT_FACTORS, LONG_FACTORS = (
    "rope_freqs.weight",
    "rope_factors_short.weight",
    "rope_factors_long.weight",
)

Fields = Mapping[str, Any]
"""The metadata of a file, by key."""
Tensors = Mapping[str, gguf.ReaderTensor]
"""The tensors of a file, by their names in the file."""
Options = dict[str, Any]
"""Fields of a transformers configuration, by name."""

# Keys that may have any value, because they do not change what the model computes. Other unknown keys are an error.
_IRRELEVANT = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")


class _Metadata:
    """The part of a file's metadata that describes the model: the file's key `llama.block_count` is `block_count` here.

    It records which keys were read, so that an option that nothing reads becomes an error and is not ignored.
    """

    def __init__(self, fields: Fields) -> None:
        self._fields, self._prefix = fields, f"{fields['general.architecture']}."
        self._read = {self._prefix + key for key in _IRRELEVANT}

    def __getitem__(self, key: str) -> Any:
        self._read.add(self._prefix + key)
        return self._fields[self._prefix + key]

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(self._prefix + key)
        return self._fields.get(self._prefix + key, default)

    def unread(self) -> list[str]:
        """The keys, as in the file, that were not read and whose value is not zero, false or empty."""
        keys = {key for key, value in self._fields.items() if key.startswith(self._prefix) and value}
        return sorted(keys - self._read)


def _no_options(metadata: _Metadata, tensors: Tensors, rope: Options) -> Options:
    return {}


def _llama(metadata: _Metadata, tensors: Tensors, rope: Options) -> Options:
    return {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}


def _gemma2(metadata: _Metadata, tensors: Tensors, rope: Options) -> Options:
    softcaps = {name: metadata.get(name, default) for name, default in GEMMA2_SOFTCAPS.items()}
    return softcaps | _gemma(metadata)


def _gemma3(metadata: _Metadata, tensors: Tensors, rope: Options) -> Options:
    local_rope = {"rope_type": "default", "rope_theta": metadata.get("rope.freq_base_swa", 10000.0)}
    options = {
        "rope_parameters": {"full_attention": rope, "sliding_attention": local_rope},
        "final_logit_softcapping": metadata.get("final_logit_softcapping"),
    }
    pattern = metadata.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        options["layer_types"] = ["sliding_attention" if is_local else "full_attention" for is_local in pattern]
    else:
        options["sliding_window_pattern"] = pattern
    return options | _gemma(metadata)


def _gemma(metadata: _Metadata) -> Options:
    """Options that Gemma 2 and 3 share."""
    # The 27B models (46 and 62 layers) scale scores by (hidden size / heads)^-0.5 instead of head_dim^-0.5.
    if metadata["block_count"] in (46, 62):
        scalar = metadata["embedding_length"] // metadata["attention.head_count"]
    else:
        scalar = metadata["attention.key_length"]
    return {"query_pre_attn_scalar": scalar, "sliding_window": metadata["attention.sliding_window"]}


def _phi3(metadata: _Metadata, tensors: Tensors, rope: Options) -> Options:
    options = {"sliding_window": metadata.get("attention.sliding_window") or None}
    if SHORT_FACTORS not in tensors:
        return options
    short, long = (tensors[name].data.astype(np.float64).tolist() for name in (SHORT_FACTORS, LONG_FACTORS))
    longrope = {
        "rope_type": "longrope",
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
        "short_factor": short,
        "long_factor": long,
    }
    original_context = metadata["rope.scaling.original_context_length"]
    if (factor := metadata.get("rope.scaling.attn_factor")) is not None:
        longrope["attention_factor"] = factor
    return options | {"rope_parameters": longrope, "original_max_position_embeddings": original_context}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp stores a model family.

    Attributes:
        family: transformers' `model_type`.
        tensor_names: the gguf library's key for the architecture's table of tensor names.
        options: a function from the metadata, the tensors and transformers' `rope_parameters` to the fields of the
            transformers configuration that this family has besides the sizes and RoPE of all families.
        is_interleaved: whether llama.cpp's converter interleaves the two halves of each query and key head.
        norm_offset: the number that llama.cpp's converter adds to the weights of norms.
    """

    family: str
    tensor_names: gguf.MODEL_ARCH
    options: Callable[[_Metadata, Tensors, Options], Options] = _no_options
    is_interleaved: bool = False
    norm_offset: float = 0.0


ARCHITECTURES = {
    "llama": Architecture("llama", gguf.MODEL_ARCH.LLAMA, _llama, is_interleaved=True),
    "qwen2": Architecture("qwen2", gguf.MODEL_ARCH.QWEN2),
    "qwen3": Architecture("qwen3", gguf.MODEL_ARCH.QWEN3),
    "gemma2": Architecture("gemma2", gguf.MODEL_ARCH.GEMMA2, _gemma2, norm_offset=1.0),
    "gemma3": Architecture("gemma3_text", gguf.MODEL_ARCH.GEMMA3, _gemma3, norm_offset=1.0),
    "phi3": Architecture("phi3", gguf.MODEL_ARCH.PHI3, _phi3),
}
"""The supported architectures, by the value of `general.architecture` in a file's metadata."""


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file of one of `ARCHITECTURES`. If it is one of several parts, the others are opened too.

    Raises:
        UserError: the file is damaged or holds something other than a model, a part is missing, or the architecture, a
            tensor type or the tokenizer is not supported.
    """
    files, fields, tensors = _read_parts(path)
    name = fields.get("general.architecture")
    _check_is_model(path, fields, tensors)
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(f"{path} has the architecture {name!r:.60}; supported are {', '.join(ARCHITECTURES)}.")
    architecture = ARCHITECTURES[name]
    types = {tensor.tensor_type for tensor in tensors.values()}
    if unsupported := sorted(kind.name for kind in types if not _can_dequantise(kind)):
        raise UserError(
            f"{path} has tensors of type {', '.join(unsupported)}, which the gguf library cannot read: use a file of "
            f"this model with another quantisation, such as Q8_0 or Q4_K_M."
        )
    try:
        config, transformers_config = _config(architecture, fields, tensors)
        _check_token_ids(fields)
        tokenizer = read_tokenizer(fields)
        eos_token_ids = _eos_token_ids(fields)
        names = _tensor_names(config, architecture, tensors.keys())
    except UserError as error:
        raise UserError(f"{path}: {reason(error)}") from error
    except Exception as error:  # keys that are missing, or values of another type or length
        raise UserError(
            f"{path} has missing or invalid model metadata ({reason(error)}); download it again."
        ) from error

    @lru_cache(maxsize=1)  # a tensor that is read in several parts is dequantised once
    def read_tensor(name: str) -> np.ndarray:
        return _read_tensor(name, tensors[names[name]], architecture, config)

    return Checkpoint(
        config=config,
        shapes={name: tuple(map(int, tensors[stored].shape[::-1])) for name, stored in names.items()},
        read=lambda name, index: read_tensor(name)[index],
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
        transformers_config=transformers_config,
        files=files,
        sources=Sources(str(path), template_source(tokenizer, path), tuple(map(str, files))),
    )


def stored_types(path: Path) -> list[str]:
    """The type of each tensor in a GGUF file, by ggml's names, such as `Q4_K`.

    Raises:
        UserError: the file is damaged.
    """
    return [tensor.tensor_type.name for tensor in _read_file(path)[1].values()]


def is_gguf(path: Path) -> bool:
    """Whether a path is a file in GGUF format by its name or by its first bytes. (Ollama's files have no ending.)"""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


# How llama.cpp names the parts of a split model, counted from 1.
_PART_NAME = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.gguf)", re.IGNORECASE)
_PART_NUMBER, _PART_COUNT, _TENSOR_COUNT = "split.no", "split.count", "split.tensors.count"


def _read_parts(path: Path) -> tuple[tuple[Path, ...], Fields, Tensors]:
    """The files of a model that may be split into several, the metadata of the first of them, and all their tensors.

    Arguments:
        path: any of the files, which lie in one directory.
    """
    fields, tensors = _read_file(path)
    if (count := fields.get(_PART_COUNT, 1)) in (0, 1):
        return (path,), fields, tensors
    this_part = f"{path} is part {fields.get(_PART_NUMBER, 0) + 1} of {count} of a split model"
    name = _PART_NAME.fullmatch(path.name)
    if name is None or int(name[2]) != count:
        raise UserError(
            f"{this_part}, but its name does not end in -00001-of-{count:05d}.gguf or another part's number, by which "
            f"the other parts are found; give the parts the names that they were published under."
        )
    files = tuple(path.with_name(f"{name[1]}-{number:05d}-of-{name[2]}{name[3]}") for number in range(1, count + 1))
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{this_part}; put the other parts beside it (missing: {listed(missing)}).")
    parts = [(fields, tensors) if file == path else _read_file(file) for file in files]
    for number, (file, (part_fields, _)) in enumerate(zip(files, parts, strict=True)):
        if (part_fields.get(_PART_NUMBER), part_fields.get(_PART_COUNT)) != (number, count):
            raise UserError(f"{file} is not part {number + 1} of {count}, as its name says; download it again.")
    all_tensors = {name: tensor for _, part_tensors in parts for name, tensor in part_tensors.items()}
    if len(all_tensors) != (expected := parts[0][0].get(_TENSOR_COUNT)):
        raise UserError(
            f"The {count} parts of {path} have {len(all_tensors)} tensors instead of {expected}; they belong to "
            f"different files, so download them again."
        )
    return files, parts[0][0], all_tensors


def _read_file(path: Path) -> tuple[Fields, Tensors]:
    """The metadata and the tensors of one file."""
    try:
        check_not_pointer(path)
        _check_format(path)
        _check_header(path)
        reader = gguf.GGUFReader(path)
        _check_offsets(reader)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return fields, {tensor.name: tensor for tensor in reader.tensors}
    except UserError:
        raise
    except Exception as error:  # in a damaged file, the library runs into errors of many types
        raise UserError(
            f"{path} cannot be read as GGUF ({reason(error)}); it is truncated or damaged, so download it again."
        ) from error


_OLD_FORMATS = (b"ggml", b"ggmf", b"ggjt", b"ggla", b"lmgg", b"fmgg", b"tjgg", b"algg")  # in either byte order


def _check_format(path: Path) -> None:
    """Raise a `UserError` if the file is whole but in another format."""
    with path.open("rb") as file:
        start = file.read(8)
    version = start[4:]
    if start[:4] in _OLD_FORMATS:
        raise UserError(f"{path} is in the GGML format, which GGUF has replaced: use a GGUF file of this model.")
    if start[:4] == b"GGUF" and version[:2] == b"\0\0" and any(version):
        raise UserError(
            f"{path} is a big-endian GGUF file: convert it with 'gguf-convert-endian FILE little', or use a "
            f"little-endian file."
        )
    if start[:4] == b"GGUF" and int.from_bytes(version, "little") == 1:
        raise UserError(f"{path} is in version 1 of the GGUF format: convert the model again, or use a newer file.")


# What files with these values of `general.type` and `general.architecture` hold instead of a model.
_OTHER_CONTENTS = {
    "adapter": "a LoRA adapter: give the model's file, or the adapter in PEFT's format",
    "imatrix": "an importance matrix, which is used to quantise a model: give the model's file",
    "mmproj": "the image or audio encoder of a multimodal model: give the file of its language model",
    "clip": "the image or audio encoder of a multimodal model: give the file of its language model",
    "controlvector": "a control vector: give the model's file",
}


def _check_is_model(path: Path, fields: Fields, tensors: Tensors) -> None:
    """Raise a `UserError` if the file holds something other than a model's weights."""
    for key in ("general.type", "general.architecture"):
        if (kind := fields.get(key)) in list(_OTHER_CONTENTS):  # a list, because a damaged value may not be hashable
            raise UserError(f"{path} holds {_OTHER_CONTENTS[kind]}.")
    if not tensors:
        raise UserError(f"{path} holds no weights, only metadata: give the model's file.")


@lru_cache
def _can_dequantise(kind: GGMLQuantizationType) -> bool:
    """Whether the gguf library turns tensors of this type into float32."""
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


_VALUE_BYTES = {
    **dict.fromkeys((GGUFValueType.UINT8, GGUFValueType.INT8, GGUFValueType.BOOL), 1),
    **dict.fromkeys((GGUFValueType.UINT16, GGUFValueType.INT16), 2),
    **dict.fromkeys((GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.FLOAT32), 4),
    **dict.fromkeys((GGUFValueType.UINT64, GGUFValueType.INT64, GGUFValueType.FLOAT64), 8),
}
# The largest number of values in a list of the metadata; no vocabulary has more. A longer list, in a damaged file,
# could fill the memory: the gguf library needs about a kilobyte for each value.
_MAX_ELEMENTS = 2**20
_MAX_DIMENSIONS = 4  # ggml's limit


def _check_header(path: Path) -> None:
    """Raise a `ValueError` if a count in the header is too large, or the header is longer than the file, and a
    `UserError` if a tensor's type is unknown.

    The library trusts every count: it would loop over missing data and build lists of any length.
    """
    data, position = np.memmap(path, mode="r").data, 0

    def take(length: int) -> memoryview:
        nonlocal position
        position += length
        if position > len(data):
            raise ValueError("the header is longer than the file")
        return data[position - length : position]

    def number(width: int) -> int:
        return int.from_bytes(take(width), "little")

    if take(4) != b"GGUF":
        raise ValueError("it does not begin with 'GGUF'")
    if (version := number(4)) not in (2, 3):
        raise ValueError(f"its version is {version}, not 2 or 3")
    num_tensors, num_fields = number(8), number(8)
    for _ in range(num_fields):
        take(number(8))  # key
        value_type, count = number(4), 1
        if value_type == GGUFValueType.ARRAY:
            value_type, count = number(4), number(8)
        if count > _MAX_ELEMENTS:
            raise ValueError(f"it has a list of {count} values, more than {_MAX_ELEMENTS}")
        if value_type in _VALUE_BYTES:
            take(count * _VALUE_BYTES[value_type])
        elif value_type == GGUFValueType.STRING:
            for _ in range(count):
                take(number(8))
        else:
            raise ValueError(f"it has values of type {value_type}, which is unknown or not supported")
    for _ in range(num_tensors):
        take(number(8))  # name
        if (num_dimensions := number(4)) > _MAX_DIMENSIONS:
            raise ValueError(f"it has a tensor of {num_dimensions} dimensions, more than {_MAX_DIMENSIONS}")
        take(8 * num_dimensions)
        if (kind := number(4)) not in list(GGMLQuantizationType):
            raise UserError(
                f"{path} has a tensor of type number {kind}, which this version of the gguf library does not know: "
                f"update it (pip install --upgrade gguf), use a file with another quantisation, or download a damaged "
                f"file again."
            )
        take(8)  # offset


def _check_offsets(reader: gguf.GGUFReader) -> None:
    """Raise a `ValueError` unless each tensor begins where the one before it ends, as ggml demands."""
    expected, alignment = reader.data_offset, int(reader.alignment)
    for tensor in reader.tensors:
        if not tensor.n_elements:
            raise ValueError(f"its tensor {tensor.name} is empty")
        if tensor.data_offset != expected:
            raise ValueError(f"its tensor {tensor.name} begins at byte {tensor.data_offset} instead of {expected}")
        expected += -(-tensor.n_bytes // alignment) * alignment


def _check_token_ids(fields: Fields) -> None:
    """Raise a `UserError` if a special token is not in the vocabulary. (As an index, −1 would be the last token.)"""
    num_tokens = len(fields["tokenizer.ggml.tokens"])
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        token = fields.get(key, 0)
        if type(token) is not int or not 0 <= token < num_tokens:
            raise UserError(
                f"The file's {key} is {token!r:.60}, which is not one of its {num_tokens} tokens; download it again."
            )


def _config(architecture: Architecture, fields: Fields, tensors: Tensors) -> tuple[ModelConfig, PreTrainedConfig]:
    """The model's configuration, for the decoder and as transformers' class.

    Raises:
        UserError: an option is not supported.
    """
    metadata = _Metadata(fields)
    options = _sizes(metadata, tensors)
    rope = _rope_parameters(metadata, options["head_dim"])
    options |= {
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "rms_norm_eps": metadata["attention.layer_norm_rms_epsilon"],
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": rope,
    }
    options |= architecture.options(metadata, tensors, rope)
    config, transformers_config = _make_configs(architecture, options)
    if not metadata.get("attention.causal", True):
        raise UserError("The model's attention is not causal, as in models that embed texts: it cannot answer prompts.")
    if unread := metadata.unread():
        raise UserError(f"The file has options that are not supported: {', '.join(unread)}.")
    if ROPE_DIVISORS not in tensors:
        return config, transformers_config

    # llama.cpp stores Llama 3's RoPE scaling as one divisor for each frequency.
    divisors = tensors[ROPE_DIVISORS].data.astype(np.float64)
    frequencies = tuple(float(f / divisor) for f, divisor in zip(_frequencies(config), divisors, strict=True))
    for factor in LLAMA3_FACTORS:
        llama3 = {"rope_parameters": rope | LLAMA3_ROPE | {"factor": factor}}
        scaled_configs = _make_configs(architecture, options | llama3)
        if np.allclose(_frequencies(scaled_configs[0]), frequencies, rtol=1e-5, atol=0):
            return scaled_configs
    # Other scalings cannot be written as a transformers configuration, so `check_saveable` refuses to save the model.
    return replace(config, layers=(LayerKind(Rope(frequencies)),)), transformers_config


def _make_configs(architecture: Architecture, options: Options) -> tuple[ModelConfig, PreTrainedConfig]:
    transformers_config = AutoConfig.for_model(architecture.family, **options)
    return from_transformers(transformers_config), transformers_config


def _sizes(metadata: _Metadata, tensors: Tensors) -> Options:
    """The sizes of the model, as fields of a transformers configuration.

    Raises:
        UserError: an attention head's values have another size than its keys, or the tensors are too few or too
            small for the sizes.
    """
    num_heads, num_layers = _of_all_layers(metadata, "attention.head_count"), metadata["block_count"]
    head_dim = metadata.get("attention.key_length", metadata["embedding_length"] // num_heads)
    if (value_dim := metadata.get("attention.value_length", head_dim)) != head_dim:
        raise UserError(
            f"The file's attention values have {value_dim!r:.60} features and its keys have {head_dim!r:.60}, but only "
            f"equal sizes are supported."
        )
    largest = max((int(size) for tensor in tensors.values() for size in tensor.shape), default=0)
    if num_layers > len(tensors) or head_dim > largest:  # building a model of such sizes might never end
        raise UserError(
            f"The file's {len(tensors)} tensors are too few, or too small, for its {num_layers} blocks and heads of "
            f"{head_dim} features; it is damaged, so download it again."
        )
    return {
        "hidden_size": metadata["embedding_length"],
        "intermediate_size": _of_all_layers(metadata, "feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": _of_all_layers(metadata, "attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata["context_length"],
    }


def _of_all_layers(metadata: _Metadata, key: str, default: Any = None) -> Any:
    """A size that a file may give for each layer, if it is the same in all of them."""
    value = metadata[key] if default is None else metadata.get(key, default)
    if not isinstance(value, list):
        return value
    if len(value) != (num_layers := metadata["block_count"]):
        raise UserError(
            f"The file gives {key} for {len(value)} layers, but has {num_layers!r:.60}; it is damaged, so download it "
            f"again."
        )
    if len(set(value)) != 1:
        raise UserError(f"The file's layers differ in {key} ({value!r:.60}), which is not supported.")
    return value[0]


def _rope_parameters(metadata: _Metadata, head_dim: int) -> Options:
    """RoPE with its scaling, as transformers' `rope_parameters`."""
    rope = {"rope_type": "default", "rope_theta": metadata.get("rope.freq_base", 10000.0)}
    if (rotated_part := metadata.get("rope.dimension_count", head_dim) / head_dim) != 1:
        rope["partial_rotary_factor"] = rotated_part
    factor = metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 0.0)) or 1.0
    original_context = metadata.get("rope.scaling.original_context_length")
    scaling = metadata.get("rope.scaling.type", "linear")  # llama.cpp's default
    if scaling != "none" and (scaling, factor) != ("linear", 1.0):
        rope |= {"rope_type": scaling, "factor": factor}
    if rope["rope_type"] == "yarn":
        rope |= {
            "original_max_position_embeddings": original_context,
            "beta_slow": metadata.get("rope.scaling.yarn_beta_slow"),
            "beta_fast": metadata.get("rope.scaling.yarn_beta_fast"),
        }
    return rope


def _frequencies(config: ModelConfig) -> tuple[float, ...]:
    """RoPE's frequencies in the first layer."""
    rope = config.kind(0).rope
    return () if rope is None else rope.frequencies


def _tensor_names(config: ModelConfig, architecture: Architecture, stored_names: Collection[str]) -> dict[str, str]:
    """A table from Hugging Face parameter names to the names of the file's tensors.

    Parameters that the file lacks are not in it, and tensors that the model lacks stand in it under their names in the
    file, so that one error can list all of them.
    """
    table = gguf.get_tensor_name_map(architecture.tensor_names, config.num_layers)
    names = {}
    for name in tensor_shapes(parameter_shapes(config)):
        stored_name = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored_name in stored_names:
            names[name] = stored_name
    used = {*names.values(), ROPE_DIVISORS, SHORT_FACTORS, LONG_FACTORS}
    return names | {name: name for name in stored_names if name not in used}


def _read_tensor(name: str, tensor: gguf.ReaderTensor, architecture: Architecture, config: ModelConfig) -> np.ndarray:
    """A tensor in float32 and the Hugging Face layout. The changes that llama.cpp's converter made to heads and norms
    are undone."""
    values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
    if architecture.is_interleaved and ".q_proj." in name:
        return _unpermute(values, config.num_heads)
    if architecture.is_interleaved and ".k_proj." in name:
        return _unpermute(values, config.num_kv_heads)
    return values - architecture.norm_offset if "norm" in name else values


def _unpermute(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of the two halves of each query or key head, which are rows of the matrix."""
    num_rows = values.shape[0]
    return values.reshape(num_heads, num_rows // num_heads // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)


def _eos_token_ids(fields: Fields) -> tuple[int, ...]:
    """The ids of the end tokens that the metadata names, and of the whole tokens in `END_OF_TURN`. (Some files of
    Phi-3 call `<|end|>` user-defined.)"""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    named = {fields[key] for key in keys if key in fields}
    tokens = zip(fields["tokenizer.ggml.tokens"], token_types(fields), strict=True)
    end_of_turn = {
        token_id
        for token_id, (token, token_type) in enumerate(tokens)
        if token_type in (TokenType.CONTROL, TokenType.USER_DEFINED) and token in END_OF_TURN
    }
    return tuple(sorted(named | end_of_turn))
