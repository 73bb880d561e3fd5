"""Quantised checkpoints: their weights as the floating-point numbers that they stand for.

Each format is one function, whose results are compared in the tests with another implementation, that of the format's
authors or transformers'. Only weights are dequantised: where a format also quantises activations, they stay in the
model's dtype here.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxscape.models.weights import StoredTensor, Tensor
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.files import read_json
from jaxscape.runtime.progress import note

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names; values of other dtypes are quantised
CONFIG_FIELDS = ("quantization_config", "quantization")  # the fields of config.json that name a format
ADVICE = "use the model that it was made from, or a GGUF file of it"
Settings = Mapping[str, Any]
Tensors = Mapping[str, StoredTensor]

# Names of formats as people know them, where `quant_method` has another.
_UNSUPPORTED = {
    "auto-round": "AutoRound",
    "fbgemm_fp8": "FBGEMM's FP8",
    "modelopt": "NVIDIA's ModelOpt",
}


@dataclass(frozen=True)
class Dequantised:
    """A weight that is computed from several stored tensors when it is read.

    Attributes:
        compute: gives the whole weight.
    """

    shape: tuple[int, ...]
    compute: Callable[[], np.ndarray]

    def read(self, index: Any) -> np.ndarray:
        """The part of the weight that `index` selects."""
        return self.compute()[index]


def settings_of(fields: Mapping[str, Any], directory: Path) -> Settings | None:
    """The quantisation that a `config.json` names, or None.

    Arguments:
        directory: where the file lies; AutoGPTQ used to write a `quantize_config.json` beside it.

    Raises:
        UserError: the format is not supported.
    """
    settings = next((fields[name] for name in CONFIG_FIELDS if fields.get(name)), None)
    if settings is None:
        file = directory / "quantize_config.json"
        return {"quant_method": "gptq"} | read_json(file) if file.is_file() else None
    if not isinstance(settings, Mapping):
        raise UserError(f"quantization_config is {settings!r:.60}, not a table; download the model again.")
    method = _method(settings)
    if method not in _READERS:
        name = _UNSUPPORTED.get(method, method)
        raise UserError(
            f"The weights are quantised in the format {name} (quantization_config), which is not supported: {ADVICE}."
        )
    return settings


def _method(settings: Settings) -> str:
    method = settings.get("quant_method")
    if method is None and {"bits", "group_size"} <= settings.keys():
        return "mlx"  # the only program that writes no name
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"  # versions before 0.40 of bitsandbytes
    return str(method)


def dequantised(tensors: Tensors, settings: Settings | None, origin: str) -> tuple[dict[str, Tensor], str | None]:
    """The tensors with their quantised weights dequantised, and the name of the format; None if nothing is quantised.

    Arguments:
        settings: the result of `settings_of`.
        origin: the directory, for error messages.

    Raises:
        UserError: the tensors are not those of the format, or they are quantised and no format is named.
    """
    if settings is None:
        _check_float(tensors)
        return dict(tensors), None
    method = _method(settings)
    try:
        weights, used = _READERS[method](tensors, settings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise UserError(f"{origin}: {error}") from error
        raise UserError(
            f"{origin} names the quantisation {method!r} in its config.json, but its tensors are not stored so "
            f"({type(error).__name__}: {error!s:.100}): {ADVICE}."
        ) from error
    others = {name: tensor for name, tensor in tensors.items() if name not in used}
    _check_float(others, method)
    if not weights and method != "bitsandbytes":
        raise UserError(
            f"{origin} names the quantisation {method!r} (quantization_config in config.json, or "
            f"quantize_config.json), but none of its tensors is quantised: remove it if they are the model's weights."
        )
    if not weights:  # what PEFT leaves when an adapter is merged into a dequantised base
        note(f"{origin} names the quantisation bitsandbytes, but its weights are not quantised; they are used as is.")
        return dict(others), None
    return {**others, **weights}, method


def _check_float(tensors: Tensors, method: str | None = None) -> None:
    quantised = sorted(name for name, tensor in tensors.items() if tensor.dtype not in FLOAT_DTYPES)
    if quantised:
        tensor = tensors[quantised[0]]
        if method is not None:
            raise UserError(
                f"{tensor.file} holds {tensor.name} as {tensor.dtype}, without the factors that belong to it in the "
                f"quantisation {method!r}, which config.json names: {ADVICE}."
            )
        raise UserError(
            f"{tensor.file} holds {tensor.name} as {tensor.dtype}: quantised weights must be converted to float32, "
            f"bfloat16 or float16 first, unless config.json names their format{_guess(tensors)}."
        )


def _guess(tensors: Tensors) -> str:
    """What the tensors' names say about their format, for an error message."""
    guesses = {".qweight": "GPTQ or AWQ", ".weight_packed": "compressed-tensors", ".SCB": "bitsandbytes"}
    guesses |= {".absmax": "bitsandbytes", ".weight_scale_inv": "FP8", ".weight_scale": "FP8", ".biases": "MLX"}
    names = [guess for end, guess in guesses.items() if any(name.endswith(end) for name in tensors)]
    return f" (their names look like {names[0]})" if names else ""


