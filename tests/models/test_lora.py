"""Adapters and saved models, checked against PEFT and transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from helpers import MakeModel, assert_same_tree, torch_logits
from safetensors.numpy import load_file, save_file

import jaxscape as js
from jaxscape.finetuning.options import TARGETS
from jaxscape.finetuning.run import with_adapter
from jaxscape.models.decoder import forward
from jaxscape.models.lora import Adapter, attach, init_factors, load_adapter, save_adapter

TOKENS = np.arange(3, 43).reshape(2, 20)


def peft_adapter(model_dir: Path, directory: Path, **options: Any) -> peft.PeftModel:
    """Make a random adapter with PEFT and save it."""
    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | options))
    model = peft.get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    return model


@pytest.fixture(scope="module")
def pefts(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, peft.PeftModel]:
    directory = tmp_path_factory.mktemp("adapter")
    return directory, peft_adapter(tiny_dir, directory)


def random_adapter(model: js.Model, base: str, dtype: Any = jnp.float32) -> Adapter:
    factors = init_factors(model.params, TARGETS, 3, jax.random.key(0))
    leaves, structure = jax.tree.flatten(factors)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.2 * jax.random.normal(key, leaf.shape, dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return Adapter(base, 3, 5.0, TARGETS, jax.tree.unflatten(structure, noise))


def test_pefts_adapter_is_read_with_the_model_that_it_names(pefts: tuple[Path, peft.PeftModel]) -> None:
    directory, model = pefts
    logits = js.load_model(directory, "float32")(TOKENS)
    np.testing.assert_allclose(logits, torch_logits(model, TOKENS), atol=1e-4, rtol=1e-4)


def test_rank_stabilised_scaling(tiny_dir: Path, tmp_path: Path) -> None:
    model = peft_adapter(tiny_dir, tmp_path, use_rslora=True)
    logits = js.load_model(tmp_path, "float32")(TOKENS)
    np.testing.assert_allclose(logits, torch_logits(model, TOKENS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_peft_reads_our_adapter(tiny: js.Model, tiny_dir: Path, tmp_path: Path, dtype: Any) -> None:
    adapter = random_adapter(tiny, str(tiny_dir), dtype)
    save_adapter(adapter, tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir)
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    ours = js.load_model(tmp_path, "float32")
    np.testing.assert_allclose(ours(TOKENS), torch_logits(model, TOKENS), atol=1e-4, rtol=1e-4)
    assert_same_tree(ours.params, with_adapter(tiny, adapter).params)
    assert_same_tree(load_adapter(tmp_path).factors, adapter.factors)
    assert {tensor.dtype for pair in load_adapter(tmp_path).factors.values() for tensor in pair.values()} == {
        jnp.dtype(dtype)
    }


def test_an_adapter_of_a_pinned_base_says_so_as_peft_does(tiny: js.Model, tmp_path: Path) -> None:
    adapter = random_adapter(tiny, "someone/tiny@v1")
    save_adapter(adapter, tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.base_model_name_or_path, config.revision) == ("someone/tiny", "v1")
    assert load_adapter(tmp_path).base == "someone/tiny@v1"


def test_a_trained_adapter_of_fused_matrices_is_one_for_peft(make_model: MakeModel, tmp_path: Path) -> None:
    directory, _ = make_model("phi3", pad_token_id=0)
    training = js.Training(method="lora", rank=2, batch_size=4, learning_rate=0.01)
    tuned = js.finetune(js.load_model(directory, "float32"), js.load_chats("safe:4"), training)
    assert tuned.adapter is not None
    assert tuned.adapter.targets == ("down_proj", "gate_up_proj", "o_proj", "qkv_proj")
    save_adapter(tuned.adapter, tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(directory)
    before, model = torch_logits(base, TOKENS), peft.PeftModel.from_pretrained(base, tmp_path).eval()
    expected = torch_logits(model, TOKENS)
    assert np.abs(expected - before).max() > 0.01
    np.testing.assert_allclose(tuned.model(TOKENS), expected, atol=1e-4, rtol=1e-4)


def test_an_attached_adapter_computes_what_a_merged_one_does(tiny: js.Model) -> None:
    adapter = random_adapter(tiny, "tiny")
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    attached = attach(tiny.params, adapter.factors, adapter.scale)
    logits, _ = forward(tiny.config, attached, jnp.asarray(TOKENS), positions)
    np.testing.assert_allclose(logits, with_adapter(tiny, adapter)(TOKENS), atol=1e-4, rtol=1e-4)
    assert np.abs(logits - tiny(TOKENS)).max() > 0.1


def test_an_adapter_on_an_adapter(pefts: tuple[Path, peft.PeftModel], tmp_path: Path) -> None:
    first = js.load_model(pefts[0], "float32")
    adapter = random_adapter(first, str(pefts[0]))
    save_adapter(adapter, tmp_path)
    assert_same_tree(js.load_model(tmp_path, "float32").params, with_adapter(first, adapter).params)


def test_bad_adapters(
    pefts: tuple[Path, peft.PeftModel], make_model: MakeModel, tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    config = json.loads((pefts[0] / "adapter_config.json").read_text())
    tensors = load_file(pefts[0] / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"

    def fails(message: str, tensors: dict[str, Any] = tensors, **changes: Any) -> None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(js.UserError, match=message):
            js.load_model(tmp_path, "float32")

    other, _ = make_model(hidden_size=48)
    fails("belongs to another model than .*: it changes model.layers.0", base_model_name_or_path=str(other))
    shallow, _ = make_model(num_hidden_layers=1)
    fails("it changes model.layers.1.* which the model does not have", base_model_name_or_path=str(shallow))
    fails("There is no model 'nothing'", base_model_name_or_path="nothing")
    fails("is its own base", base_model_name_or_path=str(tmp_path))
    fails("not a LoRA configuration", base_model_name_or_path=None)
    fails("not a LoRA configuration", r="four")
    fails("not a LoRA configuration", lora_alpha="much")
    fails("says that the rank is 5", r=5)
    options: list[dict[str, Any]] = [{"use_dora": True}, {"peft_type": "IA3"}, {"modules_to_save": ["lm_head"]}]
    options += [{"bias": "all"}, {"init_lora_weights": "pissa"}, {"alora_invocation_tokens": [1]}]
    for option in options:
        fails(f"not a plain LoRA.*{next(iter(option))}", **option)
    fails("only one of the two factors", {key: value for key, value in tensors.items() if key != name})
    fails("not a factor of a linear layer", tensors | {"base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)})
    fails("has no tensors", {})
    (tmp_path / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(js.UserError, match="cannot be read as safetensors"):
        js.load_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(js.UserError, match="not valid JSON"):
        js.load_model(tmp_path)


def test_targets_that_the_model_does_not_have(tiny: js.Model) -> None:
    for targets in (("q_proj", "c_attn"), ("embed_tokens",), ("norm",)):
        with pytest.raises(js.UserError, match=f"no linear layers named {targets[-1]}"):
            init_factors(tiny.params, targets, 2, jax.random.key(0))
    with pytest.raises(js.UserError, match="rank must be at least 1"):
        init_factors(tiny.params, TARGETS, 0, jax.random.key(0))


OPTIONS: list[dict[str, Any]] = [
    {},
    {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
]


@pytest.mark.parametrize("options", OPTIONS)
def test_transformers_loads_a_saved_model(make_model: MakeModel, tmp_path: Path, options: dict[str, Any]) -> None:
    directory, original = make_model(**options)
    model = js.load_model(directory, "float32")
    js.save_model(model, tmp_path / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype="auto", attn_implementation="eager"
    ).eval()
    assert loaded.dtype == torch.float32
    np.testing.assert_allclose(torch_logits(loaded, TOKENS), torch_logits(original, TOKENS), atol=1e-6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).endswith("user\nHi</s>")
    again = js.load_model(tmp_path / "saved", "float32")
    assert_same_tree(again.params, model.params)
    assert again.config == model.config
    assert again.eos_token_ids == model.eos_token_ids


def test_a_saved_model_keeps_its_dtype(tiny_dir: Path, tmp_path: Path) -> None:
    model = js.load_model(tiny_dir, "bfloat16")
    js.save_model(model, tmp_path)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert_same_tree(js.load_model(tmp_path, "bfloat16").params, model.params)


def test_a_negative_padding_token_is_none(tiny_dir: Path, tmp_path: Path, edit_json: Callable[..., None]) -> None:
    shutil.copytree(tiny_dir, tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", pad_token_id=-1)
    js.save_model(js.load_model(tmp_path / "model"), tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["pad_token_id"] is None
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_directory_with_other_weights_is_not_written_to(
    tiny: js.Model, make_model: MakeModel, tmp_path: Path
) -> None:
    sharded, _ = make_model(save={"max_shard_size": "20KB"})
    with pytest.raises(js.UserError, match="holds other weights"):
        js.save_model(tiny, sharded)
    save_adapter(random_adapter(tiny, "tiny"), tmp_path)
    with pytest.raises(js.UserError, match="holds other weights"):
        js.save_model(tiny, tmp_path)


def test_models_and_adapters_that_cannot_be_written(tiny: js.Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(js.UserError, match="The model cannot be written"):
        js.save_model(tiny, tmp_path / "file")
    with pytest.raises(js.UserError, match="The adapter cannot be written"):
        save_adapter(random_adapter(tiny, "tiny"), tmp_path / "file")
