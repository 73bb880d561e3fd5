"""What the README and docs/ tell readers to run is run here.

- The Python blocks and the commands of a page run in order, in one directory, as a reader would run them. Commands run
  in this process, through the command line's `main`. Where a Python expression has a literal as its comment, it has
  that value.
- Blocks that a page calls a file (`my_file.py`:) are written, and the blocks after them use them.
- The guides for contributors are followed: the new file is imported, the line that registers it is run, and so are its
  tests and its commands.
- Small random models stand in for those that have names, and small files for public ones. The fixture `reader` makes
  them; `SMALL`, `CHANGED` and `INSTEAD` say what else is not as on the page.
- `NOT_RUN` says what is not run, and why. Such commands of jaxscape are read by the real parsers, and so are those in
  sentences in which something is to be filled in.
"""

import ast
import contextlib
import csv
import importlib
import inspect
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import (
    TEMPLATE,
    TINY,
    MakeModel,
    load_script,
    tiny_tokenizer,
    torch_logits,
    with_shares,
    write_run,
)

import jaxscape as js
from jaxscape.cli.main import VERBS, main, run_program
from jaxscape.directions import examples
from jaxscape.evaluate import coherence, llm_judge, measure
from jaxscape.landscapes.axes import symmetric_axes
from jaxscape.models import builtin
from jaxscape.runtime.files import cache_dir
from jaxscape.runtime.public_files import PublicFile

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
GUIDES = sorted(ROOT.glob("docs/how-to/add-*.md"))

CHANGED: dict[str, dict[str, Any]] = {
    "load_prompts": {"num_prompts": 2},
    "scan": {"steps": 2, "max_new_tokens": 4, "progress": False},
    "measure": {"steps": 2, "progress": False},
    "radius": {"max_new_tokens": 4, "progress": False},
}
"""The arguments of jaxscape's functions that are not those of the page."""

SMALL = {
    "scan": "--num-prompts 2 --steps 2 --max-new-tokens 4 --overwrite",
    "radius": "--num-prompts 2 --max-new-tokens 4 --overwrite",
    "measure": "--num-prompts 2 --steps 2 --overwrite",
    "finetune": "--epochs 2 --overwrite",
    "check": "--max-new-tokens 4",
}
"""The options that each verb is given, after those of the page; the last value of an option counts."""

NOT_WITH = {
    "--abandon-incoherent": ("--max-new-tokens 4",),
    "--extend": ("--overwrite",),
    "--like": ("--num-prompts 2", "--steps 2"),
    "--points": ("--steps 2",),
}
"""What of `SMALL` an option of the page does not go with."""

WITH = {
    "--num-directions": "--num-directions 2",
    "--extra-steps": "--extra-steps 1",
    "--certify": "--draws 2",
    "--validation": "--validation 0.5",
    "--shard": "--steps 4",
}
"""What is added where a page gives an option."""

INSTEAD = {
    "DIRECTORY": "path/to/directory",
    "--gpu": "--cpu",
    "advbench:80:180": "advbench:80:88",
    "safe:100": "safe:4",
    "wandb": "tensorboard",
    "layer:15": "layer:1",
    "layer:29": "",
    "FILE.yaml": "experiments/sweep.yaml",
    "...": "",
}
"""What commands have in place of a word of the page: words with which little is compiled, or none."""

PLANNED = ("path/to/model.gguf", "points=2,model=4")
PLANNED += ("worst-case", "refusal", "mask:snip", "masked:[random:0][mask:snip]", "hessian")
"""Words with which a scan only prints its plan, because it would compile for long. Other tests compute with GGUF files
and with all kinds of directions."""

