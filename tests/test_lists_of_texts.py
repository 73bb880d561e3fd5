"""A single text where a list is expected is a user error, because Python would take it for a list of characters."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxscape as js
from jaxscape.evaluate.evaluators import EVALUATORS
from jaxscape.runtime.errors import as_list, as_texts

TAKE_LISTS: dict[str, tuple[str, Callable[[js.Model, Any], Any]]] = {
    "attack_success_rate": ("texts", lambda model, text: js.attack_success_rate(text)),
    "generate": ("prompts", lambda model, text: js.generate(model, text, max_new_tokens=2)),
    "scan": ("prompts", lambda model, text: js.scan(model, [0], prompts=text, steps=2, progress=False)),
    "scan along": ("directions", lambda model, text: js.scan(model, text, prompts=["Why?"], progress=False)),
    "make_directions": ("directions", lambda model, text: js.make_directions(text, model)),
    "model_at": ("directions", lambda model, text: js.model_at(model, text, [0.0])),
} | {
    f"evaluator {name}": ("answers", lambda model, text, evaluator=evaluator: evaluator.score(["Why?"], text))
    for name, evaluator in EVALUATORS.items()
}


@pytest.mark.parametrize("name", TAKE_LISTS)
def test_a_single_text_is_no_list(tiny: js.Model, name: str) -> None:
    what, call = TAKE_LISTS[name]
    with pytest.raises(js.UserError, match=f"{what} must be a list, not the single text 'random:0'"):
        call(tiny, "random:0")


# What type checkers would find too, which is why it runs in a process without the tests' type checks.
PROGRAM = """
import sys
import jaxscape as js

model = js.load_model(sys.argv[1], "float32")
calls = {
    "perplexity": lambda: js.perplexity(model, "How are you?"),
    "finetune": lambda: js.finetune(model, "How are you?"),
    "perplexity of texts": lambda: js.perplexity(model, ["How are you?"]),
    "finetune on one chat": lambda: js.finetune(model, [{"role": "user", "content": "Hi"}]),
    "targets": lambda: js.finetune(model, js.load_chats("safe:1"), js.Training(targets="q_proj")),
    "is_refusal": lambda: js.is_refusal(["I'm sorry"]),
    "generate": lambda: js.generate(model, ["Why?", None]),
    "evaluator": lambda: js.evaluator(len),
    "scan by": lambda: js.scan(model, [0], prompts=["Why?"], evaluator=["wei", 3]),
    "system prompt": lambda: js.generate(model, ["Why?"], system_prompt=None),
    "one coordinate": lambda: js.model_at(model, [0], 0.5),
    "written coordinates": lambda: js.model_at(model, [0], "0.5"),
    "one text": lambda: model([1, 2, 3]),
    "texts": lambda: model("Hi"),
    "numbers": lambda: model([[1.5]]),
}
for name, call in calls.items():
    try:
        print(name, "gives", call())
    except js.UserError as error:
        print(name, "->", error)
"""


def test_what_type_checkers_would_find_too(tiny_dir: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tiny_dir)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.splitlines() == [
        "perplexity -> chats must be a list, not the single text 'How are you?': put it into a list.",
        "finetune -> chats must be a list, not the single text 'How are you?': put it into a list.",
        "perplexity of texts -> chat 1: not a chat, which is an object with a list of 'messages'.",
        "finetune on one chat -> chat 1: not a chat, which is an object with a list of 'messages'.",
        "targets -> targets must be a list, not the single text 'q_proj': put it into a list.",
        "is_refusal -> is_refusal takes one text, not a list: call it for each text.",
        "generate -> Number 2 of the prompts is a NoneType: give texts.",
        "evaluator -> An evaluator is a name, or an object with `name` and `score`, not <built-in function len>.",
        "scan by -> An evaluator is a name, or an object with `name` and `score`, not 3.",
        "system prompt -> The system prompt is a NoneType: give a text, or 'none' for none.",
        "one coordinate -> coordinates must be a list, not a float: give a list.",
        "written coordinates -> coordinates must be a list, not the single text '0.5': put it into a list.",
        *(
            f"{name} -> A model takes the token ids of texts, integers in an array of two dimensions, not {what}: "
            f"tokenize the texts first."
            for name, what in {"one text": "int64[3]", "texts": "<U2[]", "numbers": "float64[1, 1]"}.items()
        ),
    ]


@pytest.mark.parametrize("wrong", ["I'm sorry", b"I'm sorry", {"I'm sorry": 1}, {"I'm sorry"}, 3, None])
def test_what_is_no_list(wrong: Any) -> None:
    for check in (as_list, as_texts):
        with pytest.raises(js.UserError, match="answers must be a list, not"):
            check(wrong, "answers")


@pytest.mark.parametrize("wrong", [float("nan"), None, ["Why?"], b"Why?", "\ud800"])
def test_lists_in_which_something_is_no_text(wrong: Any) -> None:
    with pytest.raises(js.UserError, match=r"Number 2 of the answers is (a|not)"):
        as_texts(["Sure", wrong], "answers")


def test_sequences_of_other_libraries_are_lists_too() -> None:
    texts = ["I'm sorry", "Sure"]
    for same in (texts, tuple(texts), np.array(texts), np.array(texts, object), iter(texts)):
        assert as_texts(same, "answers") == texts


def test_a_number_that_is_an_array_is_no_list() -> None:
    with pytest.raises(js.UserError, match="coordinates must be a list, not a ndarray"):
        as_list(np.array(0.5), "coordinates")


@pytest.mark.parametrize(
    ("coords", "message"), [([float("nan")], r"are \[nan\]: give finite"), ([0.5, 1.0], "2 coord")]
)
def test_coordinates_are_finite_numbers_one_for_each_direction(
    tiny: js.Model, coords: list[float], message: str
) -> None:
    with pytest.raises(js.UserError, match=message):
        js.model_at(tiny, [0], coords)


@pytest.mark.parametrize("tokens", [[[1, 300]], [[-1, 2]]])
def test_tokens_that_are_not_in_the_vocabulary(tiny: js.Model, tokens: list[list[int]]) -> None:
    with pytest.raises(js.UserError, match=r"token ids reach from -?1 to \d+, but the model's vocabulary has 300"):
        tiny(np.array(tokens))
