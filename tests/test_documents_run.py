"""What the README and docs/ tell readers to run is run here, or, where that takes too long, at least read.

- Python blocks run, those of a page in order and in one namespace, as a reader would run them. A tiny random model
  stands in for the real one: `CHANGED` and the fixture `reader` say what is not as on the page, and nothing else is.
  Where an expression has a literal as its comment, it has that value.
- Blocks that a page calls a file (`my_file.py`:) are written, and the blocks after them use them.
- The guides for contributors are followed: the new file is imported, the line that registers it is run, and so are its
  tests.
- Commands are read by the real parsers of the command line, in tests/test_docs.py. Those of `RUN_VERBS` are run here,
  in their places between the Python blocks. The others are not, because each takes minutes on the real model; the
  verbs' own tests run them on tiny ones.
- `OTHER_COMMANDS` says which other programs stand in the documents, and why they are not run.
"""

import ast
import importlib
import inspect
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import MakeModel, tiny_tokenizer, torch_logits, with_shares, write_run

import jaxscape as js
from jaxscape.cli.main import VERBS, main
from jaxscape.evaluate import coherence, measure
from jaxscape.landscapes.axes import symmetric_axes

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
GUIDES = sorted(ROOT.glob("docs/how-to/add-*.md"))

CHANGED: dict[str, dict[str, Any]] = {
    "load_model": {"source": "tiny"},
    "load_prompts": {"num_prompts": 2},
    "scan": {"steps": 2, "max_new_tokens": 4, "progress": False},
    "measure": {"steps": 2, "progress": False},
    "radius": {"max_new_tokens": 4, "progress": False},
}
"""The arguments of jaxscape's functions that are not those of the page."""

RUN_VERBS = ("export",)
"""Verbs that need nothing but a finished run, and write what Python blocks read."""

OTHER_COMMANDS = {
    "make": "its targets are looked for in the Makefile",
    "pip": "installs packages from the network",
    "git": "clones the repository from the network",
    "mkdir": "makes the directory of a shell's completions",
    "cd": "goes to what git has cloned",
    "python3": "makes the reader's environment",
    "source": "enters the reader's environment",
    "awk": "joins files that a hub gives only to those who accept its terms",
    "gcloud": "starts jaxscape on a TPU pod; the command that it starts is read",
    "srun": "starts jaxscape on a cluster; the command that it starts is read",
    "mpirun": "starts jaxscape on a cluster; the command that it starts is read",
    "sbatch": "submits to SLURM; tests/launch runs its script on a real one",
    "ray": "submits to Ray; tests/launch runs its script on a real one",
    "cp": "copies that script",
    "sky": "starts instances in a cloud; tests/launch has SkyPilot read the file",
    "docker": "builds an image from one of a registry; tests/launch has a linter read the file",
    "kubectl": "starts pods on a cluster; tests/launch has their definitions read the file",
    "for": "submits each task; tests/launch runs the command in the loop",
    "sed": "is that command",
    "done": "ends the loop",
    "xpk": "starts jaxscape on a cluster; the command that it starts is read",
}
"""Programs in shell blocks that are not jaxscape's, and why they are not run."""

FENCED = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"`([\w./-]+\.(?:py|toml|jinja|csv|txt))`")


class Block(NamedTuple):
    """A block of code, with the name of the file that the paragraph before it announces with a colon, or nothing."""

    language: str
    file: str
    code: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCED.finditer(text):
        before = text[: match.start()].rstrip().rpartition("\n\n")[2]
        names = FILE_NAME.findall(before) if before.endswith(":") else []
        code = re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE)
        yield Block(match[2], names[-1] if names else "", code, text.count("\n", 0, match.start()) + 1)


def with_changes(name: str) -> Callable[..., Any]:
    """A function of jaxscape with the arguments in `CHANGED`."""
    function = getattr(js, name)
    names = list(inspect.signature(function).parameters)

    def changed(*args: Any, **kwargs: Any) -> Any:
        return function(**dict(zip(names, args, strict=False)) | kwargs | CHANGED[name])

    return changed


