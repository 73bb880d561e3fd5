"""Model directories as people really have them: compared with what transformers computes from them, or refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import transformers
from helpers import MakeModel, torch_logits
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import jaxscape as js
from jaxscape.models.weights import parameter_name

TOKENS = np.arange(3, 43).reshape(2, 20)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def copy(tiny_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "copy"))


def transformers_logits(directory: Path) -> np.ndarray:
    """What transformers computes from a directory, after checking that it made nothing up."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not info["missing_keys"]
    return torch_logits(model.eval(), TOKENS)


def assert_same_logits(source: Path, expected: np.ndarray) -> None:
    np.testing.assert_allclose(js.load_model(source, "float32")(TOKENS), expected, atol=1e-3, rtol=1e-4)


def change(directory: Path, function: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    """Write the tensors of a directory again, as the function returns them."""
    tensors = function(load_file(directory / WEIGHTS))
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, directory / WEIGHTS)


def fails(source: Path, message: str) -> None:
    with pytest.raises(js.UserError, match=message) as error:
        js.load_model(source, "float32")
    assert "\n" not in str(error.value)


# Which files hold the weights.


def with_left_over_index(make_model: MakeModel, tmp_path: Path) -> Path:
    """A model that was saved in shards, and then saved again, with other weights, in one file."""
    directory = shutil.copytree(make_model(save={"max_shard_size": "20KB"})[0], tmp_path / "model")
    shutil.copy(make_model(seed=5)[0] / WEIGHTS, directory)
    return Path(directory)