NOT_RUN = {
    "make test": "the tests are what runs",
    "make lint": "is a step of its own beside the tests",
    "pip install": "installs packages from the network",
    "git clone": "clones the repository from the network",
    "cd jaxscape": "goes to what git has cloned",
    "python3 -m venv": "makes the reader's environment",
    "source .venv": "enters the reader's environment",
    "gcloud": "starts jaxscape on a TPU pod",
    "srun": "starts jaxscape on a cluster",
    "mpirun": "starts jaxscape on a cluster",
    "sbatch": "submits to SLURM; tests/launch runs its script on a real one",
    "ray": "submits to Ray; tests/launch runs its script on a real one",
    "cp FILE.yaml jaxscape/launch/": "copies that script",
    "sky": "starts instances in a cloud; tests/launch has SkyPilot read the file",
    "docker": "builds an image from one of a registry; tests/launch has a linter read the file",
    "kubectl": "starts pods on a cluster; tests/launch has their definitions read the file",
    "for task in": "gives each task to kubectl; tests/launch runs the command in the loop",
    "sed": "is that command",
    "done": "ends the loop",
    "xpk": "starts jaxscape on a cluster",
    "jaxscape sweep experiments/sweep.yaml\n": "runs 48 tasks; tests/sweeps/ runs smaller sweeps",
    "jaxscape sweep experiments/sweep.yaml --run": "runs one of them",
    "jaxscape plan": "takes a compiler for TPUs minutes; tests/forecast/ plans for smaller models",
    "jaxscape scan ... --coordinator": "needs a second machine; tests/runtime/test_processes.py has two processes",
    "python experiments/": "tests/experiments/ runs them",
    "python benchmarks/": "measures a machine for minutes",
}
"""How the lines of shell blocks that are not run begin, with their end where only the whole line is meant, and why they
are not."""

FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(rf"{FENCED.pattern}|`((?:jaxscape \w+|make scan) [^`]+)`", FENCED.flags)
FILE_NAME = re.compile(r"`([\w./-]+\.(?:py|toml|jinja|csv|jsonl|txt|yaml))`")
UNFINISHED = re.compile(r"\b[A-Z]{3,}\b(?!=)|\.\.\.|…|--[\w-]+$")
RECORDS = ("CHANGELOG.md", "measurements.md", "command-line.md")
"""Pages whose sentences tell of commands that were run, or that show an error."""


class Block(NamedTuple):
    """A block of code, with the name of the file that the paragraph before it announces with a colon, or nothing."""

    language: str
    file: str
    code: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page, and the commands in its sentences in which nothing is to be filled in."""
    text = page.read_text(encoding="utf-8")
    for match in CODE.finditer(text):
        indent, language, code, command = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        if command is None:
            before = text[: match.start()].rstrip().rpartition("\n\n")[2]
            names = FILE_NAME.findall(before) if before.endswith(":") and language != "bash" else []
            code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
            yield Block(language, names[-1] if names else "", code, line)
        elif page.name not in RECORDS and not UNFINISHED.search(command):
            yield Block("bash", "", " ".join(command.split()), line)


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
        if words := re.sub(r"^(\w+=\S+ +)+|(^|\s)#.*", "", line.strip()).strip():
            yield words


def is_run(line: str) -> bool:
    return not f"{line}\n".startswith(tuple(NOT_RUN))


def run_line(line: str) -> None:
    """Run a line of a shell block. Its exit code must be 0."""
    line = re.sub(r'^make scan( ARGS="(.*)")?$', r"jaxscape scan \2", line).replace("s3://", "memory://")
    if not line.startswith("jaxscape "):
        subprocess.run(["bash", "-ec", line], check=True)
        return
    command, _, file = line.partition(" > ")
    words = [word for word in (INSTEAD.get(word, word) for word in shlex.split(command)[1:]) if word]
    code: Any = 0
    with Path(file).expanduser().open("w") if file else contextlib.nullcontext(sys.stdout) as output:
        try:
            with contextlib.redirect_stdout(output):
                main([*words, *small_options(words)])
        except SystemExit as end:
            code = end.code
    assert not code, line


def small_options(words: Sequence[str]) -> list[str]:
    """What is put behind the words of a command of jaxscape, so that it is quick."""
    options = f"{SMALL.get(words[0], '')} "
    if words[0] == "scan" and any(word in PLANNED for word in words):
        options += "--dry-run "
    for word in words:
        for option in NOT_WITH.get(word, ()):
            options = options.replace(f"{option} ", "")
        options += f"{WITH.get(word, '')} "
    return options.split()


def run_of(line: str) -> tuple[str, str] | None:
    """Where a command keeps its run, and its other words; None if it begins no run, or something is to be filled in."""
    line = re.sub(r'^make scan( ARGS="(.*)")?$', r"jaxscape scan \2", line)
    program, verb, *words = [*shlex.split(line), "", ""]
    if program != "jaxscape" or verb not in ("scan", "measure", "radius", "finetune"):
        return None
    if {"--dry-run", "--extend", "DIRECTORY", "..."} & {*words}:
        return None
    value = dict(itertools.pairwise(words)).get
    default = (verb, value("--model"), value("--ndim"), value("--like"), "--points" in words, "--certify" in words)
    place = value("--out") or str(default)
    return place, " ".join([verb, *(word for word in words if word not in ("", "--out", place))])


def test_different_commands_keep_their_runs_in_different_directories() -> None:
    """A reader may follow several guides, in any order: a directory that holds another run would be an error."""
    runs: dict[str, set[str]] = {}
    for page in PAGES:
        for block in blocks(page) if page.name not in RECORDS else ():
            for place, command in filter(None, map(run_of, shell_lines(block))):
                runs.setdefault(place, set()).add(command)
            for place in re.findall(r'\bout=f?"([^"]+)"', block.code) if block.language == "python" else ():
                runs.setdefault(place, set()).add(f"{page.name}:{block.line}")
    assert {place: commands for place, commands in runs.items() if len(commands) > 1} == {}


RUN_PAGES = [
    page
    for page in PAGES
    if page not in GUIDES and any(b.language == "python" or any(map(is_run, shell_lines(b))) for b in blocks(page))
]


HUB = {
    "mistralai/Mistral-7B-Instruct-v0.2": "tiny",
    "org/name@revision": "tiny",
    "Qwen/Qwen3Guard-Gen-0.6B": "tiny-judge",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": "tiny-judge",
}
"""The models of the hub that pages name, and what is in the hub's cache in place of each."""

