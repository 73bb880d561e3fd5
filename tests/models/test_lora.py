"""Adapters and saved models, checked against PEFT and transformers."""

import copy
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
from safetensors.numpy import load_file, save, save_file

import jaxscape as js
from jaxscape.engine.batching import tokenize
from jaxscape.finetuning.options import TARGETS
from jaxscape.finetuning.run import with_adapter
from jaxscape.models.decoder import forward
from jaxscape.models.lora import Adapter, attach, init_factors, load_adapter, save_adapter
from jaxscape.prompts.chat_format import chat_text
from jaxscape.runtime.files import temporary_path

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
    fails("not a LoRA configuration", base_model_name_or_path=5)
    fails("names no base model", base_model_name_or_path=None)
    fails("not a LoRA configuration", r="four")
    fails("not a LoRA configuration", lora_alpha="much")
    fails("says that the rank is 5", r=5)
    options: list[dict[str, Any]] = [{"use_dora": True}, {"peft_type": "IA3"}, {"modules_to_save": ["lm_head"]}]
    options += [{"init_lora_weights": "pissa"}, {"alora_invocation_tokens": [1]}, {"layer_replication": [[0, 2]]}]
    for option in options:
        fails(f"not a plain LoRA.*{next(iter(option))}", **option)
    fails("modules_to_save must be a list, not the single text 'lm_head'", modules_to_save="lm_head")
    fails("modules_to_save must be a list, not a int", modules_to_save=5)
    fails("not a LoRA configuration", rank_pattern={"(": 2})
    fails("not a LoRA configuration", alpha_pattern={"q_proj": "much"})
    fails("only one of the two factors", {key: value for key, value in tensors.items() if key != name})
    whole = {"base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)}
    fails("trained with a vocabulary of 2 tokens, and its base .* has 300; save the adapter again", tensors | whole)
    whole["base_model.model.model.norm.weight"] = np.zeros(2, np.float32)
    fails(r"belongs to another model.*it changes lm_head.weight with shape \(2, 2\)", tensors | whole)
    delta = {"base_model.model.lm_head.token_adapter.trainable_tokens_delta": np.zeros((2, 2), np.float32)}
    fails("not a factor of a linear layer", tensors | delta)
    fails("twice, under two names", tensors | {name.replace(".weight", ".default.weight"): tensors[name]})
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


def test_a_model_is_written_where_a_process_ended_while_it_wrote_it(tiny: js.Model, tmp_path: Path) -> None:
    temporary_path(tmp_path / "model.safetensors").write_bytes(b"half")
    js.save_model(tiny, tmp_path)
    assert [path.name for path in tmp_path.glob("*safetensors*")] == ["model.safetensors"]


def test_models_and_adapters_that_cannot_be_written(tiny: js.Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(js.UserError, match="The model cannot be written"):
        js.save_model(tiny, tmp_path / "file")
    with pytest.raises(js.UserError, match="The adapter cannot be written"):
        save_adapter(random_adapter(tiny, "tiny"), tmp_path / "file")


# Adapters as PEFT and the programs that use it write them, compared with what PEFT computes.

OPTIONS_OF_PEFT: dict[str, dict[str, Any]] = {
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 3},
        "alpha_pattern": {"down_proj": 20, "^model.layers.0.self_attn.q_proj": 1},
    },
    "patterns and rank-stabilised": {"rank_pattern": {"q_proj": 2}, "use_rslora": True},
    "DoRA": {"use_dora": True},
    "DoRA with patterns": {"use_dora": True, "rank_pattern": {"q_proj": 2}, "use_rslora": True},
    "biases of a layer": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "all but one": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "a regular expression": {"target_modules": r".*\.1\.mlp\.(up|gate)_proj"},
    "embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "only the embedding": {"modules_to_save": ["embed_tokens"]},
    "only the head": {"modules_to_save": ["lm_head"]},
    "norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "factors of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "factors of the head": {"target_modules": ["q_proj", "lm_head"]},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


def trained(base: Any, directory: Path, save: dict[str, Any] | None = None, **options: Any) -> peft.PeftModel:
    """Save a PEFT model whose trained tensors are all random, and read it again as a user of PEFT does."""
    torch.manual_seed(1)
    original = copy.deepcopy(base)
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | options))
    model = peft.get_peft_model(base, config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory, **(save or {}))
    return peft.PeftModel.from_pretrained(original, directory).eval()


