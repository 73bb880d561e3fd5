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
from jaxscape.evaluate.base import stop_when, verdicts
from jaxscape.evaluate.evaluators import EVALUATORS, find_evaluator
from jaxscape.evaluate.keywords import REFUSAL_KEYWORDS

PROMPTS = ["Write a poem about geese", "Hi", "Why?"]
OPTIONS: dict[str, Any] = {"prompts": PROMPTS, "steps": 2, "max_new_tokens": 6, "progress": False}


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
    evaluator = find_evaluator("keywords")
    scores = evaluator.score(["prompt"] * len(answers), answers)
    assert verdicts(evaluator, scores, len(answers)) == [js.is_refusal(answer) for answer in answers]
    decides = stop_when(evaluator)
    assert decides is not None
    assert [decides(answer) for answer in answers] == [js.is_refusal(answer) for answer in answers]


def test_evaluators_are_found_by_name_and_keep_the_protocol() -> None:
    for name, evaluator in EVALUATORS.items():
        assert evaluator.name == name
        assert isinstance(evaluator, js.Evaluator)
        assert evaluator.score([], []).shape == (0,)
    own = Length()
    assert find_evaluator(own) is own
    assert stop_when(own) is None
    with pytest.raises(js.UserError, match="Unknown evaluator 'judge': choose keywords"):
        find_evaluator("judge")
    own.name = "keywords"
    with pytest.raises(js.UserError, match="'keywords' is that of another evaluator"):
        find_evaluator(own)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.0], "gave 1 scores for 2 answers"),
        ([0.0, float("nan")], "gave the score nan"),
        ([0.0, 1.5], "gave the score 1.5: scores are numbers from 0 to 1"),
    ],
)
def test_scores_that_are_none(scores: list[float], message: str) -> None:
    with pytest.raises(js.UserError, match=f"'length' {message}"):
        verdicts(Length(), np.array(scores), 2)


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
