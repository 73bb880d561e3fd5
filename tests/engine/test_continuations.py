"""Log-likelihoods of answers' first tokens, after prompts that are computed once, against transformers'."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from helpers import torch_log_likelihoods
from hypothesis import example, given, settings
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.engine import continuations
from jaxscape.engine.continuations import Continuations, cache_bytes
from jaxscape.runtime.sharding import parse_mesh_shape

VOCAB, ROOM = 300, 5


@pytest.fixture(scope="module")
def pair(make_model: Any) -> tuple[js.Model, Any]:
    directory, torch_model = make_model(seed=3, tie_word_embeddings=True)
    return js.load_model(directory, "float32"), torch_model


def draw(lengths: Sequence[int], seed: int, shared: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    start = rng.integers(0, VOCAB, shared).tolist()
    return [(start + rng.integers(0, VOCAB, length).tolist()) for length in lengths]


@settings(max_examples=10)
@given(
    own=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    asked=st.lists(st.tuples(st.integers(0, 5), st.integers(0, ROOM)), min_size=1, max_size=20),
    shared=st.sampled_from([0, 3, 40]),
    seed=st.integers(0, 100),
)
@example(own=[1], asked=[(0, ROOM)], shared=0, seed=0)
@example(own=[1, 1], asked=[(1, 0), (0, 1)], shared=40, seed=1)
def test_likelihoods_are_those_of_transformers(
    pair: tuple[js.Model, Any], own: list[int], asked: list[tuple[int, int]], shared: int, seed: int
) -> None:
    model, torch_model = pair
    prompts = draw(own, seed, shared)
    numbers = [number % len(prompts) for number, _ in asked]
    answers = draw([length for _, length in asked], seed + 1)
    found = Continuations(model, prompts, ROOM).log_likelihoods(numbers, answers)
    for number, answer, values in zip(numbers, answers, found, strict=True):
        np.testing.assert_allclose(values, torch_log_likelihoods(torch_model, prompts[number], answer), atol=2e-4)


def test_a_question_compiles_nothing_new(pair: tuple[js.Model, Any]) -> None:
    asked = Continuations(pair[0], draw([7, 30, 12], 0, 20), ROOM)
    asked.log_likelihoods([0], [[1, 2]])
    before = continuations._continue._cache_size()
    asked.log_likelihoods([0, 1, 2] * 9, draw([ROOM] * 27, 1))
    assert continuations._continue._cache_size() == before


@pytest.mark.parametrize("mesh", ["points=4,model=2", "points=2"])
def test_devices_say_the_same(make_model: Any, pair: tuple[js.Model, Any], mesh: str) -> None:
    directory, _ = make_model(seed=3, tie_word_embeddings=True)
    sharded = js.load_model(directory, "float32", mesh_shape=parse_mesh_shape(mesh))
    prompts, answers = draw([9, 20, 4], 2, 30), draw([ROOM] * 3, 3)
    one, many = (
        Continuations(model, prompts, ROOM).log_likelihoods([2, 0, 1], answers) for model in (pair[0], sharded)
    )
    np.testing.assert_allclose(many, one, atol=2e-4)


def test_the_memory_is_that_of_the_cache(pair: tuple[js.Model, Any]) -> None:
    model, prompts = pair[0], draw([9, 20, 4], 2, 30)
    cache = Continuations(model, prompts, ROOM)._cache
    assert (
        cache_bytes(model, prompts, ROOM) == sum(x.nbytes for part in cache[:2] for x in part) + cache.positions.nbytes
    )
