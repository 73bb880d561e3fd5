"""The site: what docs/hooks.py makes of the pages. `make lint` builds it, with every link."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers import load_script

import jaxscape as js

ROOT = Path(__file__).parents[1]
hooks = load_script(ROOT / "docs" / "hooks.py")

REPOSITORY = "https://example.org/repo"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("tutorial.md", "how-to/radius.md#the-certificate", "how-to/radius.md#the-certificate"),
        ("how-to/radius.md", "../tutorial.md", "../tutorial.md"),
        ("how-to/radius.md", "#the-certificate", "#the-certificate"),
        ("how-to/radius.md", "../../CHANGELOG.md#010", f"{REPOSITORY}/blob/main/CHANGELOG.md#010"),
        ("README.md", "../jaxscape", f"{REPOSITORY}/tree/main/jaxscape"),
        ("README.md", "https://arxiv.org/abs/2405.17374", "https://arxiv.org/abs/2405.17374"),
    ],
)
def test_only_links_out_of_the_documents_lead_to_the_repository(page: str, link: str, expected: str) -> None:
    assert hooks.with_repository_links(f"see [this]({link}).", page, REPOSITORY) == f"see [this]({expected})."


def test_the_python_reference_has_every_docstring_below_a_link_to_it() -> None:
    text = hooks.with_docstrings((ROOT / "docs/reference/python.md").read_text(encoding="utf-8"))
    linked = re.findall(r"^\| \[`js\.\w+[^`]*`\]\[([\w.]+)\]", text, re.MULTILINE)
    described = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    assert linked == described
    assert sorted(name.rpartition(".")[2] for name in described) == sorted(js.__all__)


def test_an_entry_for_several_names_becomes_one_for_each() -> None:
    docstring = "Text: low, high.\n\nAttributes:\n    low, high: the\n        ends.\n    other: text."
    assert hooks.with_split_names(docstring) == (
        "Text: low, high.\n\nAttributes:\n    low: the\n        ends.\n    high: the\n        ends.\n    other: text."
    )


def test_a_formula_is_a_drawing_with_its_source_as_the_title() -> None:
    svg = ElementTree.fromstring(hooks.drawn("a < b_1", is_inline=True))
    assert svg.findtext(f"{SVG}title") == "a < b_1"
    assert svg.get("width", "").endswith("em")  # it grows with the text around it
    assert "script" not in "".join(element.tag for element in svg.iter())


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/**/*.md")), ids=lambda page: page.stem)
def test_formulas_are_as_high_as_formulas_are(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    formulas = hooks.MATH_BLOCK.findall(text)
    inline = re.findall(r"\$([^$\n]+)\$", re.sub(r"^ *```.*?^ *```|`[^`]*`", "", text, flags=re.MULTILINE | re.DOTALL))
    for formula in formulas + inline:
        svg = ElementTree.fromstring(hooks.drawn(formula, is_inline=formula in inline))
        assert float(svg.get("height", "").removesuffix("em")) < 6, formula