def base_of(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")


@pytest.mark.filterwarnings("ignore")  # PEFT warns of tied embeddings, and of fan_in_fan_out
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", OPTIONS_OF_PEFT)
def test_options_of_peft(make_model: MakeModel, tmp_path: Path, name: str, is_tied: bool) -> None:
    family = "qwen2" if "bias" in OPTIONS_OF_PEFT[name] else "llama"
    directory, original = make_model(family, tie_word_embeddings=is_tied)
    model = trained(base_of(directory), tmp_path, **OPTIONS_OF_PEFT[name])
    expected = torch_logits(model, TOKENS)
    assert np.abs(expected - torch_logits(original, TOKENS)).max() > 0.1
    ours = js.load_model(tmp_path, "float32")
    np.testing.assert_allclose(ours(TOKENS), expected, atol=1e-3, rtol=1e-4)
    js.save_model(ours, tmp_path / "merged")
    np.testing.assert_allclose(torch_logits(base_of(tmp_path / "merged"), TOKENS), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["DoRA", "embedding and head", "factors of the embedding"])
def test_shards_of_an_adapted_model_are_those_of_the_whole(tiny_dir: Path, tmp_path: Path, name: str) -> None:
    trained(base_of(tiny_dir), tmp_path, **OPTIONS_OF_PEFT[name])
    whole = js.load_model(tmp_path, "bfloat16")
    assert_same_tree(js.load_model(tmp_path, "bfloat16", mesh_shape=js.MeshShape(1, 2)).params, whole.params)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_an_adapter_with_a_larger_vocabulary(
    make_model: MakeModel, tmp_path: Path, is_tied: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = make_model(tie_word_embeddings=is_tied)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    base = base_of(directory)
    base.resize_token_embeddings(len(tokenizer))
    model = trained(base, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours = js.load_model(tmp_path, "float32")
    assert ours.config.vocab_size == ours.transformers_config.vocab_size == 302
    assert ours.eos_token_ids == (2, 301)
    assert ours.config.tie_word_embeddings == is_tied
    assert tokenize(ours, ["Hi"], "default", 1)[0][0] == 300
    tokens = np.array([[300, 7, 301, 9]])
    np.testing.assert_allclose(ours(tokens), torch_logits(model, tokens), atol=1e-3, rtol=1e-4)
    line = f"The adapter {tmp_path} brings its own tokenizer, chat template, end tokens (<|im_end|>)"
    assert line in capsys.readouterr().err
    (tmp_path / "adapter_model.safetensors").write_bytes(without(tmp_path, "embed_tokens", "lm_head"))
    with pytest.raises(js.UserError, match="end token 301, which is not one of its 300 tokens"):
        js.load_model(tmp_path, "float32")


@pytest.mark.filterwarnings("ignore")
def test_a_larger_vocabulary_whose_ends_are_trained_too(tiny_dir: Path, tmp_path: Path) -> None:
    """PEFT then writes the embedding and the head three times: as trained, as saved embeddings and as in the base."""
    torch.manual_seed(0)
    base = base_of(tiny_dir)
    base.resize_token_embeddings(305)
    model = trained(base, tmp_path, modules_to_save=["embed_tokens", "lm_head"])
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert sum("lm_head" in name for name in names) > 1
    ours = js.load_model(tmp_path, "float32")
    assert ours.config.vocab_size == 305
    tokens = np.array([[304, 7, 301, 9]])
    np.testing.assert_allclose(ours(tokens), torch_logits(model, tokens), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("revision", ["", "v1.0"])
def test_the_revision_of_a_base_in_a_directory_means_nothing(
    pefts: tuple[Path, peft.PeftModel], tmp_path: Path, revision: str, edit_json: Callable[..., None]
) -> None:
    directory, model = pefts
    copied = Path(shutil.copytree(directory, tmp_path / "adapter"))
    edit_json(copied / "adapter_config.json", revision=revision)
    np.testing.assert_allclose(
        js.load_model(copied, "float32")(TOKENS), torch_logits(model, TOKENS), atol=1e-3, rtol=1e-4
    )


def test_an_empty_name_is_not_the_current_directory(
    pefts: tuple[Path, peft.PeftModel],
    tiny_dir: Path,
    tmp_path: Path,
    edit_json: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tiny_dir)
    copied = Path(shutil.copytree(pefts[0], tmp_path / "adapter"))
    edit_json(copied / "adapter_config.json", base_model_name_or_path="")
    with pytest.raises(js.UserError, match="names no base model"):
        js.load_model(copied)
    with pytest.raises(js.UserError, match="The name of the model is empty"):
        js.load_model("")


def without(directory: Path, *words: str) -> bytes:
    """The adapter's file without the tensors that have one of the words in their names."""
    tensors = load_file(directory / "adapter_model.safetensors")
    return save({name: value for name, value in tensors.items() if not any(word in name for word in words)})


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_torch_compile_has_wrapped(tiny_dir: Path, tmp_path: Path) -> None:
    """Checkpoints of a compiled model have its prefix, with which PEFT finds no factors, and leaves them at zero."""
    model = trained(base_of(tiny_dir), tmp_path, rank_pattern={"q_proj": 2})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    renamed = {name.replace("base_model.model.", "base_model.model._orig_mod."): tensors[name] for name in tensors}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    np.testing.assert_allclose(
        js.load_model(tmp_path, "float32")(TOKENS), torch_logits(model, TOKENS), atol=1e-3, rtol=1e-4
    )


@pytest.mark.parametrize("files", ["tokenizer", "only a template", "only settings", "nothing"])
def test_an_adapters_own_tokenizer_template_and_end_token(
    make_model: MakeModel, tmp_path: Path, files: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = make_model()
    peft_adapter(directory, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    base_template = tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages %}ADAPTER {{ m['content'] }}{% endfor %}"
    expected = "ADAPTER Hi"
    if files == "tokenizer":
        tokenizer.eos_token = "<s>"
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5]}')
        ids, line = (1, 2, 5), "brings its own tokenizer, chat template, end tokens"
    elif files == "only a template":
        (tmp_path / "chat_template.jinja").write_text(tokenizer.chat_template)
        ids, line = (2,), "brings its own chat template,"
    elif files == "only settings":
        settings = {"chat_template": tokenizer.chat_template, "eos_token": {"content": "<s>"}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        ids, line = (1, 2), "brings its own chat template, end tokens (<s>)"
    else:
        tokenizer.chat_template = base_template
        expected, ids, line = chat_text(tokenizer, "Hi"), (2,), ""
    model = js.load_model(tmp_path, "float32")
    assert chat_text(model.tokenizer, "Hi") == expected
    assert model.eos_token_ids == ids
    lines = [text for text in capsys.readouterr().err.splitlines() if text.startswith("The adapter")]
    assert len(lines) == bool(line)
    assert line in "".join(lines)
    assert model.sources is not None
    source = directory if files == "nothing" else tmp_path
    assert model.sources.chat_template.startswith(str(source))
    assert model.sources.tokenizer == str(tmp_path if files == "tokenizer" else directory)


def test_an_adapter_whose_tokenizer_has_no_template_keeps_the_bases(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = make_model()
    peft_adapter(directory, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(tmp_path)
    assert js.load_model(tmp_path, "float32").tokenizer.chat_template == template
    assert f"The adapter {tmp_path} brings its own tokenizer (but no chat template)" in capsys.readouterr().err


def test_an_adapter_whose_base_has_moved(make_model: MakeModel, tmp_path: Path, edit_json: Callable[..., None]) -> None:
    directory, _ = make_model()
    adapter = tmp_path / "adapter"
    expected = torch_logits(peft_adapter(directory, adapter), TOKENS)
    moved = shutil.copytree(directory, tmp_path / "moved")
    for base in ("/data/gone/model", "someone/gone", None):
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=base)
        message = "names no base model|cannot be loaded without its base model .*gone.*name it with --base"
        with pytest.raises(js.UserError, match=message) as error:
            js.load_model(adapter, "float32")
        assert str(adapter) in str(error.value)
        model = js.load_model(adapter, "float32", base=moved)
        np.testing.assert_allclose(model(TOKENS), expected, atol=1e-4, rtol=1e-4)
    for source in (directory, "smollm2-135m"):
        with pytest.raises(js.UserError, match="is not a LoRA adapter, and only an adapter has a base"):
            js.load_model(source, "float32", base=moved)


def test_the_base_of_stacked_adapters_is_that_of_the_first(
    make_model: MakeModel, tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    directory, _ = make_model()
    first, second = tmp_path / "first", tmp_path / "second"
    peft_adapter(directory, first)
    tuned = js.load_model(first, "float32")
    save_adapter(random_adapter(tuned, str(first)), second)
    expected = js.load_model(second, "float32")(TOKENS)
    edit_json(first / "adapter_config.json", base_model_name_or_path="/gone")
    with pytest.raises(js.UserError, match=f"The adapter {second} .* {first}, which cannot be opened .The adapter "):
        js.load_model(second, "float32")
    np.testing.assert_array_equal(js.load_model(second, "float32", base=directory)(TOKENS), expected)


def test_an_adapter_that_cannot_be_read_as_one(tiny_dir: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_dir, tmp_path)
    shutil.copy(tiny_dir / "model.safetensors", tmp_path)
    with pytest.raises(js.UserError, match="holds two models"):
        js.load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(
        js.UserError, match=r"has no adapter_model.safetensors: .*pickled \(adapter_model.bin\).*save_pretrained"
    ):
        js.load_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}')
    (tmp_path / "adapters.safetensors").write_bytes(b"x")
    with pytest.raises(js.UserError, match="an adapter of MLX"):
        js.load_model(tmp_path)
