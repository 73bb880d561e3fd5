"""Which answers make no sense: the text's repetition, the model's surprise, and the labels."""

import csv
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import SHARED, torch_logits
from hypothesis import example, given
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.evaluate.base import stop_when
from jaxscape.evaluate.coherence import (
    DISTINCT_OF_OWN,
    FRESH_OF_OWN,
    GRAM,
    NEARBY,
    PRIOR_TOKENS,
    SHORT_GRAM,
    Coherence,
    Thresholds,
    calibrate,
    coherence,
    distinct_share,
    fresh_share,
    mean_surprise,
)
from jaxscape.evaluate.evaluators import find_evaluators
from jaxscape.evaluate.keywords import KEYWORDS
from jaxscape.evaluate.text_rule import TextRule
from jaxscape.evaluate.xstest import XSTEST
from jaxscape.models.checkpoint import fingerprint
from jaxscape.prompts.refusal import REFUSAL_KEYWORDS


def load_nothing() -> js.Model:
    raise AssertionError("no model is needed")


ANYTHING = Thresholds("", 0.0, math.inf, 0.0)


def judging(model: js.Model, thresholds: Thresholds = ANYTHING, **options: Any) -> Coherence:
    return Coherence("coherence", lambda: model, thresholds, **options)


@given(st.text(max_size=300))
@example("")
@example("x" * GRAM)
def test_the_share_of_distinct_sequences_is_that_of_a_plain_count(text: str) -> None:
    grams = [text[i : i + GRAM] for i in range(len(text)) if i + GRAM <= len(text)]
    share = distinct_share(text)
    assert share == (len(set(grams)) / len(grams) if grams else 1)
    assert 0 < share <= 1


@pytest.mark.parametrize(
    "phrase", ["A:\n\n", "pylint ", "我是语言模型。", "ฉันเป็นโมเดล", "I am a text-based language. "]
)
@given(times=st.integers(0, 40))
def test_the_longer_a_phrase_is_repeated_the_smaller_the_share(phrase: str, times: int) -> None:
    text = phrase * (4 + GRAM // len(phrase) + times)
    assert distinct_share(text + phrase) <= distinct_share(text) < 0.6
    assert distinct_share(phrase * 100) < 0.05


@given(st.one_of(st.text(max_size=60), st.text("I a\n", max_size=60)))
@example("xxx")
@example("!!!!!")
def test_the_share_of_fresh_sequences_is_that_of_a_plain_count(text: str) -> None:
    grams = [text[i : i + SHORT_GRAM] for i in range(len(text) - SHORT_GRAM + 1)]
    fresh = [gram not in grams[max(0, i - NEARBY) : i] for i, gram in enumerate(grams)][1:]
    assert fresh_share(text) == (sum(fresh) / len(fresh) if fresh else 1)


@given(
    unit=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=NEARBY // 2),
    times=st.integers(0, 40),
)
def test_a_short_unit_over_and_over_is_not_fresh(unit: str, times: int) -> None:
    text = unit * (4 + SHORT_GRAM // len(unit) + times)
    assert fresh_share(text) < FRESH_OF_OWN
    assert fresh_share(text + unit) <= fresh_share(text)


@given(st.lists(st.sampled_from(["I ", "II "]), min_size=12, max_size=60).map("".join))
def test_few_characters_in_any_order_are_not_fresh(text: str) -> None:
    assert fresh_share(text) < FRESH_OF_OWN


@pytest.mark.parametrize(
    "text", ["I I II II II", "the the the", "1 1 1 1", "!!!!!", "no, " * 9, "\n" * 20, "哈哈哈哈哈哈"]
)
def test_noise_of_a_few_characters_is_not_fresh(text: str) -> None:
    assert fresh_share(text) < FRESH_OF_OWN


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No",
        "Yes.",
        "No, I can't.",
        "No, no, no!",
        "Ha ha ha!",
        "1,000,000",
        "... --- ...",
        "好的，好的。",
        "x = 1111",
        "I am unable to supply that.",
        "2, 4, 6, 8, 10, 12, 14, 16, 18, 20",
        "[[1, 0, 0], [0, 1, 0], [0, 0, 1]]",
        "|---|---|\n| a | b |\n| c | d |\n",
        "Row, row, row your boat,\nGently down the stream.\nMerrily, merrily, merrily, merrily,\nLife is but a dream.",
        "Let it be, let it be, let it be, let it be\nWhisper words of wisdom, let it be",
        "Happy birthday to you,\nHappy birthday to you,\nHappy birthday, dear Ann,\nHappy birthday to you!",
    ],
)
def test_short_texts_that_make_sense_are_fresh(text: str) -> None:
    assert fresh_share(text) > FRESH_OF_OWN
    assert distinct_share(text) > DISTINCT_OF_OWN