Read = tuple[dict[str, Tensor], set[str]]
"""Dequantised weights by name, and the names of the stored tensors that they are computed from."""


def _float8(tensors: Tensors, settings: Settings) -> Read:
    """FP8 as DeepSeek and Qwen store it: `weight_scale_inv` has a factor for each block of the weight, or one for all;
    and as AutoFP8 does: `weight_scale` is one factor for all of the weight.

    Transformers reads the former with `FineGrainedFP8Config(dequantize=True)`.
    """
    block = settings.get("weight_block_size")
    weights: dict[str, Tensor] = {}
    used = {name for name in tensors if name.endswith((".activation_scale", ".input_scale"))}
    for factors in ("weight_scale_inv", "weight_scale"):
        for name in _with_end(tensors, f".{factors}"):
            weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.{factors}"]
            grid = (1, 1) if block is None else _grid(weight.name, weight.shape, block)
            weights[f"{name}.weight"] = _scaled(weight, scale, grid, "F8_E4M3", None)
            used |= {f"{name}.weight", f"{name}.{factors}"}
    return weights, used


def _compressed_tensors(tensors: Tensors, settings: Settings) -> Read:
    """What llm-compressor writes: FP8 (`float-quantized`), int8 (`int-quantized`) and packed integers."""
    formats = {settings.get("format"), *(group.get("format") for group in settings["config_groups"].values())} - {None}
    if unsupported := sorted(formats - {"float-quantized", "int-quantized", "naive-quantized", "pack-quantized"}):
        raise UserError(
            f"The weights are quantised in the format compressed-tensors {unsupported[0]} (quantization_config), which "
            f"is not supported: {ADVICE}."
        )
    if settings.get("kv_cache_scheme"):
        raise UserError(f"The model quantises its key-value cache (kv_cache_scheme), which is not supported: {ADVICE}.")
    schemes = [group["weights"] for group in settings["config_groups"].values()]
    weights: dict[str, Tensor] = {}
    used = {name for name in tensors if name.endswith((".input_scale", ".input_zero_point"))}
    for name in _with_end(tensors, ".weight_scale"):
        scale, zero = tensors[f"{name}.weight_scale"], tensors.get(f"{name}.weight_zero_point")
        packed = tensors.get(f"{name}.weight_packed")
        weight = packed or tensors[f"{name}.weight"]
        shape = weight.shape if packed is None else tuple(tensors[f"{name}.weight_shape"].read(...).tolist())
        grids = [_scheme_grid(weight.name, shape, scheme) for scheme in schemes]
        grid = next((grid for grid in grids if grid is not None and _fits(scale.shape, grid)), None)
        if grid is None or f"{name}.weight_g_idx" in tensors:
            raise ValueError(f"{scale.name} has shape {scale.shape}, or its columns are in another order")
        if packed is None:
            weights[f"{name}.weight"] = _scaled(weight, scale, grid, weight.dtype, zero)
        else:
            bits = _bits(packed.shape[1], shape[1])
            weights[f"{name}.weight"] = Dequantised(shape, partial(_packed, packed, scale, zero, bits, shape, grid))
        used |= {f"{name}.{part}" for part in _COMPRESSED_PARTS}
    return weights, used


_COMPRESSED_PARTS = ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point")


