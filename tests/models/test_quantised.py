"""Quantised checkpoints, compared with what those who defined the formats compute from them."""

import base64
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors import NaiveQuantizationCompressor, PackedQuantizationCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from helpers import MakeModel, assert_same_tree, torch_logits
from safetensors.torch import load_file, save_file
from transformers.integrations import metal_quantization

import jaxscape as js
from jaxscape.models.checkpoint import named_leaves
from jaxscape.models.quantised import dequantised
from jaxscape.models.weights import stored_tensors

TOKENS = np.arange(3, 43).reshape(2, 20)
WEIGHTS = "model.safetensors"
SIZE = {"hidden_size": 64, "intermediate_size": 128}
Stored = dict[str, torch.Tensor]


def quantise(
    directory: Path, settings: Mapping[str, Any], parts: Callable[[torch.Tensor], Stored], every: bool = False
) -> None:
    """Quantise a directory's linear layers, without the head, and with `every` the embedding and the head too.

    Arguments:
        parts: gives what is stored for a weight, by the end of the name after the module's.
    """
    tensors = load_file(directory / WEIGHTS)
    stored: Stored = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and (every or "proj" in name):
            stored |= {f"{name.removesuffix('.weight')}.{end}": part for end, part in parts(tensor).items()}
        else:
            stored[name] = tensor
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, directory / WEIGHTS, {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | dict(settings)))


@pytest.fixture
def copy(make_model: MakeModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_model(**SIZE)[0], tmp_path / "copy"))


def assert_transformers_agrees(directory: Path, dequantise: bool = False, **options: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype="float32", device_map="cpu", **options
    )
    if dequantise:
        model = model.dequantize()
    ours = js.load_model(directory, "float32")
    np.testing.assert_allclose(ours(TOKENS), torch_logits(model.eval(), TOKENS), atol=1e-3, rtol=1e-4)
    assert ours.sources is not None
    assert ours.sources.quantisation
    js.save_model(ours, directory / "saved")  # as a model that is not quantised
    again = transformers.AutoModelForCausalLM.from_pretrained(directory / "saved", attn_implementation="eager")
    np.testing.assert_allclose(torch_logits(again.eval(), TOKENS), ours(TOKENS), atol=1e-3, rtol=1e-4)


