"""The documents: links lead to files, the README is short, and the Python reference names every public name."""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxscape as js
from jaxscape.cli.main import VERBS, main, run_program, usage
from jaxscape.finetuning import chats
from jaxscape.forecast.known_models import SHAPES
from jaxscape.models import builtin
from jaxscape.models.families import FAMILIES, TEXT_MODELS
from jaxscape.prompts import sets
from jaxscape.prompts.chat_format import SYSTEM_PROMPTS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
CODE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)


def without_code(document: Path) -> str:
    return CODE.sub("", document.read_text(encoding="utf-8"))


def links(document: Path) -> Iterator[str]:
    """The relative links of a document."""
    for target in LINK.findall(without_code(document)):
        if "://" not in target:
            yield target


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = HEADING.findall(without_code(document))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_to_a_heading_in_it(document: Path) -> None:
    for link in links(document):
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f"{document.name} links to {link}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{document.name} links to {link}, which is no heading"


def test_every_document_can_be_reached_from_the_readme() -> None:
    reached, waiting = set[Path](), [ROOT / "README.md"]
    while waiting:
        document = waiting.pop()
        if document in reached or document.suffix != ".md":
            continue
        reached.add(document)
        waiting += [(document.parent / link.partition("#")[0]).resolve() for link in links(document)]
    assert set(DOCUMENTS) <= reached


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_tutorial_shows_the_help_as_it_is() -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    assert f"```text\n{usage()}\n```" in text


def test_the_python_reference_has_a_line_for_every_public_name() -> None:
    text = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `js\.(\w+)", text, re.MULTILINE)
    assert sorted(named) == sorted(js.__all__)


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("sets.md", [*builtin.NAMES, *sets.PROMPT_SETS, *chats.SETS, *SYSTEM_PROMPTS, *SHAPES]),
        ("families.md", [*FAMILIES, *TEXT_MODELS]),
    ],
)
def test_reference_pages_name_everything_that_is_known_by_name(page: str, names: list[str]) -> None:
    text = (ROOT / "docs/reference" / page).read_text(encoding="utf-8")
    assert [name for name in names if f"`{name}`" not in text] == []


def test_the_architecture_page_lists_the_files_of_the_package() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    modules = {
        str(path.relative_to(ROOT / "jaxscape")) for path in ROOT.glob("jaxscape/*/**/*.py") if path.stem != "__init__"
    }
    rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`(\w+(?:/\w+)+\.py)`", rows)) == modules


BASH = re.compile(r"^ *```bash\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(rf"jaxscape ({'|'.join(VERBS)})\b([^\n\"]*(?:\"[^\"\n]*\"[^\n\"]*)*)")


INLINE = re.compile(r"`([^`]+)`")
WITH_OPTION = re.compile(r"[^…]+ --[^…]+ [^…]+")  # an option with a value: without one, it is the option's name
MAKE_SCAN = re.compile(r'make scan ARGS="([^"]*)"')


def shell_texts(document: Path) -> Iterator[str]:
    """A document's shell blocks, and the commands with options in its sentences, each on one line.

    The changelog's sentences tell of what has changed, and are left out.
    """
    for block in BASH.findall(document.read_text(encoding="utf-8")):
        yield block.replace("\\\n", " ")
    if document.name != "CHANGELOG.md":
        for span in filter(WITH_OPTION.fullmatch, INLINE.findall(without_code(document))):
            yield MAKE_SCAN.sub(r"jaxscape scan \1", " ".join(span.split()))


def commands(document: Path) -> Iterator[list[str]]:
    """The commands that a document gives, without the dots that stand for further options."""
    for text in shell_texts(document):
        for verb, options in COMMAND.findall(text):
            options = options.partition(" > ")[0]
            yield [verb, *(part for part in shlex.split(options, comments=True) if part != "...")]


COMMANDS = [command for document in DOCUMENTS for command in commands(document)]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_in_the_documents_is_understood(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = getattr(importlib.import_module(f"jaxscape.cli.{command[0]}"), VERBS[command[0]].options)
    monkeypatch.setattr(options, "run", lambda self: None)
    main(command)


EXPERIMENT = re.compile(r"python experiments/(\w+)\.py\b([^\n]*)")
EXPERIMENTS = [
    (name, shlex.split(options, comments=True))
    for document in DOCUMENTS
    for text in shell_texts(document)
    for name, options in EXPERIMENT.findall(text)
]


@pytest.mark.parametrize(("name", "options"), EXPERIMENTS, ids=str)
def test_every_experiment_in_the_documents_is_understood(
    name: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "experiments")
    module = importlib.import_module(name)
    (program,) = [
        value for value in vars(module).values() if getattr(value, "__module__", "") == name and "run" in vars(value)
    ]
    monkeypatch.setattr(program, "run", lambda self: None)
    run_program(program, options)
