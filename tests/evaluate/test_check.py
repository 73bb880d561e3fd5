"""`jaxscape check`: what it finds, and whether it notices a model that computes something else."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.cli.options import ModelOptions
from jaxscape.evaluate.check import Comparison, _largest_difference, answer, compare, find_facts

PROMPT, NEW = "How do I bake bread?", 12


def check(model: js.Model) -> Comparison:
    return compare(model, PROMPT, answer(model, PROMPT, NEW), NEW)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_models_agree_with_transformers(make_model: Any, family: str) -> None:
    options = {"gemma2": {"head_dim": 8, "sliding_window": 16}, "phi3": {"pad_token_id": 0}}.get(family, {})
    found = check(js.load_model(make_model(family, max_position_embeddings=1024, **options)[0], "float32"))
    assert found.agrees
    assert found.difference < 2e-5
    assert found.num_logits > 500
    assert (found.num_same, found.margin) == (found.num_answer, None)


def test_in_sixteen_bits_rounding_is_allowed_and_no_more(make_model: Any) -> None:
    model = js.load_model(make_model(seed=3, initializer_range=0.1)[0], "bfloat16")
    found = check(model)
    assert found.agrees
    assert 1e-3 < found.difference < found.limit < 0.1
    smaller = jax.tree.map(lambda leaf: leaf * (1 if leaf.ndim == 1 else 0.9), model.params)
    assert not check(dataclasses.replace(model, params=smaller)).agrees


@pytest.mark.parametrize("changed", ["rms_norm_eps", "params", "rope"])
def test_a_model_that_computes_something_else_is_noticed(tiny: js.Model, changed: str) -> None:
    """A wrong constant of the configuration, a wrong layout of a matrix, and RoPE that is scaled by a tenth."""
    if changed == "rms_norm_eps":
        other = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, rms_norm_eps=1e-3))
    elif changed == "rope":
        (kind,) = tiny.config.layers
        rope = dataclasses.replace(kind.rope, frequencies=tuple(1.1 * f for f in kind.rope.frequencies))
        layers = (dataclasses.replace(kind, rope=rope),)
        other = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, layers=layers))
    else:
        flat = jax.tree.map(
            lambda leaf: leaf.T if leaf.ndim == 2 and leaf.shape[0] == leaf.shape[1] else leaf, tiny.params
        )
        other = dataclasses.replace(tiny, params=flat)
    found = check(other)
    assert not found.agrees
    assert found.difference > 10 * found.limit


def test_logits_that_are_not_finite_are_a_difference() -> None:
    """In the last positions of the second text alone."""
    zeros = [np.zeros((3, 5), np.float32), np.zeros((4, 5), np.float32)]
    broken = [zeros[0], np.where(np.arange(20).reshape(4, 5) == 19, np.nan, np.float32(0)).astype(np.float32)]
    difference = _largest_difference(broken, zeros)
    assert not Comparison(difference, 1.0, 7, 1, 1, None).agrees


def test_an_answer_that_parts_where_the_model_is_certain_is_a_difference(tiny: js.Model) -> None:
    text = answer(tiny, PROMPT, NEW)
    same = compare(tiny, PROMPT, text, NEW)
    other = compare(tiny, PROMPT, text[: len(text) // 2] + "!?" + text[len(text) // 2 :], NEW)
    assert same.agrees
    assert not other.agrees
    assert 0 < other.num_same < other.num_answer
    assert other.margin is not None
    assert other.margin > 2 * other.limit


def test_what_is_found_in_the_files(tiny: js.Model, tiny_dir: Path) -> None:
    facts = find_facts(tiny, PROMPT)
    assert (facts.family, facts.num_layers, facts.context, facts.is_tied) == ("llama", 2, 256, False)
    assert facts.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(tiny.params))
    assert (facts.stored, facts.dtype, facts.quantisation) == ({"F32": 21}, "float32", None)
    assert facts.template_source == str(tiny_dir / "chat_template.jinja")
    assert facts.tokenizer_source == str(tiny_dir)
    assert facts.end_tokens == {2: "</s>"}
    assert facts.prompt.endswith(f"<s>user\n{PROMPT}</s><s>assistant\n")
    assert (facts.bos, facts.num_bos) == ("<s>", 3)


def test_files_that_transformers_reads_in_part_are_not_compared(make_model: Any, tmp_path: Path) -> None:
    """Names that torch.compile writes: transformers would fill the model with random numbers."""
    directory, _ = make_model(max_position_embeddings=1024)
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    save_file({f"_orig_mod.{name}": value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    model = js.load_model(tmp_path, "float32")
    with pytest.raises(js.UserError, match="transformers does not find 21 of its tensors, such as lm_head"):
        check(model)


def test_an_adapter_is_compared_with_pefts(tiny_dir: Path, tmp_path: Path, make_model: Any) -> None:
    directory, base = make_model(max_position_embeddings=1024)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    adapted.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(directory)}))
    model = js.load_model(tmp_path, "float32")
    assert check(model).agrees
    plain = js.load_model(directory, "float32")
    assert not check(dataclasses.replace(model, params=plain.params)).agrees


def test_the_command_prints_the_verdict_and_no_control_characters(
    tiny_dir: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["check", str(tiny_dir), "--max-new-tokens", "8", "--dtype", "float32"]
    main(arguments)
    out, err = capfd.readouterr()
    assert "verdict        agrees with transformers" in out
    assert all(line.isprintable() for line in out.splitlines())
    assert err == "comparing with transformers, which loads the model in float32 ...\n"
    main([*arguments, "--json"])
    found = json.loads(capfd.readouterr().out)
    assert found["agrees"] is True
    assert found["comparison"]["num_answer"] == 8
    assert found["end_tokens"] == {"2": "</s>"}

    load = ModelOptions.load

    def load_changed(self: ModelOptions, *rest: Any) -> js.Model:
        model = load(self, *rest)
        return dataclasses.replace(model, params=jax.tree.map(lambda leaf: np.asarray(leaf) * 1.01, model.params))

    monkeypatch.setattr(ModelOptions, "load", load_changed)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 1
    assert "verdict        DIFFERS from transformers" in capfd.readouterr().out


def test_without_torch_the_comparison_says_what_it_needs(tiny_dir: Path) -> None:
    command = [sys.executable, "-m", "jaxscape", "check", str(tiny_dir), "--max-new-tokens", "4"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "not made: PyTorch is not installed" in ended.stdout
    assert "run pip install torch" in ended.stdout


def test_what_cannot_be_checked_is_a_user_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["check", str(tmp_path / "nothing")])
    assert end.value.code == 2
    assert "There is no model" in capfd.readouterr().err
