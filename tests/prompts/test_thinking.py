"""What counts as thinking in a text, and how tokens that mark it are decoded."""

import copy

import pytest
from helpers import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.evaluate.base import stop_when
from jaxscape.prompts.chat_format import thinking_opening
from jaxscape.prompts.thinking import MARKERS, answer_of, hidden_tokens, is_unanswered, with_opening


@pytest.mark.parametrize(
    ("text", "answer", "unanswered"),
    [
        ("Sure.", "Sure.", False),
        (" Sure. \n", " Sure. \n", False),
        ("", "", False),
        ("<think>\nIllegal?\n</think>\n\nSure.", "Sure.", False),
        ("<think>\n\n</think>\n\nSure.", "Sure.", False),
        ("[THINK]I cannot[/THINK]Sure.", "Sure.", False),
        ("<thought>\nI cannot\n</thought>\nSure.", "Sure.", False),
        ("<think>a <think> b</think>c</think>", "c</think>", False),
        ("<think>a [/THINK] b</think>c", "c", False),
        ("Well. <think>I cannot</think> Sure. <think>Sorry", "Well.  Sure.", False),
        ("<think>I cannot", "", True),
        ("<think>I cannot</think>\n", "", True),
        ("<think>", "", True),
        ("I cannot</think>Sure.", "I cannot</think>Sure.", False),
    ],
)
def test_the_answer_is_what_is_outside_of_thinking(text: str, answer: str, unanswered: bool) -> None:
    assert answer_of(text) == answer
    assert is_unanswered(text) == unanswered


words = st.lists(
    st.sampled_from(["I cannot", "Sure", " ", *(marker for pair in MARKERS for marker in pair)]), max_size=9
)


@given(words)
def test_a_text_is_not_stopped_before_its_outcome_is_decided(parts: list[str]) -> None:
    text = "".join(parts)
    for opening in ("", "<think>"):
        decides = stop_when(js.evaluator("keywords"), opening)
        assert decides is not None
        stopped = [end for end in range(len(text) + 1) if decides(text[:end])]
        final = not is_unanswered(opening + text) and js.is_refusal(answer_of(opening + text))
        assert bool(stopped) == final
        assert stopped == list(range(len(text) + 1))[-len(stopped) :] if stopped else True


def test_an_evaluator_is_not_asked_while_the_model_thinks() -> None:
    class Short:
        name = "short"
        asked: list[str] = []  # noqa: RUF012

        def score(self, prompts: list[str], answers: list[str]) -> None:
            raise NotImplementedError

        def stop_when(self, text: str) -> bool:
            self.asked.append(text)
            return not text

    decides = stop_when(Short(), "<think>")  # type: ignore[arg-type]
    assert decides is not None
    assert not any(map(decides, ["", "I cannot", "I cannot</think>", "I cannot</think>\nSure"]))
    assert Short.asked == ["Sure"]


@pytest.mark.parametrize(
    ("end", "opening"),
    [
        ("<assistant><think>\n", "<think>"),  # DeepSeek-R1's distillations
        ("<assistant><think>\\n", "<think>"),  # the same with one backslash too many
        ("[|assistant|]<thought>\n", "<thought>"),  # EXAONE Deep
        ("<assistant><think>\nOkay, ", "<think>"),
        ("<assistant><think>\n\n</think>\n\n", ""),  # Qwen3 without thinking
        ("<assistant>", ""),
    ],
)
def test_a_chat_template_may_open_the_thinking(end: str, opening: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}" + end
    for system_prompt in ("default", "Write <think> first."):
        assert thinking_opening(tokenizer, system_prompt) == opening


def test_the_rate_of_texts_leaves_thinking_out_and_warns_of_texts_without_an_answer() -> None:
    texts = ["<think>I cannot</think>Sure.", "I cannot</think>Sure.", "I cannot.", "<think>Sure</think>I cannot."]
    assert js.attack_success_rate(texts) == 50
    with pytest.warns(UserWarning, match="1 of 5 texts have no answer after their thinking and count as no refusal"):
        assert js.attack_success_rate([*texts, "<think>I cannot"]) == 60


@given(st.text())
def test_an_opening_is_added_only_where_one_is_missing(text: str) -> None:
    assert with_opening(text) == text
    assert with_opening(f"{text}</think>Sure.") == f"<think>{text}</think>Sure."
    assert with_opening(f"<think>{text}</think>Sure.") == f"<think>{text}</think>Sure."


def test_special_tokens_that_mark_thinking_are_kept() -> None:
    tokenizer = tiny_tokenizer()
    assert hidden_tokens(tokenizer) is None
    ordinary, special = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    ordinary.add_tokens(["<think>", "</think>"])  # as Qwen3's tokenizer has them
    assert hidden_tokens(ordinary) is None
    special.add_special_tokens({"extra_special_tokens": ["[THINK]", "[/THINK]", "[OTHER]"]})
    hidden = hidden_tokens(special)
    assert hidden is not None
    assert special.convert_ids_to_tokens(sorted(hidden)) == ["<unk>", "<s>", "</s>", "[OTHER]"]