def run(code: str, namespace: dict[str, Any], name: str) -> int:
    """Run code, and compare each expression with its comment where that is a literal. Returns how many were."""
    compared = 0
    for statement in ast.parse(code, name).body:
        if not isinstance(statement, ast.Expr):
            exec(compile(ast.Module([statement], []), name, "exec"), namespace)
            continue
        value = eval(compile(ast.Expression(statement.value), name, "eval"), namespace)
        comment = code.splitlines()[statement.end_lineno - 1][statement.end_col_offset :].strip("# ")
        if is_literal(comment):
            assert repr(value) == comment
            compared += 1
    return compared


def is_literal(text: str) -> bool:
    """Whether a comment is a value, as Python or NumPy writes it, and not prose."""
    try:
        ast.literal_eval(re.sub(r"^array\((.*)\)$", r"\1", text))
    except (SyntaxError, ValueError):
        return False
    return True


def shell_lines(block: Block) -> Iterator[str]:
    """The lines of a shell block, without comments and settings of the environment."""
    for line in block.code.replace("\\\n", " ").splitlines() if block.language == "bash" else ():
        if words := re.sub(r"^(\w+=\S+ +)+|(^|\s)#.*", "", line.strip()):
            yield words


def commands_to_run(block: Block) -> list[list[str]]:
    """The arguments of the commands of a block that are run."""
    return [
        shlex.split(line)[1:]
        for line in shell_lines(block)
        if line.startswith(tuple(f"jaxscape {v} " for v in RUN_VERBS))
    ]


RUN_PAGES = [
    page
    for page in PAGES
    if page not in GUIDES and any(block.language == "python" or commands_to_run(block) for block in blocks(page))
]


@pytest.fixture(scope="module")
def judge_dir(make_model: MakeModel) -> Path:
    """A directory with a random model, whose tokenizer has single tokens for Yes and No."""
    directory, _ = make_model(vocab_size=302, max_position_embeddings=1024)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Yes", "No"])
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def few_calibration_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that judges sense needs answers of its own, which would take most of the tests' time."""
    monkeypatch.setattr(coherence, "NUM_CALIBRATION", 2)
    monkeypatch.setattr(coherence, "CALIBRATION_TOKENS", 4)


@pytest.fixture
def reader(
    tiny_dir: Path, judge_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_calibration_tokens: None
) -> None:
    """A directory in which a reader works, with the runs of earlier commands, a tiny model and a tiny judge."""
    monkeypatch.chdir(tmp_path)
    Path("tiny").symlink_to(tiny_dir)
    Path("tiny-judge").symlink_to(judge_dir)
    for name in CHANGED:
        monkeypatch.setattr(js, name, with_changes(name))
    monkeypatch.setattr(coherence, "DEFAULT_MODEL", "tiny")
    monkeypatch.setattr(measure, "is_refusal", lambda text: True)  # the random model refuses nothing
    prompts = ["Compose a letter", "Write a poem"]
    for run_name in ("smollm2-135m-safe-1d", "first"):
        refused, axes = np.ones((1, 3, 2), bool), symmetric_axes(1, 2, 0.5)
        directory = write_run(Path("runs") / run_name, refused, axes, prompts, full_text=True)
        with_shares(js.Landscape.load(directory)).save(directory)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace: dict[str, Any] = {}
    compared = 0
    for block in blocks(page):
        if block.file:
            Path(block.file).write_text(block.code.replace("HuggingFaceTB/SmolLM2-1.7B-Instruct", "tiny-judge"))
        for arguments in commands_to_run(block):
            main(arguments)
        if block.language != "python":
            continue
        if block.file:
            monkeypatch.setattr(sys, "argv", [block.file, "runs/first"])
        compared += run(block.code, namespace, f"{page.name}:{block.line}")
    assert compared >= (7 if page.stem == "mathematics" else 0)