def _scheme_grid(name: str, shape: tuple[int, ...], scheme: Settings) -> tuple[int, int] | None:
    """The number of factors along both axes of a weight in a scheme of compressed-tensors; None if it is not known."""
    match scheme["strategy"]:
        case "tensor":
            return 1, 1
        case "channel":
            return shape[0], 1
        case "group":
            return _grid(name, shape, (1, scheme["group_size"]))
        case "block":
            return _grid(name, shape, scheme["block_structure"])
    return None


def _grid(name: str, shape: tuple[int, ...], block: Any) -> tuple[int, int]:
    """The number of blocks along both axes of a weight, whose configuration says how large a block is. Raises a
    `TypeError` or a `ValueError` if that is no pair of numbers."""
    (rows, columns), (height, width) = shape, block
    if rows % height or columns % width:
        raise UserError(
            f"{name} with shape {shape} is quantised in blocks of {height} by {width}, which do not divide it, and "
            f"that is not supported: {ADVICE}."
        )
    return rows // height, columns // width


def _bits(words: int, numbers: int) -> int:
    """How many bits each of so many numbers has in so many 32-bit words."""
    bits = 32 * words // numbers
    if bits not in (2, 4, 8) or words * 32 != bits * numbers:
        raise UserError(f"Its weights have {32 * words / numbers:.3g} bits, and 2, 4 or 8 are supported: {ADVICE}.")
    return bits


def _packed(
    weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, shape: tuple[int, ...], grid: tuple[int, int]
) -> np.ndarray:
    """Numbers packed along the rows, and zero points packed along the columns, each stored with an offset."""
    offset = 2 ** (bits - 1)
    zeros: Any = 0 if zero is None else _unpacked(zero.read(...).T, bits)[:, : shape[0]].T - offset
    groups = np.arange(shape[1]) // (shape[1] // grid[1])
    return _grouped(_unpacked(weight.read(...), bits) - offset, zeros, scale.read(...).reshape(grid), groups)


def _unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """The unsigned numbers that are packed into 32-bit words along the last axis, lowest bits first, as int32."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    numbers = (np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    return numbers.reshape(*words.shape[:-1], -1).astype(np.int32)


def _grouped(q: np.ndarray, zeros: Any, scales: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(q - zero) × scale in the scales' dtype.

    Arguments:
        q: the numbers, [out, in].
        zeros, scales: those of each row and group, [out, groups]; the zeros may also be one number.
        groups: the group of each column.
    """
    zeros = np.broadcast_to(zeros, scales.shape)[:, groups]
    return ((q - zeros).astype(np.float32) * scales.astype(np.float32)[:, groups]).astype(scales.dtype)


_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


def _awq(tensors: Tensors, settings: Settings) -> Read:
    """AutoAWQ's 4 bits in its layout `gemm`: [in, out], eight columns to a word in an order of their own."""
    if settings.get("bits") != 4 or str(settings.get("version", "gemm")).lower() != "gemm":
        raise UserError(
            f"The weights are quantised by AWQ with {settings.get('bits')} bits in the layout "
            f"{settings.get('version')!r}, and 4 bits in 'gemm' are supported: {ADVICE}."
        )
    weights: dict[str, Tensor] = {}
    used: set[str] = set()
    for name in _with_end(tensors, ".qweight"):
        weight, zeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
        rows, columns = scales.shape[1], weight.shape[0]
        if (
            weight.shape[1] * 8 != rows
            or zeros.shape != (scales.shape[0], weight.shape[1])
            or columns % scales.shape[0]
        ):
            raise ValueError(f"{weight.name} has shape {weight.shape} and {scales.name} {scales.shape}")
        weights[f"{name}.weight"] = Dequantised((rows, columns), partial(_awq_weight, weight, zeros, scales))
        used |= {f"{name}.{part}" for part in ("qweight", "qzeros", "scales")}
    return weights, used


def _awq_weight(weight: Tensor, zeros: Tensor, scales: Tensor) -> np.ndarray:
    def unpacked(tensor: Tensor) -> np.ndarray:
        numbers = _unpacked(tensor.read(...), 4)
        return numbers.reshape(len(numbers), -1, 8)[:, :, _AWQ_ORDER].reshape(numbers.shape).T

    columns = weight.shape[0]
    groups = np.arange(columns) // (columns // scales.shape[0])
    return _grouped(unpacked(weight), unpacked(zeros), scales.read(...).T, groups)


