"""Every model family against transformers, computed by torch: two random configurations of each, and what they do."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_configs
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import LLAMA3_ROPE, LONGROPE, PROMPTS, TINY, spelled, torch_logits, torch_tokens
from safetensors.flax import load_file

import jaxscape as js
from jaxscape.engine.batching import Workload, tokenize
from jaxscape.engine.engine import Engine
from jaxscape.engine.planner import make_plan
from jaxscape.engine.sampling import Sampling
from jaxscape.forecast.known_models import shape_config
from jaxscape.models.checkpoint import named_leaves
from jaxscape.models.decoder import forward, parameter_shapes
from jaxscape.models.families import FAMILIES
from jaxscape.runtime.sharding import MeshShape

LOCAL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
ALPHA = 0.1
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("llama", {"num_key_value_heads": 4}),
    "llama-3": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "mistral, sliding window": ("mistral", {"sliding_window": 7}),
    "mistral, no window, wide heads": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, sliding window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "num_key_value_heads": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, biased, yarn": ("qwen3", {"head_dim": 8, "attention_bias": True, "rope_parameters": YARN}),
    "gemma2": ("gemma2", LOCAL | {"head_dim": 16, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0}),
    "gemma2, no caps, untied": (
        "gemma2",
        LOCAL
        | {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None}
        | {"tie_word_embeddings": False},
    ),
    "gemma3": ("gemma3_text", LOCAL | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3, scaled rope": (
        "gemma3_text",
        {"head_dim": 8, "num_hidden_layers": 3, "sliding_window": 5, "sliding_window_pattern": 3}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "final_logit_softcapping": 4.0},
    ),
    "phi3": ("phi3", {"sliding_window": 7, "num_key_value_heads": 4, "pad_token_id": 0}),
    "phi3, long rope, partly rotated": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "pad_token_id": 0},
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0], "pad_token_id": 0}),
    "smollm3, sliding window, biased": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 7, "no_rope_layers": [0, 1], "pad_token_id": 0}
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "olmo2": ("olmo2", {}),
    "olmo2, biased, one key-value head": ("olmo2", {"attention_bias": True, "num_key_value_heads": 1}),
}
every_family = pytest.mark.parametrize("name", CONFIGS)
LENGTHS = (100, 9, 47)  # longer than the windows, and than the contexts before RoPE was scaled
COLUMNS = ("float32", "bfloat16", "bfloat16, transformers", "greedy tokens", "round trip")


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, dict[str, str]]]:
    """What the tests find for each configuration; the file that FAMILY_TABLE names gets it."""
    rows: dict[str, dict[str, str]] = {name: {} for name in CONFIGS}
    yield rows
    if path := os.environ.get("FAMILY_TABLE"):
        lines = [f"| configuration | {' | '.join(COLUMNS)} |", "| --- " * (1 + len(COLUMNS)) + "|"]
        for name, row in rows.items():
            lines.append(f"| {name} | {' | '.join(row.get(column, '') for column in COLUMNS)} |")
        Path(path).write_text("\n".join([*lines, ""]))


def make(make_model: Any, name: str, **options: Any) -> tuple[Path, Any]:
    family, own = CONFIGS[name]
    directory, torch_model = make_model(family, **(own | options))
    return directory, torch_model


def torch_load(directory: Path, dtype: Any = "auto") -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


def mixed_batch() -> tuple[np.ndarray, np.ndarray]:
    """Texts of several lengths, padded on the left, and their tokens' positions, -1 for the padding."""
    width = max(LENGTHS)
    tokens = np.random.default_rng(0).integers(3, 300, (len(LENGTHS), width))
    positions = np.stack([np.arange(width) - (width - length) for length in LENGTHS])
    return np.where(positions >= 0, tokens, 0), np.maximum(positions, -1)