class Registry(NamedTuple):
    """Where a guide has its reader register the new part."""

    module: str
    name: str


REGISTRIES = {
    "add-an-evaluator": Registry("jaxscape.evaluate.evaluators", "EVALUATORS"),
    "add-a-direction": Registry("jaxscape.directions.kinds", "KINDS"),
    "add-a-figure": Registry("jaxscape.report.registry", "FIGURES"),
    "add-a-model-family": Registry("jaxscape.models.families", "FAMILIES"),
}


def registered(code: str, registry: Registry, namespace: dict[str, Any]) -> Any:
    """A registry with what a guide adds to it: as a statement in which dots may stand for what is there, or as entries
    of a dict."""
    module = importlib.import_module(registry.module)
    namespace = vars(module) | namespace
    existing = getattr(module, registry.name)
    if code.startswith(registry.name):
        exec(code, namespace)
        given = namespace[registry.name]
        return given if isinstance(given, dict) else (*existing, *(x for x in given if x not in (..., *existing)))
    return existing | eval(f"{{{code}}}", namespace)


def cases(function: Callable[..., None]) -> list[dict[str, Any]]:
    """The arguments of each case of a test function that may be parametrized."""
    (mark,) = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"] or [None]
    if mark is None:
        return [{}]
    names, values = mark.args
    return [dict(zip(names, case, strict=True)) for case in values]


@pytest.mark.usefixtures("few_calibration_tokens")
@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_a_guide_for_contributors_can_be_followed(
    guide: Path, request: pytest.FixtureRequest, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, namespace = REGISTRIES[guide.stem], dict[str, Any]()
    parts = [block for block in blocks(guide) if block.language == "python"]
    tests = [block for block in parts if block.file.startswith("tests/") and not (ROOT / block.file).exists()]
    for block in parts:
        if block in tests:
            continue
        if block.file.startswith("jaxscape/") and not (ROOT / block.file).exists():
            module = ModuleType(block.file.removesuffix(".py").replace("/", "."))
            monkeypatch.setitem(sys.modules, module.__name__, module)
            exec(block.code, vars(module))
            namespace |= vars(module)
        elif block.code.startswith("def "):  # a function of the registry's own module
            functions = dict(vars(importlib.import_module(registry.module)))
            exec(block.code, functions)
            namespace |= functions
        elif not block.file.startswith("tests/"):
            monkeypatch.setattr(
                importlib.import_module(registry.module),
                registry.name,
                registered(block.code, registry, namespace),
            )
        else:  # rows of a table of tests/models/test_families.py: configurations that are compared with transformers
            for family, options in eval(f"{{{block.code}}}").values():
                directory, reference = make_model(family, **options)
                tokens = np.random.default_rng(0).integers(3, 300, (1, 8))
                logits = np.asarray(js.load_model(directory, "float32")(tokens))
                np.testing.assert_allclose(logits, torch_logits(reference, tokens), rtol=1e-3, atol=1e-3)
    for block in tests:
        module = ModuleType(Path(block.file).stem)
        exec(block.code, vars(module))
        functions = [value for name, value in vars(module).items() if name.startswith("test_")]
        assert functions
        for function, values in itertools.chain.from_iterable(itertools.product([f], cases(f)) for f in functions):
            needed = [name for name in inspect.signature(function).parameters if name not in values]
            function(**values | {name: request.getfixturevalue(name) for name in needed})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_line_of_a_shell_block_is_read_or_known(page: Path) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for line in itertools.chain.from_iterable(map(shell_lines, blocks(page))):
        program, _, rest = line.partition(" ")
        if program == "jaxscape":
            assert rest == "--help" or rest.split()[0] in VERBS
        elif program == "python":
            assert (ROOT / rest.split()[0]).exists(), line
        else:
            assert program in OTHER_COMMANDS, f"{line!r} is not run: say in OTHER_COMMANDS why, or what is done with it"
        if program == "make":
            assert rest.split()[0] in targets, line
