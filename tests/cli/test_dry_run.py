"""`jaxscape scan --dry-run`: what it prints, and that it writes nothing."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tokenizers import processors

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.directions.random import Random
from jaxscape.engine.batching import tokenize
from jaxscape.engine.engine import Engine
from jaxscape.landscapes.axes import interpolation_axis
from jaxscape.landscapes.preview import preview
from jaxscape.models.chat_defaults import with_chat_template
from jaxscape.prompts.chat_format import chat_text
from jaxscape.runtime.hardware import roofline

QUICK = ["--num-prompts", "2", "--steps", "2", "--max-new-tokens", "4", "--cpu", "--dry-run"]
OPTIONS: dict[str, Any] = {"prompts": ["Hi", "Why?"], "axes": [interpolation_axis(2)], "max_new_tokens": 4}


def files_below(*directories: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for directory in directories for path in directory.rglob("*")}


def token_ids(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"^ *(\d+) [* ] ", text, re.MULTILINE)]


def with_tokenizer(model: js.Model, template: str, adds_bos: bool = True) -> js.Model:
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = template
    if adds_bos:
        post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = post_processor
    return replace(model, tokenizer=tokenizer)


def test_a_dry_run_prints_the_plan_the_prompt_and_its_tokens(
    tiny_dir: Path, tiny: js.Model, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["scan", "--model", str(tiny_dir), "--system-prompt", "text:pirate", *QUICK])
    out, err = capfd.readouterr()
    assert err == ""
    prompt = js.load_prompts("harmful", 1)
    assert out.startswith("plan: ")
    assert "slots" in out.splitlines()[0]
    assert f"as it is sent:\n{chat_text(tiny.tokenizer, prompt[0], 'text:pirate')}\n" in out
    (tokens,) = tokenize(tiny, prompt, "text:pirate", 4)
    assert token_ids(out) == tokens
    marked = [line.split()[0] for line in out.splitlines() if re.match(r" *\d+ \* ", line)]
    assert list(map(int, marked)) == [token for token in tokens if token in tiny.tokenizer.all_special_ids]
    assert out.endswith("BOS: 3 (<s>); the tokenizer does not put one before a text by itself\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["auto", "streamed"])
def test_the_plan_without_weights_is_the_plan_of_the_scan(tiny_dir: Path, form: str) -> None:
    roofline("float32")  # from here on it is in the cache, so that both plans are for the same speed
    options = js.EngineOptions(form=form)
    on_host = form == "streamed"
    weightless = js.load_model(tiny_dir, "float32", on_host, weights=False)
    whole = js.load_model(tiny_dir, "float32", on_host)
    assert jax.tree.map(np.shape, weightless.params) == jax.tree.map(np.shape, whole.params)
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(weightless.params))
    previews = [preview(model, [[Random(0)]], options=options, **OPTIONS) for model in (weightless, whole)]
    assert previews[0] == previews[1]
    assert previews[0].startswith(f"plan: {'streamed' if on_host else ''}")


@pytest.mark.parametrize(
    ("start", "adds_bos", "line"),
    [
        ("<s>", True, "BOS: 1 (<s>)"),
        ("", True, "BOS: 0 (<s>); warning: the tokenizer puts one before a text by itself, so the model expects one"),
        ("<s><s>", True, "BOS: 2 (<s>); warning: the tokenizer puts one before a text by itself"),
        ("", False, "BOS: 0 (<s>); the tokenizer does not put one before a text by itself"),
    ],
)
def test_bos_tokens_are_counted_and_none_is_added(tiny: js.Model, start: str, adds_bos: bool, line: str) -> None:
    model = with_tokenizer(tiny, start + "{{ messages[-1].content }}", adds_bos)
    text = preview(model, [[Random(0)]], **OPTIONS)
    assert text.splitlines()[-1].startswith(line)
    assert ("warning" in text) == ("warning" in line)
    theirs = model.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=True, return_dict=False)
    assert token_ids(text) == theirs, "transformers adds none to what a template writes"
    assert theirs.count(model.tokenizer.bos_token_id) == start.count("<s>")


def test_a_tokenizer_without_bos_and_control_characters(tiny: js.Model) -> None:
    model = with_tokenizer(tiny, "{{ messages[-1].content }}<think>", adds_bos=False)
    model.tokenizer.bos_token = None
    text = preview(model, [[Random(0)]], **OPTIONS | {"prompts": ["a\x1b[31m\nb"]})
    assert text.endswith("BOS: 0; the tokenizer has none")
    assert "\na\\x1b[31m\nb<think>\n" in text
    assert "the answer begins inside thinking, which <think> opens" in text


def test_a_model_without_a_chat_template_says_so(tiny: js.Model) -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = None
    text = preview(replace(tiny, tokenizer=with_chat_template(tokenizer)), [[Random(0)]], **OPTIONS)
    assert "no chat template, so Vicuna's is used" in text
    assert "Vicuna" not in preview(tiny, [[Random(0)]], **OPTIONS)


def test_a_dry_run_writes_no_file_and_generates_nothing(tiny_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_dir, tmp_path / "model")
    before = files_below(tmp_path)
    environment = os.environ | {"HOME": str(tmp_path), "JAXSCAPE_CACHE": str(tmp_path / "cache")}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    command = [sys.executable, "-B", "-m", "jaxscape", "scan", "--model", str(model), *QUICK]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert "BOS: " in run.stdout
    assert files_below(tmp_path) == before


def test_a_dry_run_does_not_touch_a_run(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = ["--model", str(tiny_dir), "--out", str(tmp_path / "run")]
    main(["scan", *out, *QUICK[:-1]])
    before = files_below(tmp_path)

    def no_engine(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(Engine, "__post_init__", no_engine)
    main(["scan", *out, *QUICK, "--overwrite"])
    assert files_below(tmp_path) == before
    assert json.loads((tmp_path / "run" / "landscape.json").read_text())["complete"]
    assert "plan: " in capfd.readouterr().out


def test_a_dry_run_finds_what_is_wrong_with_the_prompts(
    tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(
        "{{ (messages[-1].content.split() | first) + messages[-1].content[-1] }}"
    )
    (tmp_path / "prompts.txt").write_text("Write a poem\nWrite a psalm\n")
    with pytest.raises(SystemExit) as stop:
        main(["scan", "--model", str(model), "--prompts", str(tmp_path / "prompts.txt"), *QUICK])
    assert stop.value.code == 2
    assert "same text for prompt 1 ('Write a poem') and prompt 2 ('Write a psalm')" in capfd.readouterr().err