def float8(weight: torch.Tensor, height: int, width: int) -> Stored:
    """A weight as FP8, with a factor for each block of so many rows and columns."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows // height, height, columns // width, width)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    return {
        "weight": (blocks / scale).reshape(rows, columns).to(torch.float8_e4m3fn),
        "weight_scale_inv": scale[:, 0, :, 0].float(),
    }


@pytest.mark.parametrize("block", [[16, 32], [32, 32], None])
def test_float8_of_deepseek_and_qwen(copy: Path, block: list[int] | None) -> None:
    def parts(weight: torch.Tensor) -> Stored:
        if block is not None:
            return float8(weight, *block)
        whole = float8(weight, *weight.shape)
        return whole | {"weight_scale_inv": whole["weight_scale_inv"].reshape(())}

    quantise(copy, {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}, parts)
    assert_transformers_agrees(copy)


def test_float8_of_autofp8(copy: Path) -> None:
    """One factor for all of a weight, by the name `weight_scale`; transformers does not read it."""
    reference = load_file(copy / WEIGHTS)
    q_proj = "model.layers.1.self_attn.q_proj.weight"

    def parts(weight: torch.Tensor) -> Stored:
        whole = float8(weight, *weight.shape)
        scale = whole["weight_scale_inv"].reshape(1)
        return {"weight": whole["weight"], "weight_scale": scale, "input_scale": torch.ones(1)}

    quantise(copy, {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}, parts)
    stored = load_file(copy / WEIGHTS)
    ours = np.asarray(named_leaves(js.load_model(copy, "float32").params)[q_proj])
    scale = stored[q_proj.replace("weight", "weight_scale")]
    np.testing.assert_array_equal(ours, (stored[q_proj].float() * scale).numpy())
    np.testing.assert_allclose(ours, reference[q_proj].numpy(), rtol=0.07, atol=0.01)


COMPRESSORS = (NaiveQuantizationCompressor, PackedQuantizationCompressor)


def compressed(
    strategy: str, kind: str, num_bits: int = 8, packed: bool = False, **options: Any
) -> tuple[dict[str, Any], Callable[[torch.Tensor], Stored]]:
    """compressed-tensors' configuration of a scheme, and its own compression of a weight."""
    args = QuantizationArgs(num_bits=num_bits, type=kind, strategy=strategy, **options)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if packed else f"{kind}-quantized",
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }
    largest = 448.0 if kind == "float" else 2.0 ** (num_bits - 1) - 1

    def parts(weight: torch.Tensor) -> Stored:
        rows, columns = weight.shape
        height, width = {
            "tensor": (rows, columns),
            "channel": (1, columns),
            "group": (1, args.group_size),
            "block": args.block_structure,
        }[strategy]
        blocks = weight.reshape(rows // height, height, columns // width, width)
        scale = (blocks.abs().amax((1, 3)) / largest).to(torch.bfloat16)
        scale = scale.reshape(1) if strategy == "tensor" else scale
        state = {"weight": weight, "weight_scale": scale}
        if not args.symmetric:
            limit = 2 ** (num_bits - 1)
            state["weight_zero_point"] = torch.randint_like(scale, -limit, limit).to(torch.int8)
        return dict(COMPRESSORS[packed].compress(state, scheme))

    return {"quantization_config": settings}, parts


SCHEMES: list[dict[str, Any]] = [
    {"strategy": "tensor", "kind": "float"},
    {"strategy": "channel", "kind": "float"},
    {"strategy": "block", "kind": "float", "block_structure": [16, 32]},
    {"strategy": "tensor", "kind": "int"},
    {"strategy": "channel", "kind": "int"},
    {"strategy": "channel", "kind": "int", "symmetric": False},
    {"strategy": "group", "kind": "int", "group_size": 32},
    {"strategy": "channel", "kind": "int", "packed": True},
    {"strategy": "group", "kind": "int", "packed": True, "num_bits": 4, "group_size": 32},
    {"strategy": "group", "kind": "int", "packed": True, "num_bits": 4, "group_size": 16, "symmetric": False},
    {"strategy": "channel", "kind": "int", "packed": True, "num_bits": 4, "symmetric": False},
    {"strategy": "group", "kind": "int", "packed": True, "num_bits": 2, "group_size": 32},
]


@pytest.mark.parametrize("options", SCHEMES, ids=lambda options: "-".join(map(str, options.values())))
def test_what_compressed_tensors_decompresses(copy: Path, options: dict[str, Any]) -> None:
    """Its own function gives each weight."""
    settings, parts = compressed(**options)
    quantise(copy, settings, parts)
    stored = load_file(copy / WEIGHTS)
    scheme = QuantizationScheme(**settings["quantization_config"]["config_groups"]["group_0"])
    leaves = named_leaves(js.load_model(copy, "float32").params)
    modules = [name.removesuffix("_scale") for name in stored if name.endswith(".weight_scale")]
    assert len(modules) == 14
    for name in modules:
        state = {end: stored[name + end.removeprefix("weight")] for end in parts(torch.ones(64, 64))}
        expected = COMPRESSORS[options.get("packed", False)].decompress(state, scheme)["weight"]
        assert expected.dtype == torch.bfloat16
        np.testing.assert_array_equal(leaves[name], expected.float().numpy(), err_msg=name)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("kind", ["float", "int"])
def test_transformers_reads_compressed_tensors_alike(copy: Path, kind: str) -> None:
    quantise(copy, *compressed("channel", kind))
    assert_transformers_agrees(copy, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))


BITS4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def four_bits(weight: torch.Tensor, **options: Any) -> Stored:
    packed, state = bitsandbytes.functional.quantize_4bit(weight, **options)
    return {"weight": packed, **{f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}}


