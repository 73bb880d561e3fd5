"""What `--help` says: grouped verbs and options, examples first, and nothing of Python in it."""

import importlib
import itertools
import re
import shlex

import pytest
from rich.cells import cell_len

import jaxscape
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


def examples(text: str) -> list[str]:
    """The commands of the examples; each has a comment above it."""
    lines = text.split("\n")
    commands = [number for number, line in enumerate(lines) if line.startswith("  jaxscape ")]
    assert all(lines[number - 1].startswith("  # ") for number in commands)
    return [lines[number].strip() for number in commands]


def test_the_verbs_are_listed_in_groups_with_examples(capfd: pytest.CaptureFixture[str]) -> None:
    text = help_of([], capfd)
    assert len(examples(text)) == 3
    for group in dict.fromkeys(verb.group for verb in VERBS.values()):
        listed = text.partition(f"\n{group}:\n")[2].partition("\n\n")[0]
        assert re.findall(r"^  (\S+) +\S", listed, re.M) == [name for name in VERBS if VERBS[name].group == group]
    assert text.index("Examples:") < text.index("Measure a model:")


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_begins_with_three_examples_that_are_understood(
    verb: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of([verb], capfd)
    commands = examples(text)
    assert len(commands) == len(set(commands)) >= 3
    assert text.index("Examples:") < text.index("╭")
    assert "None" not in text
    assert "(default: )" not in text
    understood: list[object] = []
    for command in commands:
        name, *options = shlex.split(command.partition(" > ")[0])[1:]
        program = getattr(importlib.import_module(f"jaxscape.cli.{VERBS[name].module}"), VERBS[name].options)
        monkeypatch.setattr(program, "run", lambda self: understood.append(self))
        main([name, *options])
    assert len(understood) == len(commands)
    assert [command.split()[1] for command in commands] == [verb] * len(commands)


def test_no_line_of_an_option_ends_where_the_next_word_has_room(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line breaks of docstrings are not those of the help."""
    monkeypatch.setenv("COLUMNS", "100")
    lines = help_of(["scan"], capfd).split("\n")
    texts = [line[2:-2].rstrip() if line.startswith("│ ") else "" for line in lines]
    texts = [text if text.startswith(" " * 10) else "" for text in texts]  # without the names of the options
    pairs = [(first, second.split()[0]) for first, second in itertools.pairwise(texts) if first and second]
    assert len(pairs) > 20
    assert all(cell_len(first) + 1 + cell_len(word) > 96 for first, word in pairs)


def test_the_version_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capfd.readouterr().out == f"jaxscape {jaxscape.__version__}\n"


def test_the_options_of_a_scan_are_in_groups_and_name_their_choices(capfd: pytest.CaptureFixture[str]) -> None:
    text = help_of(["scan"], capfd)
    groups = ("model", "prompts", "landscape", "generation", "engine", "devices", "output")
    assert [text.index(f"╭─ {group} options") for group in groups] == sorted(
        text.index(f"╭─ {group} options") for group in groups
    )
    words = plain(text)
    for name in (*PROMPT_SETS, *SYSTEM_PROMPTS, *EVALUATORS, *FormOption.__args__, *StorageOption.__args__):  # type: ignore[attr-defined]
        assert re.search(rf"\b{re.escape(name)}\b", words), name