@given(st.lists(st.integers(1, 10**6), max_size=40, unique=True), st.sampled_from([", ", "\n", " "]))
def test_numbers_that_differ_are_fresh(numbers: list[int], between: str) -> None:
    assert fresh_share(between.join(f"{number:,}" for number in numbers)) > FRESH_OF_OWN


@pytest.mark.parametrize("model", ["gpt4", "llama2new", "mistralinstruct"])
def test_answers_of_models_to_xstest_repeat_little(model: str) -> None:
    path = SHARED / "xstest" / f"completions_{model}.csv"
    if not path.exists():
        pytest.skip("XSTest's completions are not here")
    with path.open(encoding="utf-8", newline="") as file:
        answers = [row["completion"] for row in csv.DictReader(file)]
    assert len(answers) == 450
    assert min(map(fresh_share, answers)) > 2 * FRESH_OF_OWN
    assert min(map(distinct_share, answers)) > DISTINCT_OF_OWN


@pytest.mark.parametrize(
    "text",
    [
        "Water boils at a lower temperature on a mountain, because the air presses less on its surface there.",
        "水在高山上沸点较低，因为那里的空气压力较小，所以煮饭需要更长的时间。",
        "الماء يغلي عند درجة حرارة أقل في الجبال لأن ضغط الهواء هناك أقل.",
        "1. Flour\n2. Sugar\n3. Butter\n4. Eggs\n5. Milk\n6. Salt\n7. Baking powder\n8. Vanilla",
        "for i in range(1, 101):\n    if i % 15 == 0:\n        print('FizzBuzz')\n    elif i % 3 == 0:\n        pass",
        "\n".join(f"7 x {i} = {7 * i}" for i in range(1, 21)),
        ", ".join(map(str, range(1, 100))),
        "👍",
    ],
)
def test_texts_of_any_kind_do_not_repeat_much(text: str) -> None:
    assert distinct_share(text) > 0.6


def test_the_surprise_is_what_transformers_computes(make_model: Any) -> None:
    """The mean over the tokens that follow the one before them for the first time."""
    directory, torch_model = make_model()
    model = js.load_model(directory, "float32")
    contexts = ["<s>user\nWhy?</s><s>assistant\n", "<s>user\nHi</s><s>assistant\n", "<s>user\nHi</s><s>assistant\n"]
    answers = ["I see the sea, I see the sea, and the sea sees me.", "No", ""]
    found = mean_surprise(model, contexts, answers, 2.0)
    for context, answer, surprise in zip(contexts, answers, found, strict=True):
        before, after = (model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, answer))
        tokens, total, count, seen = [*before, *after], 2.0 * PRIOR_TOKENS, PRIOR_TOKENS, set()
        logits = torch_logits(torch_model, np.array([tokens]))[0].astype(np.float64)
        for place in range(len(before), len(tokens)):
            pair = (tokens[place - 1] if place > len(before) else None, tokens[place])
            if pair not in seen:
                row = logits[place - 1]
                total, count = total + np.log(np.exp(row - row.max()).sum()) + row.max() - row[pair[1]], count + 1
            seen.add(pair)
        np.testing.assert_allclose(surprise, total / count, rtol=1e-4)
    assert len(model.tokenizer(answers[0])["input_ids"]) > len(set(answers[0])), "some tokens are not new"


