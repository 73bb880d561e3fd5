"""docs/reference/command-line.md and the options that the verbs have."""

import re
from pathlib import Path

import pytest

from jaxscape.cli.main import VERBS, main

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "command-line.md"
WIDTH = "100"  # of the terminal: on a wider one the options stand in two columns


def page(verb: str) -> dict[str, str]:
    """The options in the tables of a verb's section, and of the sections that it refers to, with their defaults."""
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S))
    text = sections[f"`jaxscape {verb}`"]
    shared = [title for title in sections if f"(#{title.lower().replace(' ', '-')})" in text]
    text += "".join(sections[title] for title in shared)
    rows = re.findall(r"^\| `(--[a-z-]+)[^|]*\| ([^|]*) \|", text, re.M)
    assert len(dict(rows)) == len(rows), "an option stands in two tables"
    return {option: default.replace("`", "") for option, default in rows}


@pytest.mark.parametrize("verb", VERBS)
def test_the_page_has_every_option_of_every_verb_with_its_default(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", WIDTH)
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    output = capsys.readouterr().out
    options = {}
    for entry in re.split(r"^. (?=--[a-z])", output, flags=re.M)[1:]:
        text = " ".join(entry.replace("│", " ").split())
        default = re.search(r"\((?:default: )?((?<=default: ).*?|required)\)(?: |$)", text)
        assert default is not None, text
        options[text.split()[0]] = default[1]
    documented = page(verb)
    assert documented.keys() == options.keys()
    different = {
        name: (documented[name], options[name]) for name in options if not same(documented[name], options[name])
    }
    assert not different, "option: (what the page says, what --help says)"


def same(documented: str, shown: str) -> bool:
    """Whether the page's default is the one that `--help` shows; a switch is `off`."""
    return documented == {"False": "off"}.get(shown, shown)


def test_the_page_has_a_section_for_every_verb() -> None:
    sections = re.findall(r"^## `jaxscape (\w+)`", PAGE.read_text(encoding="utf-8"), re.M)
    assert sections == list(VERBS)
