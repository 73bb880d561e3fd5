"""The file of a sweep: how it expands into scans, and what is wrong with a file, in one sentence."""

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscape.cli.arguments import parse
from jaxscape.cli.main import main
from jaxscape.cli.scan import Scan
from jaxscape.cli.sweep import load_tasks, scan_of, scan_setting
from jaxscape.sweeps.cells import Cell
from jaxscape.sweeps.file import RESERVED, read_sweep

# What a YAML file and a command line can hold: no surrogates, and no NUL.
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60).filter(str.strip)
WORDS = st.sampled_from(["smollm2-135m", "org/model@main", "../model", "random:0", "refusal", "scan", "Tasks", "none"])
NUMBERS = st.integers(0, 1000).map(str)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "model": TEXTS | WORDS,
    "direction": TEXTS | WORDS | st.lists(WORDS, min_size=2, max_size=2),
    "system_prompt": TEXTS | WORDS,
    "seed": NUMBERS,
    "radius": st.floats(-9, 9).map(str),
    "no_shares": st.sampled_from(["true", "false"]),
    "thinking": st.sampled_from(["on", "off", "default"]),
}
MATRICES = st.lists(st.sampled_from(sorted(VALUES)), unique=True, max_size=4).flatmap(
    lambda names: st.fixed_dictionaries(
        {name: st.lists(VALUES[name], min_size=1, max_size=3, unique_by=repr) for name in names}
    )
)


def write(directory: Path, content: Any) -> Path:
    path = directory / "sweep.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False), "utf-8")
    return path


def cells_of(directory: Path, **content: Any) -> tuple[Cell, ...]:
    return read_sweep(write(directory, content), scan_setting).cells


@settings(max_examples=15)  # each value of each matrix is parsed as on a command line
@given(matrix=MATRICES, data=st.data())
def test_a_matrix_has_a_scan_for_each_combination(
    tmp_path_factory: pytest.TempPathFactory, matrix: dict[str, list[Any]], data: st.DataObject
) -> None:
    cells = cells_of(tmp_path_factory.mktemp("sweep"), scan={"steps": 4}, matrix=matrix)
    written = [[value if isinstance(value, list) else [value] for value in values] for values in matrix.values()]
    read = [[list(setting.texts) for setting in cell.varied] for cell in cells]
    assert read == [list(combination) for combination in itertools.product(*written)]
    names = [cell.name for cell in cells]
    assert len({name.lower() for name in (*names, *RESERVED)}) == len(names) + len(RESERVED)
    assert all(re.fullmatch(r"[A-Za-z0-9_@+=][A-Za-z0-9_.@+=-]{0,250}", name) for name in names)
    cell = data.draw(st.sampled_from(cells))
    command = shlex.split(shlex.join(cell.arguments))  # as one would type it
    assert parse(Scan, command, "jaxscape scan", None) == scan_of(cell)


def test_a_directory_keeps_its_name_when_the_matrix_grows(tmp_path: Path) -> None:
    matrix = {"model": ["smollm2-135m", "org/model"], "direction": ["random:0", "to:org/model"], "seed": ["1"]}
    before = [cell.name for cell in cells_of(tmp_path, matrix=matrix)]
    assert before == [
        "smollm2-135m_random-0_seed-1",
        "smollm2-135m_to-org--model_seed-1",
        "org--model_random-0_seed-1",
        "org--model_to-org--model_seed-1",
    ]
    more = {**matrix, "direction": ["refusal", *matrix["direction"]], "seed": ["0", "1"]}
    assert set(before) < {cell.name for cell in cells_of(tmp_path, scan={"steps": "4"}, matrix=more)}


def test_values_are_taken_as_they_are_written(tmp_path: Path) -> None:
    text = "scan: {thinking: on, radius: 0.10, num-prompts: 3}\nmatrix:\n  seed: [007, 1_0]\n  system_prompt: [No, 1.0]"
    cells = read_sweep(write(tmp_path, text), scan_setting).cells
    assert [cell.arguments[:4] for cell in cells] == [
        ("--seed", seed, "--system-prompt", prompt) for seed in ("007", "1_0") for prompt in ("No", "1.0")
    ]
    assert cells[0].arguments[4:] == ("--thinking", "on", "--radius", "0.10", "--num-prompts", "3")


def test_a_scan_in_shards_needs_no_matrix(tmp_path: Path) -> None:
    path = write(tmp_path, "shards: 2\nscan: {steps: 4, direction: [random:0, random:1], full_text: false}")
    assert [task.command for task in load_tasks(path, None)] == [
        f"jaxscape scan --steps 4 --direction random:0 random:1 --shard {i}/2 --out runs/sweep/shards/scan-{i}-of-2"
        for i in (1, 2)
    ]
    assert [str(task.whole.directory) for task in load_tasks(path, Path("elsewhere"))] == ["elsewhere/scan"] * 2