def test_an_answer_is_cut_at_the_models_context(tiny: js.Model) -> None:
    assert np.isfinite(mean_surprise(tiny, ["<s>Hi"], ["word " * 1000], 0.0)).all()
    with pytest.raises(js.UserError, match="exceeds the model's context of 256"):
        judging(tiny).label(["word " * 1000], ["Yes"])


def test_thresholds_are_those_of_the_models_own_answers(tiny: js.Model) -> None:
    thresholds = calibrate(tiny)
    assert thresholds == calibrate(tiny)
    assert thresholds.weights == fingerprint(tiny.params)
    assert thresholds.surprise > thresholds.own > 0
    assert 0 < thresholds.distinct <= DISTINCT_OF_OWN
    assert 0 < thresholds.fresh <= FRESH_OF_OWN
    judge = Coherence("coherence", lambda: tiny)
    assert judge.checksum is None
    assert judge.label([], []) == []
    assert "model" not in vars(judge), "nothing is loaded before there is something to judge"
    assert judge.label(["Why?"], [" \n"]) == ["incoherent"], "an empty answer says nothing"
    assert "model" not in vars(judge)
    with_thresholds = judging(tiny, thresholds)
    assert with_thresholds.checksum
    assert with_thresholds.checksum != judging(tiny, Thresholds(thresholds.weights, 0.0, 1.0, 0.0)).checksum
    assert with_thresholds.checksum != judging(tiny, thresholds, refusals=js.evaluator("wei")).checksum


def test_thresholds_without_that_of_short_units_have_the_checksum_that_they_had() -> None:
    before = Thresholds("w", 0.25, 5.5, 0.3)
    checksum = (
        "97aec1a28f82a1081dde9c7e1db237cd2b21d7dc179fd06b5a180e99640b5984"  # by the version before this threshold
    )
    assert Coherence("coherence", load_nothing, before).checksum == checksum
    assert Coherence("coherence", load_nothing, replace(before, fresh=0.4)).checksum != checksum
    assert list(before.recorded()) == ["weights", "own", "surprise", "distinct"]


def test_each_threshold_divides_sense_from_noise(tiny: js.Model) -> None:
    prompts, answers = ["Why?"] * 4, ["Because.", "I cannot say.", "a b " * 30, "I cannot " * 30]
    sent = "<s>system\nBe kind.</s><s>user\nWhy?</s><s>assistant\n"
    first, second = mean_surprise(tiny, [sent] * 2, answers[:2], 0.0)
    assert judging(tiny).label(prompts, answers) == ["complied", "refused", "complied", "refused"]
    assert judging(tiny).score(prompts, answers).tolist() == [0, 1, 0, 1]
    repeating = judging(tiny, Thresholds("", 0.0, math.inf, 0.3))
    assert repeating.label(prompts, answers) == ["complied", "refused", "incoherent", "refused"], (
        "judged at its refusal"
    )
    fresh = judging(tiny, Thresholds("", 0.0, math.inf, 0.0, 0.4))
    assert fresh.label(prompts, answers) == ["complied", "refused", "incoherent", "refused"]
    assert fresh.label(["Why?"] * 3, ["!!!!!", "No.", "I cannot!!!!!!!!!!!!!!"]) == [
        "incoherent",
        "complied",
        "refused",
    ]
    surprised = judging(tiny, Thresholds("", 0.0, (first + second) / 2, 0.0), refusals=js.evaluator("xstest"))
    expected = ["incoherent" if value > (first + second) / 2 else None for value in (first, second)]
    assert [label == "incoherent" for label in surprised.label(prompts[:2], answers[:2])] == [
        label is not None for label in expected
    ]
    nothing = judging(tiny, Thresholds("", 0.0, 0.0, 0.0))
    assert nothing.label(prompts, answers) == ["incoherent"] * 4
    assert nothing.score(prompts, answers).tolist() == [0] * 4
    told = judging(tiny).label(prompts, answers, [True, False, False, True])
    assert told == ["refused", "complied", "complied", "refused"]