def test_one_file_comes_before_a_left_over_index(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = with_left_over_index(make_model, tmp_path)
    shards = sorted(directory.glob("model-*"))
    assert len(shards) > 2
    shards[1].unlink()
    assert_same_logits(directory, transformers_logits(directory))
    line = f"{directory / WEIGHTS} is loaded; {INDEX} beside it is left over: files that it names are missing."
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_weights_that_a_directory_holds_twice_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    directory = with_left_over_index(make_model, tmp_path)
    fails(directory, rf"holds the weights twice, in {WEIGHTS} and in the files that {INDEX} names.*: delete it")
    (directory / WEIGHTS).unlink()
    assert_same_logits(directory, transformers_logits(directory))


def test_an_index_of_one_file_is_no_second_model(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": WEIGHTS}}))
    assert_same_logits(copy, transformers_logits(copy))
    assert "left over" not in capsys.readouterr().err


def test_shards_without_their_index(make_model: MakeModel, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(make_model(save={"max_shard_size": "20KB"})[0], tmp_path / "model"))
    expected = transformers_logits(directory)
    (directory / INDEX).unlink()
    assert_same_logits(directory, expected)
    shards = sorted(directory.glob("model-*"))
    shards[1].unlink()
    fails(directory, rf"has {len(shards) - 1} of {len(shards)} weight files; number 2 is missing: finish its download")


def test_an_index_of_other_files(copy: Path) -> None:
    """As in a repository that was saved again in fewer shards."""
    (copy / WEIGHTS).rename(copy / "model-00001-of-00001.safetensors")
    (copy / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    fails(copy, rf"lacks the weight files model-00001-of-00002\.safetensors .* or delete {INDEX}")


def test_mistrals_original_format_beside_the_model_is_left_out(copy: Path) -> None:
    save_file({"layers.0.attention.wq.weight": np.zeros((2, 2), np.float32)}, copy / "consolidated.safetensors")
    assert_same_logits(copy, transformers_logits(copy))
    (copy / WEIGHTS).unlink()
    fails(copy, "holds only Mistral's original format")


def test_git_lfs_pointers(copy: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    for name in (WEIGHTS, "tokenizer.json", "config.json"):
        content = (copy / name).read_bytes()
        (copy / name).write_text(pointer)
        fails(copy, rf"{re.escape(name)} is not the file itself, but a pointer of Git LFS: run 'git lfs pull'")
        (copy / name).write_bytes(content)
    (copy / "pytorch_model.bin").write_text(pointer)  # is not read
    assert_same_logits(copy, transformers_logits(copy))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["checkpoint-100/", "checkpoint-20/", "runs/"],
            "but models in its subdirectories checkpoint-20, checkpoint-100: pass one",
        ),
        (["zero_to_fp32.py", "global_step5/", "latest"], r"a DeepSpeed checkpoint.*zero_to_fp32\.py \. OUTPUT"),
        (["global_step5/", "latest"], "a DeepSpeed checkpoint"),
        (["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "the optimizer states of DeepSpeed"),
        (["pytorch_model_fsdp_0/", "optimizer_0/"], "an FSDP checkpoint.*accelerate merge-weights"),
        (["__0_0.distcp", ".metadata"], "pieces of an FSDP checkpoint.*accelerate merge-weights"),
        (["_CHECKPOINT_METADATA", "d/"], "an Orbax checkpoint"),
        (["flax_model.msgpack"], "Flax's msgpack weights"),
        (["tf_model.h5"], "TensorFlow's weights"),
        (["consolidated.00.pth", "params.json"], "Meta's original format"),
        (["a.gguf"], r"holds the GGUF file a\.gguf: pass the file itself"),
        (["a.Q4_0.gguf", "b.gguf"], r"holds the GGUF files a\.Q4_0\.gguf, b\.gguf: pass the file itself"),
        (["pytorch_model.bin"], "are pickled.*convert them to safetensors"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "are pickled"),
        (["adapter_model.safetensors"], r"LoRA adapter without its adapter_config\.json"),
        (["adapters.safetensors"], "an adapter of MLX"),
        (["weights.npz"], r"numpy's \.npz"),
        ([], r"has no (\.safetensors file|config\.json)"),
    ],
)
@pytest.mark.parametrize("has_config", [False, True])
def test_directories_of_something_else_say_what_they_hold(
    copy: Path, names: list[str], message: str, has_config: bool
) -> None:
    (copy / WEIGHTS).unlink()
    if not has_config:
        (copy / "config.json").unlink()
    for name in names:
        if name.endswith("/"):
            (copy / name).mkdir()
        else:
            (copy / name).write_bytes(b"x")
    fails(copy, message)


def test_gguf_files_beside_a_config_json(tmp_path: Path) -> None:
    """As in many repositories of GGUF files, which have no tokenizer either."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name in ("model.Q4_K_M.gguf", "model.Q8_0.gguf"):
        (tmp_path / name).write_bytes(b"x")
    fails(tmp_path, r"holds the GGUF files model\.Q4_K_M\.gguf, model\.Q8_0\.gguf: pass the file itself")


def test_a_training_checkpoint_is_a_model(copy: Path) -> None:
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin", "trainer_state.json"):
        (copy / name).write_bytes(b"x")
    (copy / "global_step5").mkdir()
    checkpoint = copy.rename(copy.parent / "checkpoint-500")
    assert_same_logits(checkpoint, transformers_logits(checkpoint))
    fails(checkpoint.parent, "holds no model itself, but models in its subdirectories checkpoint-500: pass one of them")


def test_directories_above_a_model(tiny_dir: Path, tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_dir, run / "model")
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{}")
    fails(run, "holds no model itself, but models in its subdirectories model, adapter: pass one of them")
    shutil.copytree(tiny_dir, cache / "snapshots" / "0123")
    fails(cache, rf"a folder of the hub's cache: pass the hub id, or {re.escape(str(cache))}/snapshots/0123")


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_a_file_of_a_model_is_not_its_directory(tiny_dir: Path, name: str) -> None:
    fails(tiny_dir / name, f"is one file of a model: give its directory, {re.escape(str(tiny_dir))}")


# How tensors are named.

SPELLINGS: dict[str, Callable[[str], str]] = {
    "without model.": lambda name: name.removeprefix("model."),
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "compiled layers": lambda name: re.sub(r"layers\.(\d+)\.", r"layers.\1._orig_mod.", name),
    "DDP": lambda name: f"module.{name}",
    "DDP of torch.compile": lambda name: f"_orig_mod.module.{name}",
    "FSDP": lambda name: re.sub(r"layers\.(\d+)\.", r"layers.\1._fsdp_wrapped_module.", f"_fsdp_wrapped_module.{name}"),
    "PEFT": lambda name: f"base_model.model.{name}",
    "a wrapper's model": lambda name: f"model.{name}",
    "multimodal": lambda name: f"language_model.{name}",
    "multimodal in transformers 4.52": lambda name: name.replace("model.", "model.language_model.", 1),
}
READ_BY_TRANSFORMERS = ("without model.", "a wrapper's model")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_in_every_spelling(copy: Path, spelling: str) -> None:
    expected = transformers_logits(copy)
    change(copy, lambda tensors: {SPELLINGS[spelling](name): value for name, value in tensors.items()})
    if spelling in READ_BY_TRANSFORMERS:
        np.testing.assert_array_equal(transformers_logits(copy), expected)
    assert_same_logits(copy, expected)


NAMES = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.3.self_attn.q_proj.weight")


@given(st.lists(st.sampled_from([*SPELLINGS]), max_size=1), st.sampled_from(NAMES))
def test_a_parameters_name_is_its_own(spellings: list[str], name: str) -> None:
    spelled = SPELLINGS[spellings[0]](name) if spellings else name
    assert parameter_name(spelled) == name
    assert parameter_name(parameter_name(spelled)) == name


def test_a_tensor_under_two_names_is_refused(copy: Path) -> None:
    change(copy, lambda tensors: tensors | {"norm.weight": 2 * tensors["model.norm.weight"]})
    fails(copy, r"holds model\.norm\.weight twice, as (model\.)?norm\.weight and (model\.)?norm\.weight")


def test_unmerged_factors_among_the_weights_are_refused(copy: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    change(copy, lambda tensors: tensors | {name: np.zeros((2, 32), np.float32)})
    fails(copy, "holds the factors of a LoRA adapter beside the weights .*merge them with PEFT")


def gemma3(make_model: MakeModel, tmp_path: Path, **options: Any) -> tuple[Path, Any]:
    """A random multimodal Gemma 3, and the torch model."""
    text = {"vocab_size": 300, "num_hidden_layers": 2, "head_dim": 8, "pad_token_id": 0, "sliding_window": 8, **SIZE}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text | {"initializer_range": 0.3}, vision_config=vision, mm_tokens_per_image=4, **options
    )
    transformers.set_seed(0)
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path / "gemma3")
    for file in make_model()[0].glob("tokenizer*"):
        shutil.copy(file, tmp_path / "gemma3")
    return tmp_path / "gemma3", model


@pytest.mark.parametrize("spelling", ["as saved", "transformers 4.51", "transformers 4.52", "without the head"])
def test_the_text_model_of_gemma_3(make_model: MakeModel, tmp_path: Path, spelling: str) -> None:
    directory, model = gemma3(make_model, tmp_path)
    expected = torch_logits(model, TOKENS)

    def spelled(name: str) -> str:
        name = re.sub(r"^(model\.)?language_model\.(model\.)?", "TEXT.", name)
        old, new = name.replace("TEXT.", "language_model.model."), name.replace("TEXT.", "model.language_model.")
        if spelling == "transformers 4.51":
            return old.removeprefix("model.")
        if spelling == "without the head":
            return new.removeprefix("model.")
        return new if new.startswith(("model.", "lm_head")) else f"model.{new}"

    if spelling != "as saved":
        change(directory, lambda tensors: {spelled(name): value for name, value in tensors.items()})
    names = load_file(directory / WEIGHTS)
    assert any(".vision_tower." in f".{name}" for name in names)
    assert spelling != "without the head" or "language_model.embed_tokens.weight" in names
    assert spelling != "transformers 4.52" or "model.language_model.embed_tokens.weight" in names
    assert_same_logits(directory, expected)


@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.parametrize("prefix", ["as saved", "base_model.model.language_model.model."])
def test_an_adapter_of_gemma_3(make_model: MakeModel, tmp_path: Path, prefix: str) -> None:
    """The factors of the vision tower, which `all-linear` adapts too, do not concern texts."""
    directory, base = gemma3(make_model, tmp_path)
    base.name_or_path = str(directory)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", rank_pattern={"k_proj": 1})
    model = peft.get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    assert any(name.startswith("base_model.model.model.language_model.layers.") for name in load_file(file))
    assert any("vision_tower" in name for name in load_file(file))
    if prefix != "as saved":
        renamed = {
            name.replace("base_model.model.model.language_model.", prefix): tensor
            for name, tensor in load_file(file).items()
        }
        save_file(renamed, file)
    expected = torch_logits(model, TOKENS)
    assert np.abs(js.load_model(directory, "float32")(TOKENS) - expected).max() > 0.1
    assert_same_logits(tmp_path / "adapter", expected)


def test_a_vision_tower_in_a_text_model_is_not_left_out(copy: Path) -> None:
    change(copy, lambda tensors: tensors | {"vision_tower.x.weight": np.zeros((2, 2), np.float32)})
    fails(copy, r"not expected vision_tower\.x\.weight")


# The output head.


def test_a_tied_model_that_stores_only_the_head(make_model: MakeModel, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(make_model(tie_word_embeddings=True)[0], tmp_path / "model"))
    expected = transformers_logits(directory)

    def only_head(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name.replace("model.embed_tokens", "lm_head"): value for name, value in tensors.items()}

    change(directory, only_head)
    assert "model.embed_tokens.weight" not in load_file(directory / WEIGHTS)
    np.testing.assert_array_equal(transformers_logits(directory), expected)
    assert_same_logits(directory, expected)


def test_an_untied_model_without_a_head_is_refused(copy: Path) -> None:
    """transformers makes up a random head, and says so in a table of its log."""
    change(copy, lambda tensors: {name: value for name, value in tensors.items() if name != "lm_head.weight"})
    fails(copy, r"has no lm_head\.weight, and its config\.json does not tie .*: set tie_word_embeddings to true")


def test_a_tied_model_that_stores_two_different_ones(
    copy: Path, edit_json: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(copy / "config.json", tie_word_embeddings=True)
    assert_same_logits(copy, transformers_logits(copy))
    assert "stores two that differ; both are used, as in transformers" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "smollm3", "olmo2", "phi3"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_whether_the_head_is_tied_follows_the_family_where_nothing_says_so(
    make_model: MakeModel, tmp_path: Path, family: str, is_tied: bool
) -> None:
    options = {"head_dim": 8} if family == "gemma2" else {}
    made, _ = make_model(family, pad_token_id=0, tie_word_embeddings=is_tied, **SIZE, **options)
    directory = Path(shutil.copytree(made, tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (directory / "config.json").write_text(json.dumps(config))
    if is_tied and not transformers.AutoConfig.for_model(family).tie_word_embeddings:
        fails(directory, r"has no lm_head\.weight")
    else:
        assert_same_logits(directory, transformers_logits(directory))


# What config.json says.

HARMLESS: dict[str, Any] = {
    "_attn_implementation_autoset": True,
    "_flash_attn_2_enabled": True,
    "attention_dropout": 0.1,
    "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"},
    "gradient_checkpointing": True,
    "id2label": {"0": "yes", "1": "no", "2": "maybe"},
    "max_length": 4096,
    "model_max_length": 2048,
    "model_name": "unsloth/llama-3-8b",
    "neftune_noise_alpha": 5,
    "num_return_sequences": 1,
    "pretraining_tp": 2,
    "task_specific_params": {"chat": {"temperature": 0.5}},
    "temperature": 0.6,
    "unsloth_fixed": True,
    "unsloth_version": "2025.6.1",
    "use_cache": False,
    "use_flash_attn": True,
}
HARMFUL: dict[str, Any] = {
    "attention_multiplier": 0.5,
    "clip_qkv": 8.0,
    "embedding_multiplier": 12.0,
    "final_logit_softcapping": 30.0,
    "logit_scale": 0.25,
    "num_experts": 8,
    "residual_multiplier": 0.22,
    "use_logn_attn": True,
    "use_qk_norm": True,
}


@pytest.mark.parametrize("field", HARMLESS)
def test_fields_that_do_not_change_the_logits_are_ignored(copy: Path, edit_json: Any, field: str) -> None:
    expected = transformers_logits(copy)
    edit_json(copy / "config.json", **{field: HARMLESS[field]})
    np.testing.assert_array_equal(transformers_logits(copy), expected)
    assert_same_logits(copy, expected)


@pytest.mark.parametrize("field", HARMFUL)
def test_all_other_fields_are_refused_by_name(copy: Path, edit_json: Any, field: str) -> None:
    edit_json(copy / "config.json", **{field: HARMFUL[field]})
    fails(copy, rf"options that are not supported: {field}={HARMFUL[field]}")
