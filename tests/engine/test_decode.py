"""Generation against transformers' `generate`, and what a row's result may not depend on."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import PROMPTS, completions_of, tokens_of, torch_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.engine.batching import tokenize
from jaxscape.engine.decode import decode_chunk, insert
from jaxscape.engine.sampling import Sampling, sample


def test_greedy_tokens_are_those_of_transformers(make_model: Any, edit_json: Any) -> None:
    directory, torch_model = make_model(seed=7)
    model = js.load_model(directory, "float32")
    rows = tokens_of(model, PROMPTS)
    assert rows == torch_tokens(torch_model, model, PROMPTS)
    # Again, with an end token that one row meets on its way and another does not.
    one = next(token for token in rows[0] if any(token not in row for row in rows))
    edit_json(directory / "config.json", eos_token_id=[2, one])
    model = js.load_model(directory, "float32")
    ended = tokens_of(model, PROMPTS)
    assert ended == torch_tokens(torch_model, model, PROMPTS)
    assert ended != rows
    assert any(row in ended for row in rows)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_its_batch_mates(tiny: js.Model, temperature: float) -> None:
    together = tokens_of(tiny, PROMPTS, temperature=temperature)
    assert tokens_of(tiny, PROMPTS, slots=3, temperature=temperature) == together
    assert tokens_of(tiny, PROMPTS, slots=1, temperature=temperature) == together
    assert tokens_of(tiny, PROMPTS[:2], temperature=temperature) == together[:2]


def test_repeating_repeats_and_another_seed_does_not(tiny: js.Model) -> None:
    first = js.generate(tiny, PROMPTS, max_new_tokens=16, temperature=1.0, seed=3)
    assert js.generate(tiny, PROMPTS, max_new_tokens=16, temperature=1.0, seed=3) == first
    assert js.generate(tiny, PROMPTS, max_new_tokens=16, temperature=1.0, seed=4) != first
    assert len(set(js.generate(tiny, ["Hi"] * 4, max_new_tokens=16, temperature=1.0))) == 4, "rows draw on their own"


def test_other_parameters_do_not_recompile_and_other_lengths_rarely(tiny: js.Model) -> None:
    def compiled() -> tuple[int, int]:
        return insert._cache_size(), decode_chunk._cache_size()

    tokens_of(tiny, PROMPTS)
    before = compiled()
    for scale in (0.9, 1.1):
        moved = js.Model(**{**vars(tiny), "params": jax.tree.map(lambda x, s=scale: s * x, tiny.params)})
        tokens_of(moved, PROMPTS)
    tokens_of(tiny, [prompt + "!" for prompt in PROMPTS])
    assert compiled() == before
    js.generate(tiny, PROMPTS, max_new_tokens=20, temperature=1.0)
    before = compiled()
    for seed in (1, 2):
        js.generate(tiny, PROMPTS, max_new_tokens=20, temperature=1.0, seed=seed)
    assert compiled() == before


def with_embedding(model: js.Model, token: int, value: float) -> js.Model:
    params = jax.tree.map(lambda x: x, model.params)
    embedding = params["model"]["embed_tokens"]["weight"]
    params["model"]["embed_tokens"]["weight"] = embedding.at[token].set(value)
    return js.Model(**{**vars(model), "params": params})


def test_a_row_with_nan_logits_ends_alone_and_is_reported(tiny: js.Model) -> None:
    """The embedding of a token that one prompt alone has is NaN: that row ends, its batch-mates are as before."""
    expected = completions_of(tiny, PROMPTS, max_new_tokens=8)
    rows = [set(row) for row in tokenize(tiny, PROMPTS, "default", 8)]
    produced = {token for row in tokens_of(tiny, PROMPTS, max_new_tokens=8) for token in row}
    token = min(rows[2] - rows[0] - rows[1] - rows[3] - produced)
    completions = completions_of(with_embedding(tiny, token, jnp.nan), PROMPTS, max_new_tokens=8)
    assert [c.finite for c in completions] == [True, True, False, True]
    assert completions[2].text == ""
    assert [c for c in completions if c.finite] == [c for i, c in enumerate(expected) if i != 2]
    # Nor does it harm those that get its slot after it.
    completions = completions_of(
        with_embedding(tiny, token, jnp.nan), PROMPTS[2:3] + PROMPTS, slots=1, max_new_tokens=8
    )
    assert [c.finite for c in completions] == [False, True, True, False, True]
    assert [c for c in completions if c.finite] == [c for i, c in enumerate(expected) if i != 2]


def test_generated_text_has_no_special_tokens(tiny: js.Model) -> None:
    """Every output is a special token that ends nothing: with an output head of zeros the first token, <unk>, wins."""
    params = tiny.params | {"lm_head": {"weight": jnp.zeros_like(tiny.params["lm_head"]["weight"])}}
    assert js.generate(js.Model(**{**vars(tiny), "params": params}), PROMPTS[:2], max_new_tokens=4) == ["", ""]
    assert tiny.tokenizer.decode([0]) == "<unk>"


def test_padding_that_is_nan_harms_no_row(tiny: js.Model) -> None:
    """Padding is token 0; its embedding is NaN here, and no prompt has it."""
    expected = completions_of(tiny, PROMPTS, max_new_tokens=8)
    assert completions_of(with_embedding(tiny, 0, jnp.nan), PROMPTS, max_new_tokens=8) == expected


@settings(max_examples=30)
@given(
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.05, 1),
    seed=st.integers(0, 1000),
)
def test_sampling_draws_from_the_tokens_that_transformers_keeps(
    temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, (1, 30)).astype(np.float32)
    kept = torch.tensor(logits) / temperature
    if top_k:
        kept = transformers.TopKLogitsWarper(top_k)(None, kept)
    if top_p < 1:
        kept = transformers.TopPLogitsWarper(top_p)(None, kept)
    probabilities = kept.softmax(-1)[0].numpy()
    keys = jax.random.split(jax.random.key(seed), 2000)
    drawn = np.asarray(sample(jnp.repeat(logits, 2000, 0), keys, Sampling(1, temperature, top_k, top_p)))
    frequencies = np.bincount(drawn, minlength=30) / 2000
    assert (probabilities[np.unique(drawn)] > 0).all()
    # Five standard deviations of a frequency, at most.
    assert (np.abs(frequencies - probabilities) <= 5 * np.sqrt(probabilities * (1 - probabilities) / 2000) + 1e-3).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"max_new_tokens": 250}, "Prompt 1 has .* exceeds the model's context of 256: shorten the prompt"),
    ],
)
def test_options_out_of_range_are_user_errors(tiny: js.Model, options: Any, message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        js.generate(tiny, ["Hi"], **options)


def test_no_prompts_is_a_user_error(tiny: js.Model) -> None:
    with pytest.raises(js.UserError, match="no prompts"):
        js.generate(tiny, [])


def test_a_tokenizer_of_another_model_is_a_user_error(tiny_dir: Path) -> None:
    model = js.load_model(tiny_dir)
    model.tokenizer.add_tokens(["geese"])
    with pytest.raises(js.UserError, match="use the tokenizer that belongs to the model"):
        js.generate(model, ["two geese"])


def test_an_empty_prompt_is_a_user_error(tiny_dir: Path) -> None:
    model = js.load_model(tiny_dir)
    model.tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(js.UserError, match="Prompt 2 has no tokens"):
        js.generate(model, ["Hi", ""])