def torch_mixed(torch_model: Any, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        mask = torch.tensor((positions >= 0).astype(np.int64))
        where = torch.tensor(np.maximum(positions, 0))
        return torch_model(torch.tensor(tokens), attention_mask=mask, position_ids=where).logits.float().numpy()


def test_every_family_has_two_configurations() -> None:
    used = [family for family, _ in CONFIGS.values()]
    assert all(used.count(family) >= 2 for family in FAMILIES)


@every_family
def test_logits_of_a_mixed_batch_are_those_of_transformers(make_model: Any, name: str, table: Any) -> None:
    directory, torch_model = make(make_model, name)
    model = js.load_model(directory, "float32")
    tokens, positions = mixed_batch()
    config = model.config.for_length(max(LENGTHS))
    logits = np.asarray(forward(config, model.params, jnp.asarray(tokens), jnp.asarray(positions))[0])
    expected, real = torch_mixed(torch_model, tokens, positions), positions >= 0
    difference = np.abs(logits - expected)[real].max() / np.abs(expected[real]).max()
    table[name]["float32"] = f"{difference:.1e}"
    assert difference < 1e-4
    short = tokens[:, -9:]  # within the context before RoPE was scaled
    expected = torch_logits(torch_model, short)
    assert np.abs(model(short) - expected).max() < 1e-4 * np.abs(expected).max()


@every_family
def test_bfloat16_is_as_near_as_that_of_transformers(make_model: Any, name: str, table: Any) -> None:
    directory, torch_model = make(make_model, name, initializer_range=0.1)
    tokens = np.random.default_rng(1).integers(3, 300, (2, 60))
    exact = torch_logits(torch_model, tokens)
    theirs = torch_logits(torch_load(directory, torch.bfloat16), tokens)
    ours = js.load_model(directory, "bfloat16")(tokens)
    errors = [np.abs(logits - exact).max() / np.abs(exact).max() for logits in (ours, theirs)]
    table[name] |= dict(zip(COLUMNS[1:3], (f"{error:.1e}" for error in errors), strict=True))
    assert 0 < errors[0] < 1.5 * errors[1] + 1e-3


@every_family
def test_32_greedy_tokens_at_points_are_those_of_transformers(make_model: Any, name: str, table: Any) -> None:
    """In both forms, one of them on a mesh: the model itself, and one that is moved along a direction."""
    directory, torch_model = make(make_model, name)
    ways = {"factorised": MeshShape(2, 2)}
    if name == next(other for other in CONFIGS if CONFIGS[other][0] == CONFIGS[name][0]):  # once a family
        ways["materialised"] = MeshShape()
    models = [spelled(js.load_model(directory, "float32", mesh_shape=split)) for split in ways.values()]
    direction = js.random_direction(models[0], seed=0)
    rows = tokenize(models[0], PROMPTS, "default", 32)
    sampling, points = Sampling(max_new_tokens=32), [(0.0,), (ALPHA,)]
    workload = Workload(rows, sampling, num_points=len(points), points_per_line=len(points), ndim=1)
    found = []
    for model, form in zip(models, ways, strict=True):
        options = js.EngineOptions(form=form)  # type: ignore[arg-type]
        there = js.random_direction(model, seed=0)
        engine = Engine(model, workload, make_plan(model, workload, options))
        completed = engine.complete([there], points)
        found.append([[list(map(int, c.text.split())) for c in point] for point in completed])
    expected = [torch_tokens(torch_model, models[0], PROMPTS, new=32)]
    steps = named_leaves(direction)
    with torch.no_grad():
        for tensor, parameter in torch_model.named_parameters():
            parameter += ALPHA * torch.tensor(np.asarray(steps[tensor]))
    expected.append(torch_tokens(torch_model, models[0], PROMPTS, new=32))
    assert expected[0] != expected[1]
    assert max(map(len, expected[0])) == 32
    both = [
        (ours, theirs)
        for form in found
        for pair in zip(form, expected, strict=True)
        for ours, theirs in zip(*pair, strict=True)
    ]
    same = sum(a == b for ours, theirs in both for a, b in zip(ours, theirs, strict=False))
    table[name]["greedy tokens"] = f"{same} of {sum(len(theirs) for _, theirs in both)}"
    assert found == [expected] * len(ways)


@every_family
def test_what_is_loaded_is_written_back_to_the_bit(make_model: Any, name: str, tmp_path: Path, table: Any) -> None:
    directory, _ = make(make_model, name, dtype="bfloat16")
    model = js.load_model(directory, "bfloat16")
    model.save_pretrained(tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (directory, tmp_path))
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    tokens = np.random.default_rng(2).integers(3, 300, (2, 40))
    first, again = torch_load(directory), torch_load(tmp_path)
    assert type(again) is type(first)
    assert again.dtype == torch.bfloat16
    np.testing.assert_array_equal(torch_logits(again, tokens), torch_logits(first, tokens))
    table[name]["round trip"] = f"{sum(x.size for x in before.values())} numbers, to the bit"


@every_family
def test_norms_are_not_perturbed_and_all_else_keeps_its_norm(make_model: Any, name: str) -> None:
    directory, _ = make(make_model, name)
    model = js.load_model(directory, "float32")
    direction = named_leaves(js.random_direction(model, seed=0))
    for tensor, weight in named_leaves(model.params).items():
        size = float(jnp.linalg.norm(direction[tensor]))
        if "norm" in tensor:
            assert size == 0, tensor
        else:
            np.testing.assert_allclose(size, float(jnp.linalg.norm(weight)), rtol=1e-4, err_msg=tensor)


def test_of_a_multimodal_gemma3_the_text_model_is_taken(tiny_dir: Path, tmp_path: Path) -> None:
    text = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=TINY | text | LOCAL | {"query_pre_attn_scalar": 8},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        **{"mm_tokens_per_image": 4, "image_token_index": 299, "boi_token_index": 298, "eoi_token_index": 297},
    )
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_dir / file, tmp_path)
    model = js.load_model(tmp_path, "float32")
    tokens = np.random.default_rng(3).integers(3, 290, (2, 20))
    expected = torch_logits(whole, tokens)
    assert np.abs(model(tokens) - expected).max() < 1e-4 * np.abs(expected).max()
    model.save_pretrained(tmp_path / "text")
    again = torch_load(tmp_path / "text")
    assert type(again) is transformers.Gemma3ForCausalLM
    np.testing.assert_allclose(torch_logits(again, tokens), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", hub_configs.CONFIGS)
def test_configurations_of_the_hub_are_understood(name: str, tmp_path: Path) -> None:
    declared, billions = hub_configs.CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(declared))
    config = shape_config(str(tmp_path))
    size = sum(leaf.size for leaf in named_leaves(parameter_shapes(config)).values())
    assert size / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_options_that_nobody_computes_are_named(family: str, tmp_path: Path) -> None:
    own = {"attention_sinks": 4}
    if "use_bidirectional_attention" in transformers.AutoConfig.for_model(family).to_dict():
        own["use_bidirectional_attention"] = True
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family} | own))
    with pytest.raises(js.UserError, match="not supported: " + ", ".join(f"{k}={v}" for k, v in own.items())):
        shape_config(str(tmp_path))
    kinds = {"layer_types": ["chunked_attention"]}
    if "layer_types" in transformers.AutoConfig.for_model(family).to_dict():
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "num_hidden_layers": 1} | kinds))
        with pytest.raises(js.UserError, match="layer_types="):
            shape_config(str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_that_is_not_causal_is_refused(family: str, tmp_path: Path) -> None:
    """transformers lets every token attend to all others where `is_causal` is false, as in models that embed texts."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "is_causal": True}))
    assert shape_config(str(tmp_path)).num_layers > 1
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "is_causal": False}))
    with pytest.raises(js.UserError, match="not supported: is_causal=False"):
        shape_config(str(tmp_path))


def test_a_head_of_its_own_is_used_also_where_the_configuration_ties_it(make_model: Any, edit_json: Any) -> None:
    directory, _ = make(make_model, "llama-2")
    edit_json(directory / "config.json", tie_word_embeddings=True)
    model, tokens = js.load_model(directory, "float32"), np.arange(3, 40)[None]
    expected = torch_logits(torch_load(directory), tokens)
    assert np.abs(model(tokens) - expected).max() < 1e-4 * np.abs(expected).max()
    model.save_pretrained(directory)
    np.testing.assert_array_equal(torch_logits(torch_load(directory), tokens), expected)


def test_a_tokenizer_without_a_chat_template_is_written_without_one(make_model: Any, tmp_path: Path) -> None:
    directory, _ = make(make_model, "llama-2")
    (directory / "chat_template.jinja").unlink()
    model = js.load_model(directory)
    assert model.tokenizer.chat_template is not None
    model.save_pretrained(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template is None


@pytest.mark.parametrize(
    ("family", "options", "named"),
    [
        ("gemma3_text", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping=5.0"),
        ("smollm3", {"no_rope_layers": [1, 0], "layer_types": ["full_attention"] * 3}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": [], "layer_types": ["full_attention"] * 3}, "no_rope_layers"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "sliding_window=None"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ("mistral", {"max_window_layers": 2}, "max_window_layers=2"),
    ],
)
def test_options_without_a_meaning_are_refused(family: str, options: Any, named: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "num_hidden_layers": 3} | options))
    with pytest.raises(js.UserError, match=named):
        shape_config(str(tmp_path))
