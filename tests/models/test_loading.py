"""Loading from Hugging Face directories and the hub's cache, and the errors for what cannot be loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import TINY, assert_same_tree, torch_logits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import jaxscape as js
from jaxscape.models.checkpoint import named_leaves


@pytest.fixture
def copy(tiny_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "copy"))


def test_parameters_have_the_names_and_values_of_the_checkpoint(make_model: Any) -> None:
    directory, torch_model = make_model(seed=2)
    model = js.load_model(directory, "float32")
    state = torch_model.state_dict()
    assert named_leaves(model.params).keys() == state.keys()
    for name, leaf in named_leaves(model.params).items():
        np.testing.assert_array_equal(leaf, state[name].numpy())
    assert model.eos_token_ids == (2,)


def test_a_sharded_checkpoint_is_the_same_model(make_model: Any, tiny: js.Model) -> None:
    directory, _ = make_model(save={"max_shard_size": "20KB"})
    assert len(list(directory.glob("*.safetensors"))) > 2
    assert_same_tree(js.load_model(directory, "float32").params, tiny.params)


@pytest.mark.cpu
def test_other_safetensors_in_the_directory_are_not_the_model(copy: Path, tiny: js.Model) -> None:
    js.save_direction(js.random_direction(tiny, 0), copy / "my_direction.safetensors", tiny)
    assert_same_tree(js.load_model(copy).params, tiny.params)
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    with pytest.raises(js.UserError, match=r"both hold lm_head.weight"):
        js.load_model(copy)


def test_bfloat16_files_are_read(make_model: Any) -> None:
    directory, torch_model = make_model()
    torch_model.to(torch.bfloat16).save_pretrained(directory)
    model = js.load_model(directory, "bfloat16")
    expected = torch_model.state_dict()["model.layers.0.mlp.up_proj.weight"].float().numpy()
    np.testing.assert_array_equal(model.params["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"], expected)


def test_a_tied_head_and_old_rope_buffers_in_a_file_are_not_parameters(make_model: Any) -> None:
    directory, torch_model = make_model(tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    model = js.load_model(directory, "float32")
    assert "lm_head" not in model.params
    tokens = np.arange(3, 12)[None]
    np.testing.assert_allclose(model(tokens), torch_logits(torch_model, tokens), atol=1e-3)


def test_every_end_token_that_the_files_name_is_one(copy: Path, edit_json: Any) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    edit_json(copy / "config.json", eos_token_id=[5])
    assert js.load_model(copy).eos_token_ids == (2, 5, 7)


def test_end_of_turn_tokens_of_the_vocabulary_end_a_text(make_model: Any) -> None:
    copy, _ = make_model(vocab_size=301)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    added = {"id": 300, "content": "<|eot_id|>", "special": True, "normalized": False}
    tokenizer["added_tokens"].append(added | {"single_word": False, "lstrip": False, "rstrip": False})
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert js.load_model(copy).eos_token_ids == (2, 300)


@pytest.mark.parametrize("value", ["2", {}, [[1]], [2, "x"], 2**40, 2.5, True, -1])
def test_end_tokens_that_are_none(copy: Path, value: Any) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(js.UserError, match="names the end token"):
        js.load_model(copy)


@pytest.mark.cpu
def test_default_dtype_on_a_cpu_is_float32(tiny_dir: Path) -> None:
    assert js.load_model(str(tiny_dir)).params["model"]["norm"]["weight"].dtype == jnp.float32


def test_all_tensors_that_do_not_fit_are_listed_at_once(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 32), np.float32)
    tensors["model.extra"] = np.zeros(1, np.float32)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(js.UserError) as error:
        js.load_model(copy)
    assert "missing model.norm.weight" in str(error.value)
    assert "not expected model.extra" in str(error.value)
    assert "model.layers.0.mlp.up_proj.weight has shape (3, 32) instead of (64, 32)" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "architecture is 'gpt2'; supported are llama, mistral"),
        ({"model_type": None}, "architecture is None"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"hidden_size": "wide"}, "not a valid model configuration"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"vocab_size": 0}, "values that no model can have: vocab_size=0"),
        ({"rms_norm_eps": -1.0}, "values that no model can have: rms_norm_eps=-1.0"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": -5.0}},
            "RoPE has the base -5.0",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}},
            "not a valid model configuration",
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "sway": 3}}, "supported: sway"),
        ({"partial_rotary_factor": 0.5}, "rotates only a part of each head"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"num_local_experts": 8, "use_qk_norm": True}, "num_local_experts=8, use_qk_norm=True"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(copy: Path, edit_json: Any, changes: Any, message: str) -> None:
    edit_json(copy / "config.json", **changes)
    with pytest.raises(js.UserError, match=message):
        js.load_model(copy)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused_unread(copy: Path, name: str) -> None:
    (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(b"a pickle")
    for source in (copy, copy / name):
        with pytest.raises(js.UserError, match=r"pickle can run any code; convert them to safetensors"):
            js.load_model(source)


def test_missing_and_broken_files_are_named(copy: Path) -> None:
    def check(message: str) -> None:
        with pytest.raises(js.UserError, match=message):
            js.load_model(copy)

    (copy / "model.safetensors").rename(copy / "part-2.safetensors")
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-1.safetensors"}}')
    check(r"lacks the weight files part-1.safetensors")
    (copy / "model.safetensors.index.json").write_text('{"weights": 1}')
    check("no table of tensors")
    (copy / "model.safetensors.index.json").unlink()
    (copy / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "x.Y"}}')
    check("code of its own .*, which jaxscape never runs")
    (copy / "tokenizer_config.json").unlink()
    (copy / "tokenizer.json").unlink()
    check("tokenizer .* cannot be loaded")
    (copy / "config.json").write_text("{")
    check("not valid JSON")
    (copy / "config.json").write_text("[]")
    check("not a JSON object")
    (copy / "config.json").unlink()
    check("has no config.json")


def test_a_directory_without_weights_is_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(js.UserError, match=r"has no .safetensors file"):
        js.load_model(copy)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 0.999))
def test_a_truncated_safetensors_file_is_a_user_error(tiny_dir: Path, copy: Path, cut: float) -> None:
    whole = (tiny_dir / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: int(len(whole) * cut)])
    with pytest.raises(js.UserError, match="truncated or damaged"):
        js.load_model(copy)


@pytest.mark.parametrize("source", ["no-such-model", "no-such-file.gguf", "dir/no-such-file.gguf"])
def test_unknown_names_say_what_can_be_given(source: str) -> None:
    with pytest.raises(js.UserError, match=r"give a name \(smollm2-135m-safe, smollm2-135m\)"):
        js.load_model(source)


def test_unknown_dtypes_say_what_can_be_given() -> None:
    with pytest.raises(js.UserError, match="float32, bfloat16, float16"):
        js.load_model("smollm2-135m", "int8")


def test_the_hub_is_used_through_its_cache(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot in the hub's cache is used without a network; a repository that is not there is an error."""
    revision = "0" * 40
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_dir, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = js.load_model("someone/tiny")
    assert model.config.hidden_size == TINY["hidden_size"]
    with pytest.raises(js.UserError, match="someone/other is not in the cache and the hub cannot be reached"):
        js.load_model("someone/other")
