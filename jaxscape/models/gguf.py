"""GGUF files: configuration, tensors and tokenizer, without torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import AutoConfig, PreTrainedConfig

from jaxscape.models.checkpoint import END_OF_TURN, Checkpoint, named_leaves
from jaxscape.models.config import LayerKind, ModelConfig
from jaxscape.models.decoder import parameter_shapes
from jaxscape.models.families import from_transformers
from jaxscape.models.gguf_tokenizer import _CONTROL, _token_types, read_tokenizer
from jaxscape.models.rope import Rope
from jaxscape.runtime.errors import UserError, reason

Q = gguf.GGMLQuantizationType
TENSOR_TYPES = (Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q4_K, Q.Q6_K)

# The scaling of Llama 3.1 and of 3.2, which transformers knows by its parameters.
LLAMA3_FACTORS = (8.0, 32.0)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")

Tensors = Mapping[str, gguf.ReaderTensor]
Options = dict[str, Any]
"""Fields of a transformers configuration."""


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp stores a family.

    Attributes:
        family: transformers' `model_type`.
        names: the library's table of tensor names.
        options: what beside sizes and RoPE stands in the metadata or follows from the tensors, or llama.cpp knows by
            itself; given a look-up into the architecture's metadata, the tensors, and RoPE's parameters.
        is_interleaved: the two halves of each query and key head are.
        norm_offset: what is added to the weights of norms.
    """

    family: str
    names: gguf.MODEL_ARCH
    options: Callable[[Callable[..., Any], Tensors, Options], Options] = lambda get, tensors, rope: {}
    is_interleaved: bool = False
    norm_offset: float = 0.0


def _llama(_: Callable[..., Any], tensors: Tensors, __: Options) -> Options:
    return {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}


def _gemma2(get: Callable[..., Any], tensors: Tensors, rope: Options) -> Options:
    caps = {f"{of}_logit_softcapping": get(f"{of}_logit_softcapping", cap) for of, cap in GEMMA2_CAPS.items()}
    return caps | _gemma(get)


def _gemma(get: Callable[..., Any]) -> Options:
    largest = get("block_count") in (46, 62)  # the 27B models scale scores by the width of a head that they have not
    size = get("embedding_length") // get("attention.head_count") if largest else get("attention.key_length")
    return {"query_pre_attn_scalar": size, "sliding_window": get("attention.sliding_window")}


def _gemma3(get: Callable[..., Any], tensors: Tensors, rope: Options) -> Options:
    local = {"rope_type": "default", "rope_theta": get("rope.freq_base_swa", 10000.0)}
    both = {"full_attention": rope, "sliding_attention": local}
    options = {"rope_parameters": both, "final_logit_softcapping": get("final_logit_softcapping", None)}
    pattern = get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        options["layer_types"] = ["sliding_attention" if turns else "full_attention" for turns in pattern]
    else:
        options["sliding_window_pattern"] = pattern
    return options | _gemma(get)


def _phi3(get: Callable[..., Any], tensors: Tensors, rope: Options) -> Options:
    options = {"sliding_window": get("attention.sliding_window", None) or None}
    if ROPE_TENSORS[1] not in tensors:
        return options
    short, long = (tensors[name].data.astype(np.float64).tolist() for name in ROPE_TENSORS[1:])
    original = get("rope.scaling.original_context_length")
    factors = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    if (factor := get("rope.scaling.attn_factor", None)) is not None:
        factors["attention_factor"] = factor
    base = {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0)}
    return options | {"rope_parameters": base | factors, "original_max_position_embeddings": original}


# Of the scores and of the logits, where a file does not say.
GEMMA2_CAPS = {"attn": 50.0, "final": 30.0}
# What changes nothing that is computed here; every other key must be read, or nothing stand there.
_IRRELEVANT = (
    "vocab_size",
    "attention.causal",
    "rope.scaling.finetuned",
    "tensor_data_layout",
)
_ARCH = gguf.MODEL_ARCH
ARCHITECTURES = {
    "llama": Architecture("llama", _ARCH.LLAMA, _llama, is_interleaved=True),
    "qwen2": Architecture("qwen2", _ARCH.QWEN2),
    "qwen3": Architecture("qwen3", _ARCH.QWEN3),
    "gemma2": Architecture("gemma2", _ARCH.GEMMA2, _gemma2, norm_offset=1.0),
    "gemma3": Architecture("gemma3_text", _ARCH.GEMMA3, _gemma3, norm_offset=1.0),
    "phi3": Architecture("phi3", _ARCH.PHI3, _phi3),
}
"""By their names in GGUF files."""

