"""The first tokens of answers: the rule is that of coherence, and the model's own answers make sense."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.evaluate.beginnings import Beginnings
from jaxscape.evaluate.coherence import (
    BEGINNING,
    LATER_EVERY,
    BeginningThresholds,
    Coherence,
    Thresholds,
    calibrate,
    mean_surprise,
)
from jaxscape.models.encoding import encode
from jaxscape.prompts.chat_format import chat_texts
from jaxscape.prompts.sets import load_prompts

PROMPTS = ["Hi", "Write a poem about geese", "Why?"]
TEXTS = st.text("aeimnost ?,1", max_size=BEGINNING)  # a token has at least one character


@pytest.fixture(scope="module")
def own(tiny: js.Model) -> Thresholds:
    return calibrate(tiny, beginnings=True)


def test_own_beginnings_make_sense(tiny: js.Model, own: Thresholds) -> None:
    assert own == replace(calibrate(tiny), beginning=own.beginning)
    assert own.beginning is not None
    assert own.beginning.surprise >= own.surprise
    assert own.beginning.distinct <= own.distinct
    assert own.beginning.fresh <= own.fresh
    prompts = load_prompts("benign")[-20:]
    judge = Beginnings(tiny, encode(tiny, chat_texts(tiny.tokenizer, prompts), BEGINNING), own)
    assert not judge.make_no_sense(range(20), js.generate(tiny, prompts, max_new_tokens=BEGINNING)).any()
    later = BEGINNING + 2 * LATER_EVERY
    assert not judge.repeat_themselves(js.generate(tiny, prompts, max_new_tokens=later)).any()


def test_later_beginnings_are_judged_by_their_text(tiny: js.Model, own: Thresholds) -> None:
    assert own.beginning is not None
    own = replace(own, beginning=replace(own.beginning, distinct=0.3, fresh=0.4))
    judge = Beginnings(tiny, encode(tiny, chat_texts(tiny.tokenizer, PROMPTS), BEGINNING), own)
    texts = [
        "",
        " \n",
        "A map shows where things are",
        "map map map map map",
        "!!!!!!!!!!",
        "the map of the the the map",
    ]
    assert judge.repeat_themselves(texts).tolist() == [False, False, False, True, True, False]


@settings(max_examples=15)
@given(texts=st.lists(st.tuples(st.integers(0, 2), TEXTS), min_size=1, max_size=20), margin=st.floats(0.1, 2.0))
def test_the_rule_is_that_of_coherence(
    tiny: js.Model, own: Thresholds, texts: list[tuple[int, str]], margin: float
) -> None:
    """With the thresholds for beginnings in the place of those for whole answers."""
    limits = BeginningThresholds(own.own + margin, own.distinct, own.fresh)
    numbers, answers = [number for number, _ in texts], [text for _, text in texts]
    prompts = [PROMPTS[number] for number in numbers]
    sent = chat_texts(tiny.tokenizer, PROMPTS)
    found = Beginnings(tiny, encode(tiny, sent, BEGINNING), replace(own, beginning=limits)).make_no_sense(
        numbers, answers
    )
    whole = Coherence("c", lambda: tiny, replace(own, surprise=limits.surprise))
    labels = whole.label(prompts, answers, [False] * len(answers))
    surprise = mean_surprise(tiny, [sent[number] for number in numbers], answers, own.own)
    for text, is_noise, label, mean in zip(answers, found, labels, surprise, strict=True):
        if abs(mean - limits.surprise) > 1e-3:
            assert is_noise == (label == "incoherent" and bool(text.strip()))


def test_a_model_without_finite_logits_finds_no_sense(tiny: js.Model, own: Thresholds) -> None:
    broken = js.Model(**{**vars(tiny), "params": jax.tree.map(lambda x: x * np.nan, tiny.params)})
    judge = Beginnings(broken, encode(tiny, chat_texts(tiny.tokenizer, PROMPTS), BEGINNING), own)
    assert judge.make_no_sense([0, 1], ["5 6 7 8", ""]).tolist() == [True, False]