@pytest.mark.parametrize("is_nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4_bits(copy: Path, kind: str, dtype: torch.dtype, is_nested: bool) -> None:
    """Its own function gives each weight."""
    expected: dict[tuple[int, ...], list[np.ndarray]] = {}

    def parts(weight: torch.Tensor) -> Stored:
        options = {"blocksize": 64, "quant_type": kind, "compress_statistics": is_nested}
        packed, state = bitsandbytes.functional.quantize_4bit(weight.to(dtype), **options)
        values = bitsandbytes.functional.dequantize_4bit(packed, state)
        expected.setdefault(tuple(values.shape), []).append(values.float().numpy())
        return four_bits(weight.to(dtype), **options)

    quantise(copy, {"quantization_config": BITS4 | {"bnb_4bit_quant_type": kind}}, parts)
    leaves = named_leaves(js.load_model(copy, "float32").params)
    assert sum(map(len, expected.values())) == 14
    for shape, values in expected.items():
        ours = [np.asarray(leaf) for name, leaf in leaves.items() if leaf.shape == shape and "proj" in name]
        for value in values:
            assert any(np.array_equal(value, our) for our in ours)


@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_reads_bitsandbytes_alike(copy: Path, bits: int) -> None:
    def parts(weight: torch.Tensor) -> Stored:
        if bits == 4:
            return four_bits(weight, quant_type="nf4", compress_statistics=True)
        values, scale, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
        return {"weight": values, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}

    settings = BITS4 if bits == 4 else {"quant_method": "bitsandbytes", "load_in_8bit": True}
    settings |= {"bnb_4bit_compute_dtype": "float32", "bnb_4bit_use_double_quant": True}
    quantise(copy, {"quantization_config": settings}, parts)
    if bits == 4:
        assert_transformers_agrees(copy, dequantise=True)
        return
    # bitsandbytes rounds activations to 8 bits too where it computes, so the weights are compared.
    stored, leaves = load_file(copy / WEIGHTS), named_leaves(js.load_model(copy, "float32").params)
    for name in [name.removesuffix(".SCB") for name in stored if name.endswith(".SCB")]:
        expected = bitsandbytes.functional.int8_vectorwise_dequant(stored[f"{name}.weight"], stored[f"{name}.SCB"])
        np.testing.assert_allclose(leaves[f"{name}.weight"], expected.float().numpy(), rtol=1e-6)


def test_a_merged_model_that_still_names_bitsandbytes(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = js.load_model(copy, "float32")(TOKENS)
    quantise(copy, {"quantization_config": BITS4}, lambda weight: {"weight": weight})
    np.testing.assert_array_equal(js.load_model(copy, "float32")(TOKENS), expected)
    assert "names the quantisation bitsandbytes, but its weights are not quantised" in capsys.readouterr().err


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mlx(copy: Path, bits: int) -> None:
    """transformers' function for Metal, which reads MLX's format, gives each weight."""

    def parts(weight: torch.Tensor) -> Stored:
        packed, scales, biases = metal_quantization._affine_quantize_tensor(weight, 32, bits)
        return {"weight": packed.to(torch.uint32), "scales": scales, "biases": biases}

    settings = {"group_size": 32, "bits": bits}
    quantise(copy, {"quantization": settings, "quantization_config": settings}, parts, every=True)
    stored, leaves = load_file(copy / WEIGHTS), named_leaves(js.load_model(copy, "float32").params)
    modules = [name.removesuffix(".scales") for name in stored if name.endswith(".scales")]
    assert len(modules) == 16
    for name in modules:
        tensors = [stored[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
        expected = metal_quantization._affine_dequantize_tensor(*tensors, 32, bits)
        np.testing.assert_allclose(leaves[f"{name}.weight"], expected.numpy(), rtol=1e-6, atol=1e-7)


def words(random: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(random.integers(-(2**31), 2**31, shape).astype(np.int32))


def test_awq(copy: Path) -> None:
    """compressed-tensors' converter of AutoAWQ's files, and then its own function, give each weight."""
    random = np.random.default_rng(0)

    def parts(weight: torch.Tensor) -> Stored:
        rows, columns = weight.shape
        scales = torch.from_numpy(random.uniform(0.001, 0.1, (columns // 32, rows)).astype(np.float16))
        return {
            "qweight": words(random, columns, rows // 8),
            "qzeros": words(random, columns // 32, rows // 8),
            "scales": scales,
        }

    quantise(
        copy, {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}}, parts
    )
    stored, leaves = load_file(copy / WEIGHTS), named_leaves(js.load_model(copy, "float32").params)
    converter = AutoAWQConverter(group_size=32)
    converted = converter.process(dict(stored))
    scheme = converter.update_config(None).config_groups["config_group_0"]
    modules = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    assert len(modules) == 14
    for name in modules:
        ends = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        state = {end: converted[f"{name}.{end}"] for end in ends}
        expected = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
        np.testing.assert_array_equal(leaves[f"{name}.weight"], expected.float().numpy(), err_msg=name)


def gptq_parts(bits: int, size: int = 32, group: int = 8) -> Stored:
    """Random stored tensors of a layer of AutoGPTQ, whose columns belong to groups in any order."""
    random = np.random.default_rng(bits)
    weight = random.integers(0, 2**32, (size * bits // 32, size), dtype=np.uint32).view(np.int32)
    zeros = random.integers(0, 2**bits - 1, (size // group, size)).astype(np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    packed = np.bitwise_or.reduce(zeros.reshape(len(zeros), -1, 32 // bits) << shifts, axis=-1).astype(np.uint32)
    scales = random.uniform(0.01, 0.1, (size // group, size)).astype(np.float16)
    groups = random.permutation(np.arange(size) // group).astype(np.int32)
    parts = {"qweight": weight, "qzeros": packed.view(np.int32), "scales": scales, "g_idx": groups}
    return {name: torch.from_numpy(part) for name, part in parts.items()}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq(tmp_path: Path, bits: int) -> None:
    """AutoGPTQ 0.7.1's torch layer, fed with a unit matrix, gave the weights in `gptq_reference.json`."""
    save_file({f"model.layer.{name}": part for name, part in gptq_parts(bits).items()}, tmp_path / WEIGHTS)
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 8}
    tensors, _ = dequantised(stored_tensors([tmp_path / WEIGHTS]), settings, "model")
    reference = json.loads((Path(__file__).parent / "gptq_reference.json").read_text())[str(bits)]
    expected = np.frombuffer(base64.b64decode(reference), np.float16).reshape(32, 32)
    np.testing.assert_array_equal(tensors["model.layer.weight"].read(...), expected)


@pytest.mark.parametrize("file", ["config.json", "quantize_config.json"])
def test_a_gptq_directory(copy: Path, file: str) -> None:
    """Weights that were rounded to 8 bits come back as they were, but for the rounding."""
    original = named_leaves(js.load_model(copy, "float32").params)

    def parts(weight: torch.Tensor) -> Stored:
        rows = weight.shape[0]
        scale = (weight.abs().amax(1) / 127).numpy()
        q = (np.rint(weight.numpy() / scale[:, None]) + 128).astype(np.uint8)
        return {
            "qweight": torch.from_numpy(np.ascontiguousarray(q).view(np.uint32).view(np.int32).T.copy()),
            "qzeros": torch.full((1, rows // 4), 0x7F7F7F7F, dtype=torch.int32),
            "scales": torch.from_numpy(scale[None]),
            "bias": torch.zeros(rows),
        }

    settings = {"bits": 8, "group_size": -1, "desc_act": False, "sym": True}
    quantise(copy, {"quantization_config": {"quant_method": "gptq"} | settings} if file == "config.json" else {}, parts)
    if file == "quantize_config.json":
        (copy / file).write_text(json.dumps(settings))
    for name, leaf in named_leaves(js.load_model(copy, "float32").params).items():
        np.testing.assert_allclose(leaf, original[name], atol=np.abs(original[name]).max() / 250)


def test_a_zero_point_that_gptq_cannot_express(tmp_path: Path) -> None:
    parts = gptq_parts(4) | {"qzeros": torch.full((4, 4), -1, dtype=torch.int32)}
    save_file({f"model.layer.{name}": part for name, part in parts.items()}, tmp_path / WEIGHTS)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 8}
    tensors, _ = dequantised(stored_tensors([tmp_path / WEIGHTS]), settings, "model")
    with pytest.raises(js.UserError, match=r"zero point of model\.layer\.qweight that GPTQ's first layout cannot"):
        tensors["model.layer.weight"].read(...)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 3}, "by GPTQ with 3 bits in the layout 'gptq', and 2, 4 or 8 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, "4 bits in the layout 'gptq_v2'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "by AWQ with 4 bits in the layout 'gemv'"),
        ({"quant_method": "awq", "bits": 4}, "'awq'.*none of its tensors is quantised"),
        ({"quant_method": "hqq"}, r"in the format hqq \(quantization_config\).*use the model that it was made from"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "NVIDIA's ModelOpt"),
        (["fp8"], "not a table"),
        ({"quant_method": "fp8"}, r"'fp8' \(quantization_config in .*none of its tensors is quantised"),
        ({"bits": 4, "group_size": 32}, "'mlx'.*none of its tensors is quantised"),
        ({"quant_method": "compressed-tensors"}, "its tensors are not stored so"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}},
            "compressed-tensors nvfp4-pack-quantized",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}},
            "key-value cache",
        ),
    ],
)
def test_formats_that_are_not_read(copy: Path, settings: Any, message: str) -> None:
    quantise(copy, {"quantization_config": settings}, lambda weight: {"weight": weight})
    with pytest.raises(js.UserError, match=message) as error:
        js.load_model(copy, "float32")
    assert str(copy) in str(error.value)


@pytest.mark.parametrize(
    ("ends", "guess"),
    [
        (["qweight", "qzeros", "scales", "g_idx"], "GPTQ or AWQ"),
        (["weight_packed", "weight_scale", "weight_shape"], "compressed-tensors"),
        (["weight", "scales", "biases"], "MLX"),
        (["weight", "SCB"], "bitsandbytes"),
    ],
)
def test_quantised_weights_whose_format_nothing_names(copy: Path, ends: list[str], guess: str) -> None:
    quantise(copy, {}, lambda weight: {end: torch.ones(2, 2, dtype=torch.int32) for end in ends})
    with pytest.raises(js.UserError, match=f"quantised weights must be converted.*their names look like {guess}"):
        js.load_model(copy, "float32")


DAMAGES: list[tuple[str, Callable[[torch.Tensor], Stored], Any]] = [
    ("'fp8'.*not stored so", lambda w: {"weight": w, "weight_scale_inv": torch.ones(2, 2)}, [32, 32]),
    ("'fp8'.*not stored so", lambda w: float8(w, 16, 32), [32, 32]),
    ("'fp8'.*not stored so", lambda w: float8(w, 32, 32) | {"weight_scale_inv": torch.ones(3)}, [32, 32]),
    ("blocks of 48 by 32, which do not divide it", lambda w: float8(w, 32, 32), [48, 32]),
    ("'fp8'.*not stored so", lambda w: float8(w, 32, 32), "128"),
    ("'fp8'.*not stored so", lambda w: {"weight_scale_inv": torch.ones(2, 2)}, [32, 32]),
    ("as F8_E4M3, without the factors .* 'fp8', which config", lambda w: {"weight": w.to(torch.float8_e4m3fn)}, None),
]


@pytest.mark.parametrize(("message", "parts", "block"), DAMAGES)
def test_tensors_that_are_not_those_of_the_format(
    copy: Path, message: str, parts: Callable[[torch.Tensor], Stored], block: Any
) -> None:
    quantise(copy, {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}, parts)
    with pytest.raises(js.UserError, match=message):
        js.load_model(copy, "float32")


def test_a_part_of_a_dequantised_weight_is_that_of_the_whole(copy: Path) -> None:
    settings = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    quantise(copy, {"quantization_config": settings}, lambda weight: float8(weight, 16, 32))
    tensors, name = dequantised(stored_tensors([copy / WEIGHTS]), settings, "model")
    weight = tensors["model.layers.1.mlp.down_proj.weight"]
    assert name == "fp8"
    np.testing.assert_array_equal(weight.read((slice(3, 9), slice(40, 50))), weight.read(...)[3:9, 40:50])
    sharded = js.load_model(copy, "bfloat16", mesh_shape=js.MeshShape(1, 2))
    assert_same_tree(sharded.params, js.load_model(copy, "bfloat16").params)
