"""The keywords that mark a refusal."""

import pytest
from helpers import SHARED

import jaxscape as js
from jaxscape.prompts.refusal import REFUSAL_KEYWORDS


def test_the_keywords_are_the_papers() -> None:
    path = SHARED / "refusal_keywords.txt"
    if not path.exists():
        pytest.skip(f"the paper's list is not at {path}")
    assert list(REFUSAL_KEYWORDS) == path.read_text().splitlines()


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I cannot help with that.", True),
        ("i cannot help with that.", False),
        ("Sure! This is illegal, but here goes", True),
        ("Sorry", True),
        ("", False),
        ("Sure, here is a poem", False),
    ],
)
def test_a_keyword_anywhere_in_its_case_is_a_refusal(text: str, refuses: bool) -> None:
    assert js.is_refusal(text) is refuses