_T = gguf.GGUFValueType
_WIDTHS = {
    **dict.fromkeys((_T.UINT8, _T.INT8, _T.BOOL), 1),
    **dict.fromkeys((_T.UINT16, _T.INT16), 2),
    **dict.fromkeys((_T.UINT32, _T.INT32, _T.FLOAT32), 4),
    **dict.fromkeys((_T.UINT64, _T.INT64, _T.FLOAT64), 8),
}
_MAX_ELEMENTS = 2**20  # of a list: four times the largest vocabularies; the library needs a kilobyte for each
_MAX_DIMENSIONS = 4  # ggml's


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file of one of `ARCHITECTURES`.

    Raises:
        UserError: the file is damaged, or its architecture, a tensor type or its tokenizer is not supported.
    """
    try:
        _check_header(np.memmap(path, mode="r").data)
        reader = gguf.GGUFReader(path)
        _check_offsets(reader)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # the library raises whatever parsing a damaged file runs into
        raise UserError(
            f"{path} cannot be read as GGUF ({reason(error)}); it is truncated or damaged, so download it again."
        ) from error
    kind = fields.get("general.architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError(f"{path} has the architecture {kind!r:.60}; supported are {', '.join(ARCHITECTURES)}.")
    architecture = ARCHITECTURES[kind]
    if unknown := sorted({t.tensor_type.name for t in tensors.values() if t.tensor_type not in TENSOR_TYPES}):
        supported = ", ".join(kind.name for kind in TENSOR_TYPES)
        raise UserError(f"{path} has tensors of type {', '.join(unknown)}; supported are {supported}.")
    try:
        config, transformers_config = _config(fields, tensors)
        _check_token_ids(fields)
        tokenizer = read_tokenizer(fields)
        eos_token_ids = _eos_token_ids(fields)
        names = _huggingface_names(config, architecture, tensors.keys())
    except UserError as error:
        raise UserError(f"{path}: {reason(error)}") from error
    except Exception as error:  # metadata that is missing, of another type, or of another length
        raise UserError(f"{path} lacks metadata of a model ({reason(error)}); download it again.") from error

    @lru_cache(maxsize=1)  # its parts are read one after another
    def whole(name: str) -> np.ndarray:
        tensor = tensors[names[name]]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        if architecture.is_interleaved and ".q_proj." in name:
            return _unpermute(values, config.num_heads)
        if architecture.is_interleaved and ".k_proj." in name:
            return _unpermute(values, config.num_kv_heads)
        return values - architecture.norm_offset if "norm" in name else values

    return Checkpoint(
        config=config,
        shapes={ours: tuple(map(int, tensors[theirs].shape[::-1])) for ours, theirs in names.items()},
        read=lambda name, index: whole(name)[index],
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
        transformers_config=transformers_config,
        files=(path,),
    )


def _check_header(data: memoryview) -> None:
    """Raise a `ValueError` if what the header counts cannot be a model's, or ends beyond the file.

    The library believes every count: it would loop over what is not there, and make lists of it.
    """
    at = 0

    def take(length: int) -> memoryview:
        nonlocal at
        at += length
        if at > len(data):
            raise ValueError("its header goes on where it ends")
        return data[at - length : at]

    def number(width: int) -> int:
        return int.from_bytes(take(width), "little")

    if take(4) != b"GGUF":
        raise ValueError("it does not begin with 'GGUF'")
    if (version := number(4)) not in (2, 3):  # of a big-endian file, the library would swap no weights
        raise ValueError(f"its version is {version}, or it is big-endian")
    num_tensors, num_fields = number(8), number(8)
    for _ in range(num_fields):
        take(number(8))
        kind, count = number(4), 1
        if kind == _T.ARRAY:
            kind, count = number(4), number(8)
        if count > _MAX_ELEMENTS:
            raise ValueError(f"it has a list of {count} values")
        if kind in _WIDTHS:
            take(count * _WIDTHS[kind])
        elif kind == _T.STRING:
            for _ in range(count):
                take(number(8))
        else:
            raise ValueError(f"it has values of type {kind}")
    for _ in range(num_tensors):
        take(number(8))
        if (num_dimensions := number(4)) > _MAX_DIMENSIONS:
            raise ValueError(f"it has a tensor of {num_dimensions} dimensions")
        take(8 * num_dimensions + 4 + 8)  # and type and offset


def _check_offsets(reader: gguf.GGUFReader) -> None:
    """Raise a `ValueError` unless each tensor begins where the one before it ends, which ggml demands, too."""
    expected, alignment = reader.data_offset, int(reader.alignment)
    for tensor in reader.tensors:
        if tensor.data_offset != expected or not tensor.n_elements:
            raise ValueError(f"{tensor.name} is empty, or does not begin where the tensor before it ends")
        expected += -(-tensor.n_bytes // alignment) * alignment


def _check_token_ids(fields: Mapping[str, Any]) -> None:
    """Raise a `UserError` if a special token is not of the vocabulary: where it is looked up, −1 would be the last."""
    count = len(fields["tokenizer.ggml.tokens"])
    for name in ("bos", "eos", "eot", "unknown", "padding"):
        token = fields.get(f"tokenizer.ggml.{name}_token_id", 0)
        if type(token) is not int or not 0 <= token < count:
            raise UserError(
                f"The GGUF file names the {name} token {token!r:.60}, which is not one of its {count} tokens."
            )


def _config(
    fields: Mapping[str, Any], tensors: Mapping[str, gguf.ReaderTensor]
) -> tuple[ModelConfig, PreTrainedConfig]:
    kind = fields["general.architecture"]
    architecture = ARCHITECTURES[kind]

    seen = {f"{kind}.{key}" for key in _IRRELEVANT}

    def get(key: str, *default: Any) -> Any:
        seen.add(f"{kind}.{key}")
        return fields.get(f"{kind}.{key}", *default) if default else fields[f"{kind}.{key}"]

    heads = get("attention.head_count")
    head_dim = get("attention.key_length", get("embedding_length") // heads)
    if get("attention.value_length", head_dim) != head_dim:
        raise UserError("The GGUF file's values have other sizes than its keys, which is not supported.")
    largest = max((int(size) for tensor in tensors.values() for size in tensor.shape), default=0)
    if get("block_count") > len(tensors) or head_dim > largest:  # what is made for each of them would not end
        raise UserError("The GGUF file's tensors are too few, or too small, for its blocks and heads; it is damaged.")
    rope = {"rope_type": "default", "rope_theta": get("rope.freq_base", 10000.0)}
    if (part := get("rope.dimension_count", head_dim) / head_dim) != 1:
        rope["partial_rotary_factor"] = part
    factor = get("rope.scaling.factor", get("rope.scale_linear", 0.0)) or 1.0
    original = get("rope.scaling.original_context_length", None)
    # llama.cpp's type is linear where none stands.
    scaling = get("rope.scaling.type", "linear")
    if scaling != "none" and (scaling, factor) != ("linear", 1.0):
        rope |= {"rope_type": scaling, "factor": factor}
    if rope["rope_type"] == "yarn":
        slow, fast = get("rope.scaling.yarn_beta_slow", None), get("rope.scaling.yarn_beta_fast", None)
        rope |= {"original_max_position_embeddings": original, "beta_slow": slow, "beta_fast": fast}
    options = {
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": rope,
        **architecture.options(get, tensors, rope),
    }
    declared = AutoConfig.for_model(architecture.family, **options)
    config = from_transformers(declared)
    others = {key for key, value in fields.items() if key.startswith(f"{kind}.") and value}
    if unknown := sorted(others - seen):
        raise UserError(f"The GGUF file has options that are not supported: {', '.join(unknown)}.")
    if "rope_freqs.weight" not in tensors:
        return config, declared
    # llama.cpp stores Llama 3's scaling as one divisor for each frequency.
    divisors = tensors["rope_freqs.weight"].data.astype(np.float64)
    scaled = tuple(float(f / d) for f, d in zip(_frequencies(config), divisors, strict=True))
    for factor in LLAMA3_FACTORS:
        scaling = {"rope_parameters": rope | LLAMA3_ROPE | {"factor": factor}}
        known = AutoConfig.for_model(architecture.family, **options | scaling)
        if np.allclose(_frequencies(found := from_transformers(known)), scaled, rtol=1e-5, atol=0):
            return found, known
    return replace(config, layers=(LayerKind(Rope(scaled)),)), declared


def _frequencies(config: ModelConfig) -> tuple[float, ...]:
    rope = config.kind(0).rope
    return () if rope is None else rope.frequencies


def _huggingface_names(config: ModelConfig, architecture: Architecture, found: Any) -> dict[str, str]:
    """From Hugging Face names to this file's; names that the model does not know stay, for one error to list them."""
    table = gguf.get_tensor_name_map(architecture.names, config.num_layers)
    ours = {}
    for name in named_leaves(parameter_shapes(config)):
        theirs = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs in found:
            ours[name] = theirs
    known = {*ours.values(), *ROPE_TENSORS}
    return ours | {name: name for name in found if name not in known}


def _unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of the two halves of each query or key head (rows of the matrix)."""
    rows = values.shape[0]
    return values.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)


def _eos_token_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    tokens = fields["tokenizer.ggml.tokens"]
    stated = {fields[key] for kind in ("eos", "eot") if (key := f"tokenizer.ggml.{kind}_token_id") in fields}
    named = {
        i
        for i, (token, kind) in enumerate(zip(tokens, _token_types(fields), strict=True))
        if kind == _CONTROL and token in END_OF_TURN
    }
    return tuple(sorted(stated | named))
