"""Evaluators on the command line: in a scan, and by `jaxscape score`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.cli.scan import measure_lines

QUICK = ["--num-prompts", "2", "--steps", "2", "--max-new-tokens", "4", "--cpu"]


@pytest.fixture(scope="module")
def run(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scan") / "run"
    main(["scan", "--model", str(tiny_dir), *QUICK, "--full-text", "--out", str(out)])
    return out


def test_a_scan_and_a_score_say_what_each_evaluator_found(
    tiny_dir: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("I won't\n")
    (tmp_path / "mine.py").write_text("def half(prompts, answers):\n    return [0.5] * len(answers)\n")
    chosen = ["--evaluator", "wei", f"{tmp_path / 'mine.py'}:half", "--keywords", str(tmp_path / "mine.txt")]
    main(["scan", "--model", str(tiny_dir), *QUICK, *chosen, "--out", str(tmp_path / "run")])
    out = capfd.readouterr().out
    for line in (
        "wei: refused 100.0 %, complied 0.0 % over all points; refused 100.0 %, complied 0.0 % at the model itself",
        "mine.py:half: refused 100.0 %",
        "keywords:mine.txt: refused 0.0 %, complied 100.0 % over all points",
        "ASR of the model itself: 0.0 %",
    ):
        assert line in out
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    main(["score", str(run), *chosen])
    assert capfd.readouterr().out.splitlines()[-1] == f"{run / 'landscape.json'}"
    after = {path.name: path.read_bytes() for path in run.iterdir()}
    assert after.keys() - before.keys() == {
        "labels-wei.jsonl",
        "labels-mine.py%3Ahalf.jsonl",
        "labels-keywords%3Amine.txt.jsonl",
    }
    assert {name for name in before if after[name] != before[name]} == {"landscape.json"}
    measures = json.loads(after["landscape.json"])["measures"]
    assert measures == json.loads((tmp_path / "run" / "landscape.json").read_text())["measures"]
    assert js.Landscape.load(run).measures.keys() == measures.keys()
    main(["plot", str(run)])


def test_what_evaluators_said_is_shown_without_control_characters(run: Path) -> None:
    land = js.Landscape.load(run)
    nothing = {key: np.full(land.asr.shape, np.nan) for key in ("refused", "complied")}
    some = {key: np.full(land.asr.shape, 50.0) for key in ("refused", "complied")}
    some["refused"][0, 1] = some["complied"][0, 1] = np.nan
    lines = measure_lines(replace(land, shares={}, measures={"\x1b[2J": some, "none": nothing}, disagreement={}))
    assert lines == [
        "\\x1b[2J: refused 50.0 %, complied 50.0 % over all points; nothing judged at the model itself",
        "none: nothing judged over all points; nothing judged at the model itself",
    ]


def test_the_file_of_phrases_alone_decides_the_asr(tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("I won't\n")
    scan = ["scan", "--model", str(tiny_dir), *QUICK, "--no-shares", "--keywords", str(tmp_path / "mine.txt")]
    main([*scan, "--out", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["evaluator"] == "keywords:mine.txt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluator", "xtest"], "Unknown evaluator 'xtest' (did you mean xstest?): choose keywords, wei"),
        (["--evaluator", "wei", "wei"], "'wei' is given twice"),
        (["--evaluator", "missing.py:f"], "There is no file missing.py"),
        (["--evaluator", "{tmp}/mine.py:missing"], "There is no 'missing' in"),
        (["--evaluator", "{tmp}/mine.py:f"], "failed in"),
        (["--keywords", "{tmp}/empty.txt"], "has no phrases in it"),
        (["--keywords", "{tmp}/missing.txt"], "cannot be read"),
        (["--evaluator", "bad\udcff"], "not valid UTF-8"),
    ],
)
@pytest.mark.parametrize("verb", ["scan", "score"])
def test_bad_evaluators_are_one_sentence_and_nothing_is_written(
    verb: str,
    arguments: list[str],
    message: str,
    tiny_dir: Path,
    run: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "mine.py").write_text("f = 1 / 0\n" if "mine.py:f" in arguments[1] else "f = 1\n")
    start = {
        "scan": ["scan", "--model", str(tiny_dir), *QUICK, "--out", str(tmp_path / "run")],
        "score": ["score", str(run)],
    }
    before: dict[Any, bytes] = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(SystemExit) as stop:
        main([*start[verb], *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments)])
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("jaxscape: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "run").exists()
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_there_must_be_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["score", str(tmp_path)])
    assert "holds no scan that can be used" in capfd.readouterr().err