THINKING = TEMPLATE.replace(
    "{% endif %}", "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def judge_dir(make_model: MakeModel) -> Path:
    """A directory with a random model, whose tokenizer has single tokens for what judges say."""
    words = ["Yes", "No", "yes", "no", "partial", "noise"]
    directory, _ = make_model(vocab_size=TINY["vocab_size"] + len(words), max_position_embeddings=1024)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(words)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def readers_files(tiny_dir: Path, judge_dir: Path, make_model: MakeModel, tmp_path_factory: Any) -> Path:
    """A directory with what pages suppose that a reader has: models and data of the reader's own, the hub's cache, and
    public files. Small ones stand in for all that are not the reader's."""
    root = tmp_path_factory.mktemp("reader")
    (root / "tiny").symlink_to(tiny_dir)
    (root / "tiny-judge").symlink_to(judge_dir)
    (root / "tiny-unsafe").symlink_to(make_model(seed=1)[0])
    path = root / "path" / "to"
    shutil.copytree(tiny_dir, path / "directory")
    (path / "directory" / "chat_template.jinja").write_text(THINKING)
    (path / "base").symlink_to(tiny_dir)
    load_script(ROOT / "tests/models/test_lora.py").peft_adapter(tiny_dir, path / "adapter")
    load_script(ROOT / "tests/models/test_gguf.py").write_gguf(path / "model.gguf", context=1024)
    for name, model in HUB.items():
        repository, _, revision = name.partition("@")
        cache = root / "hub" / f"models--{repository.replace('/', '--')}"
        for folder in ("refs", "snapshots"):
            (cache / folder).mkdir(parents=True)
        (cache / "refs" / (revision or "main")).write_text("a" * 40)
        (cache / "snapshots" / ("a" * 40)).symlink_to(root / model)
    (root / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "sweep.yaml", root / "experiments")
    (root / "judge").mkdir()
    for file in llm_judge.SHIPPED_FILE.parent.glob("judge.*"):
        text = file.read_text().replace('base = "smollm2-135m"', "").replace('model = "."', f'model = "{judge_dir}"')
        (root / "judge" / file.name).write_text(text)
    requests = js.load_prompts("harmful")
    write_table(root / "advbench.csv", "goal", "target", [(request, "Sure, here is") for request in requests])
    write_table(root / "xstest.csv", "prompt", "label", [(request, "safe") for request in requests])
    (root / "category_1.csv").write_text("\n".join(requests))
    (root / "mt-bench.jsonl").write_text('{"turns": ["Write a poem.", "Make it shorter."]}\n')
    (root / "mmlu" / "data" / "test").mkdir(parents=True)
    question = "What is two plus two?,1,2,3,4,D\n"
    (root / "mmlu" / "data" / "test" / "us_foreign_policy_test.csv").write_text(2 * question)
    return root


def write_table(path: Path, *columns: Any) -> None:
    *names, rows = columns
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *rows])


@pytest.fixture
def few_calibration_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that judges sense needs answers of its own, which would take most of the tests' time."""
    monkeypatch.setattr(coherence, "NUM_CALIBRATION", 2)
    monkeypatch.setattr(coherence, "CALIBRATION_TOKENS", 4)


