"""Log-likelihoods and next-token logits against transformers', for texts of any length, on any mesh, at any point."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import torch_log_likelihoods, torch_logits
from hypothesis import example, given, settings
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.directions.point import at_point, materialise
from jaxscape.engine import prefill
from jaxscape.engine.prefill import log_likelihoods, next_token_logits
from jaxscape.runtime.sharding import parse_mesh_shape

VOCAB, CONTEXT = 300, 256


@pytest.fixture(scope="module")
def pair(make_model: Any) -> tuple[js.Model, Any]:
    """A tiny model, and transformers' own."""
    directory, torch_model = make_model(seed=3, tie_word_embeddings=True)
    return js.load_model(directory, "float32"), torch_model


def random_texts(lengths: Sequence[int], seed: int = 0, shared: int = 0) -> list[list[int]]:
    """Random tokens; the first `shared` ones are the same in all texts that are long enough."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, VOCAB, shared).tolist()
    return [(start[: length - 1] + rng.integers(0, VOCAB, length).tolist())[:length] for length in lengths]


LENGTHS = st.lists(st.tuples(st.integers(1, 180), st.integers(0, 70)), min_size=1, max_size=12)


@settings(max_examples=20)
@given(lengths=LENGTHS, shared=st.integers(0, 60), seed=st.integers(0, 100))
@example(lengths=[(1, 0)], shared=0, seed=0)
@example(lengths=[(1, 1)] * 5 + [(180, 76)], shared=0, seed=0)
@example(lengths=[(40, 3)] * 12, shared=39, seed=0)
def test_texts_of_all_lengths_are_those_of_transformers(
    pair: tuple[js.Model, Any], lengths: list[tuple[int, int]], shared: int, seed: int
) -> None:
    model, torch_model = pair
    prompts = random_texts([prompt for prompt, _ in lengths], seed, shared)
    answers = [text[1:] for text in random_texts([answer + 1 for _, answer in lengths], seed + 1)]
    computed = log_likelihoods(model, prompts, answers)
    for prompt, answer, values in zip(prompts, answers, computed, strict=True):
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, torch_log_likelihoods(torch_model, prompt, answer), atol=2e-4)
    logits = next_token_logits(model, prompts)
    assert (logits.shape, logits.dtype) == ((len(prompts), VOCAB), np.float32)
    for prompt, values in zip(prompts, logits, strict=True):
        np.testing.assert_allclose(values, torch_logits(torch_model, np.array([prompt]))[0, -1], atol=2e-4)


def test_answers_to_one_prompt_share_its_prefill(pair: tuple[js.Model, Any], monkeypatch: Any) -> None:
    """Four choices of one token need one text, as many as there are prompts."""
    model, torch_model = pair
    prompts = random_texts([30, 45], shared=20)
    computed: list[int] = []
    pack = prefill._pack
    monkeypatch.setattr(prefill, "_pack", lambda texts, *rest: computed.append(len(texts)) or pack(texts, *rest))
    values = log_likelihoods(model, [prompt for prompt in prompts for _ in range(4)], [[7], [8], [9], [10]] * 2)
    assert computed == [2]
    for i, prompt in enumerate(prompts):
        row = torch_log_likelihoods(torch_model, prompt, [7]), torch_log_likelihoods(torch_model, prompt, [10])
        np.testing.assert_allclose([values[4 * i], values[4 * i + 3]], row, atol=2e-4)


@pytest.mark.parametrize("mesh", ["points=2", "points=2,model=2", "model=4", "points=8"])
def test_a_mesh_computes_the_same(make_model: Any, mesh: str) -> None:
    directory, torch_model = make_model(seed=4)
    model = js.load_model(directory, "float32", mesh_shape=parse_mesh_shape(mesh))
    prompts = random_texts([25, 40, 130, 60, 33], shared=20)
    answers = random_texts([3, 40, 1, 17, 9], seed=1)
    computed = log_likelihoods(model, prompts, answers)
    for values, *texts in zip(computed, prompts, answers, strict=True):
        np.testing.assert_allclose(values, torch_log_likelihoods(torch_model, *texts), atol=2e-4)
    expected = [torch_logits(torch_model, np.array([prompt]))[0, -1] for prompt in prompts]
    np.testing.assert_allclose(next_token_logits(model, prompts), expected, atol=2e-4)


def test_bfloat16_is_as_close_as_transformers(make_model: Any) -> None:
    """In bfloat16, ours and transformers' are about equally far from float32's."""
    directory, torch_model = make_model(seed=5, initializer_range=0.1)
    model = js.load_model(directory, "bfloat16")
    prompts, answers = random_texts([40, 90, 30], shared=25), random_texts([20, 30, 60], seed=1)
    pairs = list(zip(prompts, answers, strict=True))
    exact = np.concatenate([torch_log_likelihoods(torch_model, *texts) for texts in pairs])
    rounded = torch_model.to(torch.bfloat16)
    theirs = np.concatenate([torch_log_likelihoods(rounded, *texts) for texts in pairs])
    ours = np.concatenate(log_likelihoods(model, prompts, answers))
    assert np.abs(ours - exact).mean() < 1.5 * np.abs(theirs - exact).mean() < 0.1


def test_parameters_of_a_point_are_used(pair: tuple[js.Model, Any]) -> None:
    """At θ(c), formed or as a sum, the values are those of the model that has these parameters."""
    model = pair[0]
    direction, coords = js.random_direction(model, 0), jnp.array([0.3])
    moved = materialise(model.params, [direction], coords)
    prompts, answers = random_texts([40, 50], shared=20), random_texts([10, 3], seed=1)
    expected = log_likelihoods(replace(model, params=moved), prompts, answers)
    assert not np.allclose(expected[0], log_likelihoods(model, prompts, answers)[0], atol=0.1)
    for params, tolerance in ((moved, 0.0), (at_point(model.params, [direction], coords), 1e-3)):
        for values, same in zip(log_likelihoods(model, prompts, answers, params), expected, strict=True):
            np.testing.assert_allclose(values, same, atol=tolerance)
        logits = next_token_logits(model, prompts, params)
        np.testing.assert_allclose(logits, next_token_logits(replace(model, params=moved), prompts), atol=1e-2)


def test_other_texts_and_points_rarely_compile(pair: tuple[js.Model, Any]) -> None:
    model = pair[0]

    def compiled() -> list[int]:
        programs = (prefill._prefix_cache, prefill._states, prefill._logits, prefill._log_likelihoods)
        return [program._cache_size() for program in programs]

    def run(shared: int, longest: int, params: Any = None) -> None:
        prompts = random_texts(range(longest - 29, longest + 1), shared=shared)
        log_likelihoods(model, prompts, random_texts([7] * 30), params)
        next_token_logits(model, prompts, params)

    run(33, 90)
    before = compiled()
    run(48, 105)
    run(40, 97, materialise(model.params, [js.random_direction(model, 0)], jnp.array([0.1])))
    assert compiled() == before
    for sizes in (2, 8):
        shapes = {
            batch.tokens.shape
            for count in range(1, 200)
            for batch in prefill._pack([[1] * (1 + i % 100) for i in range(count)], 0, 1024, sizes, 1)
        }
        assert len(shapes) == sizes


@pytest.mark.parametrize(("length", "count", "width"), [(83, 24, 256), (83, 1, 128), (60, 24, 128), (120, 24, 128)])
def test_lines_are_wide_where_that_saves_padding(length: int, count: int, width: int) -> None:
    """A line of 256 tokens holds three texts of 83 tokens, where a line of 128 holds one. Such a line is used only if
    there are several texts, and if it leaves less padding."""
    batches = list(prefill._pack([[1] * length] * count, 0, 1024, 8, 1))
    assert {batch.tokens.shape[1] for batch in batches} == {width}
    if width == 256:
        assert sum(batch.tokens.size for batch in batches) == 8 * 256


def test_wide_lines_compute_the_same(pair: tuple[js.Model, Any]) -> None:
    model, torch_model = pair
    prompts, answers = random_texts([60, 65, 70] * 3, shared=20), random_texts([33, 38, 35] * 3, seed=1)
    computed = log_likelihoods(model, prompts, answers)
    texts = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    assert {batch.tokens.shape[1] for batch in prefill._pack(texts, 20, 1024, 8, 1)} == {256}
    for values, prompt, answer in zip(computed, prompts, answers, strict=True):
        np.testing.assert_allclose(values, torch_log_likelihoods(torch_model, prompt, answer), atol=2e-4)


@given(
    lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=60),
    prefix=st.integers(0, 40),
    sizes=st.sampled_from([2, 8]),
    devices=st.integers(1, 8),
)
def test_every_token_is_packed_once(lengths: list[int], prefix: int, sizes: int, devices: int) -> None:
    texts = [
        [*range(prefix), *np.random.default_rng(i).integers(0, 9, size).tolist()] for i, size in enumerate(lengths)
    ]
    packed = set()
    for batch in prefill._pack(texts, prefix, 1024, sizes, devices):
        lines, width = batch.tokens.shape
        assert lines % devices == 0
        assert lines * width <= max(2 * 1024, width) * devices
        for text, offset in batch.offsets.items():
            own = slice(offset + prefix, offset + len(texts[text]))
            assert batch.tokens.ravel()[own].tolist() == texts[text][prefix:]
            assert batch.positions.ravel()[own].tolist() == list(range(prefix, len(texts[text])))
            line = batch.segments[own.start // width]
            same = (line == text) & (batch.positions[own.start // width] >= 0)
            assert same.sum() == lengths[text]
            packed.add(text)
    assert packed == set(range(len(texts)))


def test_a_text_that_is_nan_harms_no_other(pair: tuple[js.Model, Any]) -> None:
    model = pair[0]
    prompts = [[*range(20, 40), 5], [*range(20, 40), 6], [*range(20, 40), 7, 8]]
    params = dict(model.params)
    table = model.params["model"]["embed_tokens"]["weight"]
    expected = next_token_logits(model, prompts)
    params["model"] = model.params["model"] | {"embed_tokens": {"weight": table.at[6, 0].set(jnp.nan)}}
    logits = next_token_logits(model, prompts, params)
    assert np.isnan(logits[1]).all()
    finite = np.delete(np.arange(VOCAB), 6)
    np.testing.assert_allclose(logits[[0, 2]][:, finite], expected[[0, 2]][:, finite], atol=1e-5)
    assert np.isnan(np.concatenate(log_likelihoods(model, prompts[1:2], [[3, 4]], params))).all()


def test_nothing_to_compute(tiny: js.Model) -> None:
    assert log_likelihoods(tiny, [], []) == []
    assert next_token_logits(tiny, []).shape == (0, VOCAB)
    assert [len(values) for values in log_likelihoods(tiny, [[1], [1, 2]], [[], []])] == [0, 0]


@pytest.mark.parametrize(
    ("prompts", "answers", "message"),
    [
        ([[1]], [], "There are 1 prompts, but 0 answers"),
        ([[1], []], [[2], [2]], "Prompt 2 has no tokens"),
        ([[1] * 200], [[1] * 57], "Prompt 1 and its answer have 257 tokens, more than the model's context of 256"),
        ([[1, 300]], [[2]], "token id 300, but the model's vocabulary has 300 tokens"),
        ([[1]], [[-1]], "token id -1"),
    ],
)
def test_wrong_texts_are_user_errors(tiny: js.Model, prompts: Any, answers: Any, message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        log_likelihoods(tiny, prompts, answers)


def test_a_long_prompt_is_a_user_error(tiny: js.Model) -> None:
    with pytest.raises(js.UserError, match="Prompt 1 has 257 tokens"):
        next_token_logits(tiny, [[1] * 257])