def test_names_of_long_and_unusual_values_end_with_a_checksum(tmp_path: Path) -> None:
    texts = ["You are a helpful assistant.", "You are a helpful assistant!", "x" * 50, f"{'a/' * 30}model", "-", "é"]
    names = [cell.name for cell in cells_of(tmp_path, matrix={"system_prompt": texts, "model": texts})]
    assert all(re.fullmatch(r"system-prompt-.*[0-9a-f]{8}_.*[0-9a-f]{8}", name) for name in names)
    assert sum("_model-" in name for name in names) == len(texts)
    assert sum(name.startswith("system-prompt-You-are-a-helpful-assistant-") for name in names) == 2 * len(texts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- model", "line 1: the file is a list and no mapping"),
        ("model", "line 1: the file is the text 'model' and no mapping"),
        ("", "is empty: the keys of a sweep are out, shards, scan, matrix"),
        ("a: [", "cannot be read as YAML (ParserError"),
        ("a: *b", "cannot be read as YAML (ComposerError"),
        ("out: x\n---\nout: y", "cannot be read as YAML (ComposerError"),
        ("\x00", "cannot be read as YAML"),
        ("- " * 3000, "cannot be read as YAML (RecursionError"),
        ("scan: {}\nmatrx: {}", "line 2: unknown key 'matrx' (did you mean matrix?)"),
        ("scan: {stps: 3}", "line 1: Unknown option stps (did you mean steps or slots?): see jaxscape scan --help."),
        ("scan: {out: x}", "line 1: out is no option for a sweep's scans"),
        ("scan: {shard: 1/2}", "line 1: shard is no option for a sweep's scans"),
        ("scan: {steps: many}", "line 1: jaxscape scan does not take --steps many: see jaxscape scan --help."),
        ("scan: {steps: [2, 4]}", "line 1: jaxscape scan does not take --steps 2 4"),
        ("scan: {dtype: float33}", "line 1: Unknown value of --dtype 'float33' (did you mean float32"),
        ("scan: {full_text: yes}", "line 1: full_text is 'yes': it is a switch, so write true or false"),
        ("scan: {steps: }", "line 1: steps has no value"),
        ("scan: {steps: null}", "line 1: steps has no value"),
        ("scan: {system_prompt: ''}", "line 1: system_prompt has no value"),
        ("scan: {steps: {a: 1}}", "line 1: steps is a mapping"),
        ("scan: {direction: []}", "line 1: direction is an empty list"),
        ("scan:\n  steps: 2\n  steps: 4", "line 3: 'steps' stands twice in scan"),
        ("scan:\n  num-prompts: 2\n  num_prompts: 4", "line 2: scan has an option twice, with - and with _"),
        ("scan: {seed: 1}\nmatrix: {seed: [1, 2]}", "line 1: seed stands in scan and in matrix"),
        ("matrix: {seed: 1}", "line 1: seed of matrix is the text '1': give a list"),
        ("matrix:\n  seed: []", "line 2: seed of matrix is an empty list: give a list"),
        ("matrix: {radius: [0.5, 0.50]}", "line 1: radius of matrix has '0.50' twice"),
        ("matrix: {direction: [[a, [b]]]}", "line 1: direction is a list"),
        ("matrix: &a {seed: *a}", "line 1: seed of matrix is a mapping"),
        ("scan: {seed: &a [*a]}", "line 1: seed is a list"),
        ("{[seed]: 1}", "line 1: a key of the file is a list"),
        ("shards: 0", "line 1: shards is '0': give a number from 1 to 1000"),
        ("shards: two", "line 1: shards is 'two'"),
        ("out: [a]", "line 1: out is a list"),
        (
            "scan: {model: !!python/object/apply:os.system [x]}",
            "line 1: the tag 'tag:yaml.org,2002:python/object/apply:os.system' is",
        ),
        ("scan: {model: !!python/name:os.system x}", "line 1: the tag 'tag:yaml.org,2002:python/name:os.system'"),
        ("scan: {model: !!binary aGVsbG8=}", "line 1: the tag 'tag:yaml.org,2002:binary' is not allowed"),
        ("out: !local x", "line 1: the tag '!local' is not allowed: leave it out"),
        (f"matrix: {{seed: {list(range(101))}, top_k: {list(range(101))}}}", "line 1: the matrix has 10201 scans"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(
    text: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["sweep", str(write(tmp_path, text)), "--list"])
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"jaxscape: The sweep {tmp_path / 'sweep.yaml'}")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "The sweep none.yaml cannot be read as YAML (FileNotFoundError"),
        (["sweep.yaml", "--run", "0"], "There is no task 0: the tasks have the numbers 1 to 1."),
        (["sweep.yaml", "--run", "2"], "There is no task 2"),
        (["sweep.yaml", "--list", "--table"], "Give only one of --list and --table."),
        (["sweep.yaml", "--stats"], "Unknown option --stats (did you mean --status?)"),
    ],
)
def test_what_is_wrong_with_a_command_is_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "scan: {steps: 4}")
    with pytest.raises(SystemExit) as stop:
        main(["sweep", *arguments])
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"jaxscape: {message}")
