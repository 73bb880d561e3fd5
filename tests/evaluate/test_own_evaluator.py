"""Evaluators from a Python file of the user's."""

from pathlib import Path

import numpy as np
import pytest

import jaxscape as js
from jaxscape.evaluate.base import labels_of, labels_of_points, stop_when, uses_model
from jaxscape.evaluate.evaluators import find_evaluators

CODE = """
from __future__ import annotations
from dataclasses import dataclass

NUMBER = 3

def has_no(prompts, answers):
    return [0.7 if "no" in answer else 0.2 for answer in answers]

def echoes(prompts, answers):
    return [prompt in answer for prompt, answer in zip(prompts, answers)]

def too_many(prompts, answers):
    return [0.0, 1.0, 0.5]

def words(prompts, answers):
    return ["yes" for answer in answers]

def fails(prompts, answers):
    return [1 / len(answer) for answer in answers]

def lonely(prompts):
    return [0.0 for prompt in prompts]

def long_ones(prompts, answers):
    return [len(answer) / 100 for answer in answers]

@dataclass
class Half:
    word: str = "but"

    def score(self, prompts, answers):
        return [0.5 if self.word in answer else 0.0 for answer in answers]

    def label(self, prompts, answers):
        return ["partial" if self.word in answer else "complied" for answer in answers]

    def stop_when(self, text):
        return self.word in text

class Needs:
    def __init__(self, word):
        self.word = word

    def score(self, prompts, answers):
        return [0.0] * len(answers)

instance = Half("however")
"""
PROMPTS, ANSWERS = ["Why?", "Who?"], ["I say no.", "Who? but me"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


def test_a_function_is_an_evaluator(file: Path) -> None:
    evaluator = js.evaluator(f"{file}:has_no")
    assert evaluator.name == "mine.py:has_no"
    assert evaluator.score(PROMPTS, ANSWERS).tolist() == [0.7, 0.2]
    assert evaluator.label(PROMPTS, ANSWERS) == ["refused", "complied"]
    assert stop_when(evaluator) is None
    assert js.evaluator(f"{file}:echoes").label(PROMPTS, ANSWERS) == ["complied", "refused"]
    assert isinstance(evaluator, js.Evaluator)


def test_so_is_an_object_or_its_class(file: Path) -> None:
    for name, labels in (("Half", ["complied", "partial"]), ("instance", ["complied", "complied"])):
        evaluator = js.evaluator(f"{file}:{name}")
        assert evaluator.label(PROMPTS, ANSWERS) == labels
        assert evaluator.score(PROMPTS, ANSWERS).tolist() == [0.5 * (label == "partial") for label in labels]
    decides = stop_when(js.evaluator(f"{file}:Half"))
    assert decides is not None
    assert [decides(text) for text in ("Sure", "Sure, but")] == [False, True]


def test_one_may_hold_a_model_and_fail_to_judge(file: Path) -> None:
    """It is then asked after the scan, and its label is None where it could not judge."""
    with file.open("a") as code:
        code.write("\n\nclass Holds(Half):\n    uses_model = True\n\n    def label(self, prompts, answers):\n")
        code.write("        return [None if not answer else 'refused' for answer in answers]\n")
    evaluator = js.evaluator(f"{file}:Holds")
    assert uses_model(evaluator)
    assert not uses_model(js.evaluator(f"{file}:Half"))
    assert labels_of(evaluator, ["Why?"] * 2, ["", "No"]) == [None, "refused"]


def test_it_has_what_the_protocol_leaves_open(file: Path) -> None:
    with file.open("a") as code:
        code.write(
            "\n\nclass Whole(Half):\n    said = []\n"
            "    def prepare(self, prompts, free_bytes):\n        self.said.append(free_bytes)\n"
            "    def release(self):\n        self.said.append('released')\n"
            "    def label_points(self, prompts, points):\n"
            "        for answers in points:\n            yield self.label(prompts, answers)\n"
            "    def score(self, prompts, answers):\n        return [float('nan') for answer in answers]\n"
            "    def label(self, prompts, answers):\n        return [None for answer in answers]\n"
        )
    evaluator = js.evaluator(f"{file}:Whole")
    evaluator.prepare(["Why?"], 3)
    evaluator.release()
    assert evaluator.judge.said == [3, "released"]
    assert list(labels_of_points(evaluator, ["Why?"], [["No"], ["Yes"]])) == [[None], [None]]
    assert np.isnan(evaluator.score(["Why?"], ["No"])).all()
    assert not any(hasattr(js.evaluator(f"{file}:Half"), name) for name in ("prepare", "release", "label_points"))


def test_a_stop_when_that_fails_is_found_before_a_scan(file: Path) -> None:
    with file.open("a") as code:
        code.write("\n\nclass Wrong(Half):\n    def stop_when(self, text):\n        return text.nothing\n")
    with pytest.raises(js.UserError, match=r"stop_when of the evaluator 'mine.py:Wrong' failed in .*mine.py, line"):
        js.evaluator(f"{file}:Wrong")


def test_another_content_has_another_checksum(file: Path) -> None:
    checksum = js.evaluator(f"{file}:has_no").checksum  # type: ignore[attr-defined]
    file.write_text(CODE + "\n# changed\n")
    assert js.evaluator(f"{file}:has_no").checksum != checksum  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.py:has_no", "There is no file .*missing.py: give the Python file"),
        ("mine.py", "Name what is to be used of .*mine.py: write .*mine.py:NAME"),
        ("mine.py:", "Name what is to be used of"),
        ("mine.py:hasno", "There is no 'hasno' in .*mine.py"),
        ("mine.py:NUMBER", "'NUMBER' in .*mine.py is a int: name a function or an evaluator"),
        (
            "mine.py:Needs",
            r"The class 'Needs' of .*mine.py failed \(TypeError: .*missing 1 required positional argument",
        ),
        (
            "mine.py:lonely",
            r"'mine.py:lonely' failed \(TypeError: lonely\(\) takes 1 positional argument but 2 were given",
        ),
        ("broken.py:x", r"The file .*broken.py failed \(SyntaxError: .*broken.py, line 1"),
        ("script.py:x", r"The file .*script.py failed in .*script.py, line 2 \(SystemExit: 3\)"),
        ("raising.py:x", r"The file .*raising.py failed in .*raising.py, line 2 \(ZeroDivisionError: division by zero"),
    ],
)
def test_files_that_cannot_be_used(file: Path, name: str, message: str) -> None:
    (file.parent / "broken.py").write_text("def x(:\n")
    (file.parent / "script.py").write_text("import sys\nsys.exit(3)\n")
    (file.parent / "raising.py").write_text("x = 1\n1 / 0\n")
    with pytest.raises(js.UserError, match=message):
        js.evaluator(f"{file.parent}/{name}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_many", "'mine.py:too_many' gave 3 scores for 2 answers"),
        ("words", r"'mine.py:words' gave \['yes', 'yes'\]: give a list with a number"),
        ("fails", r"'mine.py:fails' failed in .*mine.py, line 20 \(ZeroDivisionError"),
    ],
)
def test_scores_that_cannot_be_used(file: Path, name: str, message: str) -> None:
    """Two answers show that, before anything else is done."""
    with pytest.raises(js.UserError, match=message):
        find_evaluators(f"{file}:{name}")


def test_scores_that_only_other_answers_spoil(file: Path) -> None:
    evaluator = js.evaluator(f"{file}:long_ones")
    with pytest.raises(js.UserError, match=r"'mine.py:long_ones' gave the score 2.0: scores are numbers from 0 to 1"):
        evaluator.label(["Why?"], ["x" * 200])