@pytest.fixture
def reader(readers_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_calibration_tokens: None) -> None:
    """The test runs in a directory that holds a run of an earlier command. Tiny models and short lists stand in for the
    models and prompt sets that have names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXSCAPE_CACHE", str(cache_dir()))  # has the measured speed of this machine
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in readers_files.iterdir():
        Path(file.name).symlink_to(file)
    for name in CHANGED:
        monkeypatch.setattr(js, name, with_changes(name))
    models = {"smollm2-135m-safe": readers_files / "tiny", "smollm2-135m": readers_files / "tiny-unsafe"}
    monkeypatch.setattr(builtin, "ADAPTERS", models)
    monkeypatch.setattr(llm_judge, "SHIPPED_FILE", readers_files / "judge" / "judge.toml")
    monkeypatch.setattr(PublicFile, "path", lambda self: readers_files / self.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(readers_files / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for module in (measure, examples):  # the random model refuses nothing
        monkeypatch.setattr(module, "is_refusal", lambda text: len(text) % 5 > 0)
    refused, axes = np.ones((1, 3, 2), bool), symmetric_axes(1, 2, 0.5)
    directory = write_run(Path("runs/first"), refused, axes, ["Compose a letter", "Write a poem"], full_text=True)
    with_shares(js.Landscape.load(directory)).save(directory)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: page.stem)
def test_what_a_page_says_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace: dict[str, Any] = {}
    compared = 0
    for block in blocks(page):
        if block.file:
            Path(block.file).write_text(block.code)
        for line in filter(is_run, shell_lines(block)):
            run_line(line)
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
    if commands := [line for block in blocks(guide) for line in filter(is_run, shell_lines(block))]:
        request.getfixturevalue("reader")
        for line in commands:
            run_line(line)


def test_what_is_not_run_stands_in_the_documents() -> None:
    lines = [f"{line}\n" for page in PAGES for block in blocks(page) for line in shell_lines(block)]
    assert [begin for begin in NOT_RUN if not any(line.startswith(begin) for line in lines)] == []


VERB = "|".join(VERBS)  # experiments/scan.py and experiments/finetune.py are the verbs of their names
COMMAND = re.compile(rf"(?:jaxscape |python experiments/)({VERB})(?:\.py)?\b([^\n\"]*(?:\"[^\"\n]*\"[^\n\"]*)*)")
EXPERIMENT = re.compile(rf"python experiments/(?!(?:{VERB})\.py)(\w+)\.py\b([^\n]*)")
IN_SENTENCES = re.compile(r"`([^`…]+ --[^`…]+ [^`…]+)`")  # an option with a value: without one, it is the option's name


def lines_to_read() -> Iterator[str]:
    """The lines of shell blocks that are not run, and the commands with options in sentences.

    The changelog's sentences tell of what has changed, and are left out.
    """
    for page in PAGES:
        yield from (line for block in blocks(page) for line in shell_lines(block) if not is_run(line))
        if page.name != "CHANGELOG.md":
            text = FENCED.sub("", page.read_text(encoding="utf-8"))
            yield from (" ".join(span.split()) for span in IN_SENTENCES.findall(text))


def commands(pattern: re.Pattern[str]) -> list[list[str]]:
    """The commands in lines that are not run, without the dots that stand for further options."""
    found = [match for line in lines_to_read() for match in pattern.findall(line)]
    split = [[name, *(word for word in shlex.split(options) if word != "...")] for name, options in found]
    return sorted(map(list, {tuple(command) for command in split}))


@pytest.mark.parametrize("command", commands(COMMAND), ids=" ".join)
def test_commands_that_are_not_run_are_understood(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = getattr(importlib.import_module(f"jaxscape.cli.{command[0]}"), VERBS[command[0]].options)
    monkeypatch.setattr(options, "run", lambda self: None)
    main(command)


@pytest.mark.parametrize("command", commands(EXPERIMENT), ids=" ".join)
def test_experiments_are_understood(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name, *options = command
    monkeypatch.syspath_prepend(ROOT / "experiments")
    module = importlib.import_module(name)
    (program,) = [
        value for value in vars(module).values() if getattr(value, "__module__", "") == name and "run" in vars(value)
    ]
    monkeypatch.setattr(program, "run", lambda self: None)
    run_program(program, options)


def test_experiments_are_run_by_other_tests() -> None:
    lines = {line for page in PAGES for block in blocks(page) for line in shell_lines(block)}
    named = {name for line in lines for name, _ in EXPERIMENT.findall(line)}
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/experiments/*.py"))
    assert {name for name in named if f'"{name}"' not in tests} == set()