def _gptq(tensors: Tensors, settings: Settings) -> Read:
    """GPTQ as AutoGPTQ stores it: [in, out], columns packed into words, and zero points less one."""
    bits, layout = settings.get("bits"), settings.get("checkpoint_format", "gptq")
    if bits not in (2, 4, 8) or layout not in (None, "gptq"):
        raise UserError(
            f"The weights are quantised by GPTQ with {bits!r:.20} bits in the layout {layout!r}, and 2, 4 or 8 bits in "
            f"'gptq' are supported: {ADVICE}."
        )
    names = _with_end(tensors, ".qweight")
    weights: dict[str, Tensor] = {}
    used = {f"{name}.{part}" for name in names for part in ("qweight", "qzeros", "scales", "g_idx")}
    for name in names:
        weight, zeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
        rows, columns = scales.shape[1], weight.shape[0] * 32 // bits
        if weight.shape[1] != rows or zeros.shape != (scales.shape[0], rows * bits // 32):
            raise ValueError(f"{weight.name} has shape {weight.shape} and {scales.name} {scales.shape}")
        size = settings["group_size"] if settings["group_size"] > 0 else columns
        groups = tensors.get(f"{name}.g_idx")
        parts = (weight, zeros, scales, groups, bits, size)
        weights[f"{name}.weight"] = Dequantised((rows, columns), partial(_gptq_weight, *parts))
    biases = [f"{name}.bias" for name in names if f"{name}.bias" in tensors]
    if not any(tensors[bias].read(...).any() for bias in biases):  # AutoGPTQ gave zeros to layers without a bias
        used |= set(biases)
    return weights, used


def _gptq_weight(
    weight: StoredTensor, zeros: Tensor, scales: Tensor, groups: Tensor | None, bits: int, size: int
) -> np.ndarray:
    q, stored = _unpacked(weight.read(...).T, bits), _unpacked(zeros.read(...), bits).T
    if (stored == 2**bits - 1).any():  # programs disagree whether it stands for 0 or for 2**bits
        raise UserError(f"{weight.file} holds a zero point of {weight.name} that GPTQ's first layout cannot express.")
    indices = np.arange(q.shape[1]) // size if groups is None else groups.read(...)
    return _grouped(q, stored + 1, scales.read(...).T, indices)


def _fits(shape: tuple[int, ...], grid: tuple[int, int]) -> bool:
    return tuple(shape) in (grid, (grid[0],) if grid[1] == 1 else grid, () if grid == (1, 1) else grid)


def _scaled(
    weight: StoredTensor, scale: StoredTensor, grid: tuple[int, int], dtype: str, zero: StoredTensor | None
) -> Dequantised:
    """A weight of 8-bit numbers q that stands for (q - zero) × scale."""
    if weight.dtype != dtype or dtype not in ("F8_E4M3", "I8") or scale.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{weight.name} is {weight.dtype} and {scale.name} is {scale.dtype}")
    if not _fits(scale.shape, grid):
        raise ValueError(f"{scale.name} has shape {scale.shape} instead of {grid}")

    def compute() -> np.ndarray:
        factors = scale.read(...)
        q = weight.read(...).astype(np.float32)
        if zero is not None:
            q = q - _spread(zero.read(...).astype(np.float32), grid, weight.shape)
        product = q * _spread(factors.astype(np.float32), grid, weight.shape)
        # transformers rounds what it reads with `weight_scale_inv` to the model's dtype, compressed-tensors rounds to
        # that of the factors.
        return product if scale.name.endswith("_inv") else product.astype(factors.dtype)

    return Dequantised(weight.shape, compute)


def _spread(values: np.ndarray, grid: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """Values of blocks as an array that broadcasts against the weight."""
    values = values.reshape(grid)
    for axis, count in enumerate(grid):
        if count > 1:
            values = np.repeat(values, shape[axis] // count, axis)
    return values


def _bitsandbytes(tensors: Tensors, settings: Settings) -> Read:
    """bitsandbytes' int8 (LLM.int8) and its 4-bit NF4 and FP4, with or without nested factors."""
    weights: dict[str, Tensor] = {}
    used: set[str] = set()
    for name in _with_end(tensors, ".SCB"):
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.SCB"]
        if (weight.dtype, scale.dtype, scale.shape) != ("I8", "F32", weight.shape[:1]):
            raise ValueError(f"{weight.name} is {weight.dtype} and {scale.name} is {scale.dtype}{scale.shape}")
        weights[f"{name}.weight"] = Dequantised(weight.shape, partial(_int8, weight, scale))
        used |= {f"{name}.weight", f"{name}.SCB", f"{name}.weight_format"}
    for state in [name for name in tensors if ".quant_state.bitsandbytes__" in name]:
        name = state.partition(".quant_state.")[0]
        parts = {part.removeprefix(f"{name}."): tensors[part] for part in tensors if part.startswith(f"{name}.")}
        options = json.loads(bytes(tensors[state].read(...).tolist()))
        shape = tuple(options["shape"])
        weight = tensors[name]
        if weight.dtype != "U8" or 2 * int(np.prod(weight.shape)) != int(np.prod(shape)):
            raise ValueError(f"{weight.name} is {weight.dtype}{weight.shape}, not {shape}")
        weights[name] = Dequantised(shape, partial(_four_bits, weight, parts, options))
        used |= {name, *(f"{name}.{part}" for part in parts)}
    return weights, used


def _int8(weight: StoredTensor, scale: StoredTensor) -> np.ndarray:
    """127 stands for the largest magnitude of a row, which is its factor."""
    return weight.read(...).astype(np.float32) * (scale.read(...)[:, None] * np.float32(1 / 127))


def _four_bits(weight: StoredTensor, parts: Mapping[str, StoredTensor], options: Settings) -> np.ndarray:
    """Each half byte, the high one first, is an index into a table; a block of numbers has a common factor."""
    packed = weight.read(...).ravel()
    indices = np.stack([packed >> 4, packed & 15], axis=-1).ravel()
    factors = parts["absmax"].read(...)
    if "nested_absmax" in parts:
        nested = np.repeat(parts["nested_absmax"].read(...), options["nested_blocksize"])[: factors.size]
        factors = parts["nested_quant_map"].read(...)[factors] * nested + np.float32(options["nested_offset"])
    values = parts["quant_map"].read(...)[indices]
    values = values * np.repeat(factors, options["blocksize"])[: values.size]
    dtype = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[options["dtype"]]
    return values.astype(dtype).reshape(options["shape"])


def _mlx(tensors: Tensors, settings: Settings) -> Read:
    """MLX's affine quantisation: q × scale + bias, with the q of a row packed into 32-bit words, lowest bits first."""
    weights: dict[str, Tensor] = {}
    used: set[str] = set()
    for name in _with_end(tensors, ".scales"):
        options = settings.get(name) or settings  # a layer may have settings of its own
        bits, group = options["bits"], options["group_size"]
        weight, scales, biases = (tensors[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
        if options.get("mode", "affine") != "affine" or bits not in (2, 4, 8):
            raise UserError(
                f"{name} is quantised in MLX's format {options.get('mode', 'affine')} with {bits} bits, which is not "
                f"supported: {ADVICE}."
            )
        shape = (weight.shape[0], weight.shape[1] * 32 // bits)
        if weight.dtype != "U32" or not scales.shape == biases.shape == (shape[0], shape[1] // group):
            raise ValueError(f"{weight.name} is {weight.dtype}{weight.shape} with {scales.shape} factors")
        weights[f"{name}.weight"] = Dequantised(shape, partial(_affine, weight, scales, biases, bits, group))
        used |= {f"{name}.weight", f"{name}.scales", f"{name}.biases"}
    return weights, used


def _affine(weight: Tensor, scales: Tensor, biases: Tensor, bits: int, group: int) -> np.ndarray:
    q = _unpacked(weight.read(...), bits)
    factors, offsets = (np.repeat(tensor.read(...).astype(np.float32), group, 1) for tensor in (scales, biases))
    return q.astype(np.float32) * factors + offsets


def _with_end(tensors: Tensors, end: str) -> list[str]:
    """The names of tensors that end so, without this end."""
    return [name.removesuffix(end) for name in tensors if name.endswith(end)]


_READERS: Mapping[str, Callable[[Tensors, Settings], Read]] = {
    "fp8": _float8,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "mlx": _mlx,
}
