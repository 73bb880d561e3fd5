"""What `--help` says: grouped options, examples first, and nothing of Python in it."""

import re

import pytest

from jaxscape.cli.main import VERBS, main
from jaxscape.engine.options import FormOption, StorageOption
from jaxscape.evaluate.evaluators import EVALUATORS
from jaxscape.prompts.chat_format import SYSTEM_PROMPTS
from jaxscape.prompts.sets import PROMPT_SETS


def help_of(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--help"])
    assert end.value.code == 0
    return capfd.readouterr().out


def plain(text: str) -> str:
    """The text without boxes and line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def test_the_verbs_are_listed_with_examples(capfd: pytest.CaptureFixture[str]) -> None:
    text = help_of([], capfd)
    assert text.count("\n  jaxscape ") == 2
    assert all(f"\n  {verb}" in text for verb in VERBS)
    assert text.index("Examples:") < text.index("Verbs:")


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_begins_with_two_examples(verb: str, capfd: pytest.CaptureFixture[str]) -> None:
    text = help_of([verb], capfd)
    assert text.count(f"\n  jaxscape {verb} ") == 2
    assert text.index("Examples:") < text.index("╭")
    assert "None" not in text
    assert "(default: )" not in text


def test_the_options_of_a_scan_are_in_groups_and_name_their_choices(capfd: pytest.CaptureFixture[str]) -> None:
    text = help_of(["scan"], capfd)
    groups = ("model", "prompts", "landscape", "generation", "engine", "devices", "output")
    assert [text.index(f"╭─ {group} options") for group in groups] == sorted(
        text.index(f"╭─ {group} options") for group in groups
    )
    words = plain(text)
    for name in (*PROMPT_SETS, *SYSTEM_PROMPTS, *EVALUATORS, *FormOption.__args__, *StorageOption.__args__):  # type: ignore[attr-defined]
        assert re.search(rf"\b{re.escape(name)}\b", words), name