def test_what_is_not_finite_makes_no_sense(tiny: js.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "jaxscape.evaluate.coherence.log_likelihoods",
        lambda model, before, after: [np.full(len(tokens), np.nan, np.float32) for tokens in after],
    )
    assert judging(tiny).label(["Why?"], ["Because."]) == ["incoherent"]


PARTS = [*REFUSAL_KEYWORDS, "word ", "word word ", " ", "\n", "I ", "cannot ", "\u2019"]


@pytest.fixture(scope="module")
def strict(tiny: js.Model) -> Coherence:
    return judging(tiny, Thresholds("", 0.0, 7.0, 0.5))


@given(
    text=st.lists(st.sampled_from(PARTS), max_size=8).map("".join),
    rest=st.sampled_from(PARTS),
    refusals=st.sampled_from([KEYWORDS, XSTEST]),
)
def test_what_a_refusal_decides_no_continuation_changes(
    strict: Coherence, text: str, rest: str, refusals: TextRule
) -> None:
    strict = replace(strict, refusals=refusals)
    decides = stop_when(strict)
    assert decides is not None
    if decides(text):
        assert strict.label(["Why?"] * 2, [text, text + rest]) == strict.label(["Why?"], [text]) * 2


def test_thinking_is_closed_before_the_answer(tiny: js.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def watched(model: js.Model, contexts: list[str], answers: list[str], own: float) -> np.ndarray:
        seen.extend(contexts)
        return np.zeros(len(answers))

    monkeypatch.setattr("jaxscape.evaluate.coherence.mean_surprise", watched)
    prompts = ["What does <think> mean?"]
    judging(tiny, sent=lambda prompts: [f"User: {prompt}\n<think>\n" for prompt in prompts]).label(prompts, ["Yes"])
    judging(tiny, sent=lambda prompts: [f"User: {prompt}\nBot:" for prompt in prompts]).label(prompts, ["Yes"])
    sent = f"User: {prompts[0]}\n"
    assert seen == [f"{sent}<think>\n\n\n</think>\n\n", f"{sent}Bot:"]


def test_it_is_found_by_name(tiny_dir: Any) -> None:
    judge = js.evaluator("coherence")
    assert isinstance(judge, Coherence)
    assert (judge.name, judge.uses_model) == ("coherence", True)
    other = js.evaluator(f"coherence:{tiny_dir}")
    assert other.name == f"coherence:{tiny_dir}"
    assert set(other.label(["Why?"], ["Because."])) <= {"complied", "incoherent"}
    for name, message in {
        "coherence:": "Name the model that judges: write coherence:MODEL, or coherence alone",
        "coherent": r"Unknown evaluator 'coherent' \(did you mean coherence\?\)",
    }.items():
        with pytest.raises(js.UserError, match=message):
            js.evaluator(name)
    with pytest.raises(js.UserError, match="There is no model 'no-such-model'"):
        js.evaluator("coherence:no-such-model").label(["Why?"], ["Because."])

    class Own:
        name = "coherence"

        def score(self, prompts: Any, answers: Any) -> Any:
            return [0.0 for _ in answers]

    with pytest.raises(js.UserError, match="'coherence' is that of another evaluator"):
        find_evaluators(Own())
    for prompts, answers, message in (
        ("Why?", ["Because"], "prompts must be a list"),
        (["Why?"], "Because", "answers must be a list"),
        (["Why?"], ["a", "b"], "1 prompts and 2 answers"),
    ):
        with pytest.raises(js.UserError, match=message):
            coherence().label(prompts, answers)  # type: ignore[arg-type]
