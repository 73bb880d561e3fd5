"""The protocol of evaluators, and what a scan makes of one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.evaluate.base import LABELS, REFUSALS, labels_of, stop_when, stop_when_all
from jaxscape.evaluate.evaluators import EVALUATORS, find_evaluators
from jaxscape.evaluate.xstest import BEGINNINGS
from jaxscape.prompts.refusal import REFUSAL_KEYWORDS
from jaxscape.prompts.thinking import MARKERS, answer_of

THINKING = [marker for pair in MARKERS for marker in pair]
PROMPTS = ["Write a poem about geese", "Hi", "Why?"]
OPTIONS: dict[str, Any] = {"prompts": PROMPTS, "steps": 2, "max_new_tokens": 6, "progress": False, "shares": False}


class Length:
    """Refuses whatever is longer than ten characters, and cannot say so before the end."""

    name = "length"

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        assert list(prompts) == PROMPTS
        return np.array([0.5 if len(answer) > 10 else 0.49 for answer in answers])


def records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "generations.jsonl").read_text().splitlines()]


@given(st.lists(st.text(max_size=40) | st.sampled_from(REFUSAL_KEYWORDS), max_size=5))
def test_the_keyword_evaluator_is_the_keyword_metric(answers: list[str]) -> None:
    evaluator = js.evaluator("keywords")
    scores = evaluator.score(["prompt"] * len(answers), answers)
    assert scores.dtype == np.float64
    assert scores.tolist() == [js.is_refusal(answer) for answer in answers]
    labels = ["refused" if js.is_refusal(answer) else "complied" for answer in answers]
    assert evaluator.label(["prompt"] * len(answers), answers) == labels
    decides = stop_when(evaluator)
    assert decides is not None
    assert [decides(answer) for answer in answers] == [js.is_refusal(answer) for answer in answers]


def test_evaluators_are_found_by_name_and_keep_the_protocol() -> None:
    for name, evaluator in EVALUATORS.items():
        assert evaluator.name == name
        assert isinstance(evaluator, js.Evaluator)
        assert js.evaluator(name) is evaluator
        assert evaluator.score([], []).shape == (0,)
        assert evaluator.label([], []) == []
    own = Length()
    assert find_evaluators(own) == [own]
    assert find_evaluators(["wei", own]) == [js.evaluator("wei"), own]
    assert labels_of(own, PROMPTS, ["Sure, I will do that.", "No", ""]) == ["refused", "complied", "complied"]
    assert stop_when(own) is None
    assert stop_when_all([js.evaluator("keywords"), own]) is None
    own.name = "keywords"
    with pytest.raises(js.UserError, match="'keywords' is that of another evaluator"):
        find_evaluators(own)


CHOICES = "choose keywords, wei, jailbreakbench, xstest, .*keywords:FILE, FILE.py:NAME"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("colour", f"Unknown evaluator 'colour': {CHOICES}"),
        ("xtest", rf"Unknown evaluator 'xtest' \(did you mean xstest\?\): {CHOICES}"),
        ("Keyword", rf"Unknown evaluator 'Keyword' \(did you mean keywords\?\): {CHOICES}"),
        ("wei:7", rf"Unknown evaluator 'wei:7' \(did you mean wei\?\): {CHOICES}"),
        ("", f"Unknown evaluator '': {CHOICES}"),
        ([], "Give at least one evaluator"),
        (["wei", "wei"], "'wei' is given twice"),
    ],
)
def test_evaluators_that_are_not_there(name: Any, message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        find_evaluators(name)


@pytest.mark.parametrize("name", EVALUATORS)
def test_prompts_and_answers_are_two_lists_of_one_length(name: str) -> None:
    for function in (js.evaluator(name).score, js.evaluator(name).label):
        with pytest.raises(js.UserError, match="answers must be a list, not the single text 'Sure'"):
            function(["Why?"], "Sure")
        with pytest.raises(js.UserError, match="prompts must be a list, not the single text 'Why"):
            function("Why?", ["Sure"])
        with pytest.raises(js.UserError, match="2 prompts and 1 answers"):
            function(["Why?", "Who?"], ["Sure"])


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.0], "gave 1 scores for 2 answers"),
        ([0.0, float("nan")], "gave the score nan"),
        ([0.0, 1.5], "gave the score 1.5: scores are numbers from 0 to 1"),
        (["0", "1"], r"gave \['0', '1'\]: give a list with a number for each answer"),
        ([[0.0], [1.0, 2.0]], r"gave .*: give a list with a number for each answer"),
        (None, "gave None: give a list with a number for each answer"),
        (0.5, "gave 0.5: give a list with a number for each answer"),
    ],
)
def test_scores_that_are_none(scores: Any, message: str) -> None:
    class Given:
        name = "length"

        def score(self, prompts: Sequence[str], answers: Sequence[str]) -> Any:
            return scores

    with pytest.raises(js.UserError, match=f"'length' {message}"):
        labels_of(Given(), ["Why?", "Who?"], ["Sure", "No"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["refused"], "gave 1 labels for 2 answers"),
        (["refused", "maybe"], "gave the label 'maybe': labels are refused, partial, complied, incoherent"),
    ],
)
def test_labels_that_are_none(labels: list[str], message: str) -> None:
    class Given(Length):
        def label(self, prompts: Sequence[str], answers: Sequence[str]) -> Any:
            return labels

    with pytest.raises(js.UserError, match=f"'length' {message}"):
        labels_of(Given(), ["Why?", "Who?"], ["Sure", "No"])


texts = st.text(max_size=40) | st.lists(
    st.sampled_from([*REFUSAL_KEYWORDS, *BEGINNINGS, "However", " ", "\n", "\u2019", "word ", "I am ", *THINKING, "<"]),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("opening", ["", "<think>"])
@pytest.mark.parametrize("name", EVALUATORS)
@given(text=texts, data=st.data())
def test_what_a_beginning_decides_no_continuation_changes(name: str, opening: str, text: str, data: Any) -> None:
    """The beginning may end within a character, whose bytes are then decoded as U+FFFD."""
    evaluator = js.evaluator(name)
    decides = stop_when(evaluator, opening)
    assert decides is not None
    content = text.encode("utf-8", "surrogatepass")
    cut = data.draw(st.integers(0, len(content)))
    beginning = content[:cut].decode("utf-8", "replace")
    if decides(beginning):
        answers = [answer_of(opening + part) for part in (beginning, text)]
        (at_cut, whole) = evaluator.label(["Why?"] * 2, answers)
        assert at_cut == whole
        assert all(decides(text[:end]) for end in range(len(beginning), len(text) + 1))


@given(st.lists(texts, max_size=3))
def test_scores_and_labels_agree(answers: list[str]) -> None:
    for evaluator in EVALUATORS.values():
        prompts = ["Why?"] * len(answers)
        labels = evaluator.label(prompts, answers)
        assert set(labels) <= set(LABELS)
        assert [label in REFUSALS for label in labels] == [s >= 0.5 for s in evaluator.score(prompts, answers)]


def test_answers_end_only_where_all_evaluators_have_decided() -> None:
    decides = stop_when_all([js.evaluator("jailbreakbench"), js.evaluator("xstest")])
    assert decides is not None
    assert not decides("I cann")
    assert decides("I cannot")
    assert not decides("Sure, here is")  # decided for xstest, and not for the other
    assert decides("Sure, but I can't")
    assert not decides("Sure<thi")  # perhaps thinking begins


def test_a_scan_with_an_evaluator_of_ones_own(tiny: js.Model, tmp_path: Path) -> None:
    """Its verdicts are in the files, no text is cut, and the run is another than one with the keyword metric."""
    land = js.scan(tiny, [0], evaluator=Length(), out=tmp_path / "own", **OPTIONS)
    plain = js.scan(tiny, [0], out=tmp_path / "plain", options=js.EngineOptions(full_text=True), **OPTIONS)
    own, keyword = records(tmp_path / "own"), records(tmp_path / "plain")
    assert [record["generation"] for record in own] == [record["generation"] for record in keyword]
    assert [record["refused"] for record in own] == [len(record["generation"]) > 10 for record in own]
    assert {record["refused"] for record in own} == {True, False}
    assert land.asr.tolist() != plain.asr.tolist()
    assert json.loads((tmp_path / "own" / "config.json").read_text())["evaluator"] == "length"
    assert "evaluator" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    with pytest.raises(js.UserError, match=r"different: evaluator\)"):
        js.scan(tiny, [0], out=tmp_path / "own", **OPTIONS)
