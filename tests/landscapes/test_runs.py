"""The runs that are found below a directory, and `jaxscape runs`."""

import fcntl
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_run

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.directions.path import ADAPTER, CHECKPOINTS, FINETUNING
from jaxscape.evaluate.coherence import COHERENCE
from jaxscape.landscapes import runs
from jaxscape.landscapes.axes import symmetric_axes
from jaxscape.landscapes.decisions import RADIUS
from jaxscape.landscapes.landscape import FILE_NAME, Landscape
from jaxscape.landscapes.measure import MEASURE
from jaxscape.landscapes.measurement import FILE_NAME as MEASURES_FILE
from jaxscape.landscapes.radii import Certificate, Radii, Ray
from jaxscape.landscapes.runs import FoundRun, find_runs
from jaxscape.landscapes.store import SCAN
from jaxscape.runtime import rundir

REFUSED = np.array([[[0, 0], [1, 1], [1, 0]]], bool)  # one direction, three points, two prompts


def scan_run(directory: Path, done: int | None = None, **config: Any) -> Path:
    write_run(directory, REFUSED, symmetric_axes(1, 2, 0.5), done=done, **{"model": "org/model"} | config)
    axes, evaluated = symmetric_axes(1, 2, 0.5), np.arange(3)[None] < (3 if done is None else done)
    Landscape.from_outcomes(axes, REFUSED, np.zeros((1, 3), int), evaluated).save(directory)
    return directory


def write_json(path: Path, **content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def only(directory: Path) -> FoundRun:
    (run,) = find_runs(directory)
    return run


def told(run: FoundRun) -> tuple[str, str, str, str]:
    return run.kind, run.state, run.progress, run.result


def test_kinds_are_recognised_as_those_who_write_them_say() -> None:
    written = {"scan": SCAN, "radius": RADIUS, "measures": MEASURE, "finetuning": FINETUNING}
    assert {name: (kind.marks, kind.state) for name, kind in written.items()} == {
        name: (kind.marks, kind.state) for name, kind in runs.KINDS.items()
    }
    assert (runs.CONFIG, runs.MEASURES_FILE, runs.COHERENCE) == (rundir.CONFIG, MEASURES_FILE, COHERENCE)


def test_a_finished_scan_has_visage_with_its_interval(tmp_path: Path) -> None:
    run = only(scan_run(tmp_path / "a"))
    land = Landscape.load(tmp_path / "a")
    assert land.visage_values is not None
    low, high = land.visage_values["interval"]
    assert told(run) == ("scan", "finished", "3 of 3 points", f"VISAGE {land.visage():.2f} ({low:.2f} to {high:.2f})")
    assert (run.directory, run.model) == (tmp_path / "a", "org/model")


def test_a_scan_that_was_stopped_says_how_far_it_is(tmp_path: Path) -> None:
    scan_run(tmp_path / "a", done=2)
    assert told(only(tmp_path)) == ("scan", "stopped", "2 of 3 points", "")
    (tmp_path / "a" / FILE_NAME).unlink()
    assert told(only(tmp_path)) == ("scan", "stopped", "0 of 3 points", "")


def test_a_run_whose_lock_is_held_is_running(tmp_path: Path) -> None:
    scan_run(tmp_path / "a", done=1)
    with (tmp_path / "a" / SCAN.state).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert only(tmp_path).state == "running"
    assert only(tmp_path).state == "stopped"


def test_listed_and_adaptive_points(tmp_path: Path) -> None:
    land = Landscape.load(scan_run(tmp_path / "a"))
    replace(land, axes=(), points=((0.0,), (1.0,), (2.0,)), visage_values=None, numbers=None).save(tmp_path / "a")
    assert told(only(tmp_path)) == ("scan", "finished", "3 of 3 points", "mean ASR 50.0 %")
    replace(land, filled=np.array([[False, True, False]])).save(tmp_path / "a")
    assert only(tmp_path).progress == "2 of 2 points"
    scan_run(tmp_path / "b", done=1, adaptive="asr")
    assert [run.progress for run in find_runs(tmp_path / "b")] == ["1 points"]


def test_searches_for_radii_and_certificates(tmp_path: Path) -> None:
    config = {"weights": "w", "directions": [1], "threshold": 50.0, "model": "m"}
    write_json(tmp_path / "a" / "config.json", **config)
    assert told(only(tmp_path)) == ("radius", "stopped", "0 rays", "")
    rays = tuple(Ray(f"random:{i}", "positive", 0.1 * i, 0.1 * i + 0.1, (), 3) for i in range(2))
    radii = Radii("asr", 50.0, 0.5, 0.1, 0.0, 2, 3, rays, 10)
    radii.save(tmp_path / "a")
    assert told(only(tmp_path)) == ("radius", "stopped", "2 of 3 rays", "")
    replace(radii, num_rays=2).save(tmp_path / "a")
    assert only(tmp_path).state == "finished"
    assert only(tmp_path).result.startswith("radius 0.1 (")
    write_json(tmp_path / "a" / "config.json", **config, sigma=0.05)
    Certificate("asr", 50.0, 0.05, 2, 40, (False,) * 40, 100, 80).save(tmp_path / "a")
    kind, state, progress, result = told(only(tmp_path))
    assert (kind, state, progress) == ("certificate", "finished", "40 of 40 draws")
    assert result == f"kept with probability at least {0.05 ** (1 / 40):.3f} at 0.05"


def test_measures_of_a_model(tiny: js.Model, tmp_path: Path) -> None:
    js.measure(tiny, [0, 1], ["damage"], harmless=["Hi"], steps=2, out=tmp_path / "a", progress=False)
    assert told(only(tmp_path)) == ("measures", "finished", "6 of 6 points", "damage")
    (tmp_path / "a" / MEASURES_FILE).unlink()
    assert told(only(tmp_path)) == ("measures", "stopped", "0 of 6 points", "")


def test_a_scan_is_finished_when_all_evaluators_have_judged(tiny: js.Model, tmp_path: Path) -> None:
    options: dict[str, Any] = {"prompts": ["Hi"], "steps": 2, "max_new_tokens": 2, "progress": False}
    js.scan(tiny, [0], evaluator=["keywords", "wei"], out=tmp_path / "a", **options)
    assert only(tmp_path).state == "finished"
    path = tmp_path / "a" / FILE_NAME
    content = json.loads(path.read_text())
    content["measures"]["wei"]["complied"][0][2] = None
    path.write_text(json.dumps(content))
    assert told(only(tmp_path)) == ("scan", "stopped", "3 of 3 points", "")


def test_measures_and_finetunings(tmp_path: Path) -> None:
    grid = [{"name": "alpha", "values": [-1, 0, 1]}]
    write_json(tmp_path / "a" / "config.json", weights="w", directions=[[1], [2]], grid=grid, measures={}, model="m")
    assert told(only(tmp_path)) == ("measures", "stopped", "0 of 6 points", "")
    values = {"damage": {"nonfinite": [[0, 0, 1], [0, None, None]]}}
    write_json(tmp_path / "a" / MEASURES_FILE, measures=values, complete=False)
    assert told(only(tmp_path)) == ("measures", "stopped", "4 of 6 points", "")

    run = tmp_path / "b"
    write_json(run / "config.json", weights="w", chats="c", learning_rate=0.1, epochs=5, model="m")
    assert told(only(run)) == ("finetuning", "stopped", "0 of 5 epochs", "")
    for name in ("1", "2", "3.tmp"):
        (run / CHECKPOINTS / name).mkdir(parents=True)
    assert told(only(run)) == ("finetuning", "stopped", "2 of 5 epochs", "")
    (run / CHECKPOINTS / "5").mkdir()
    (run / ADAPTER).mkdir()
    (run / FINETUNING.state).write_text('{"loss": 2.0}\n{"loss": 0.25}\n{"validation_loss": 3}\n{"loss": 0.')
    assert told(only(run)) == ("finetuning", "finished", "5 of 5 epochs", "loss 0.25")


def test_the_newest_run_comes_first_and_other_directories_are_passed_by(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "deep/in/there", "old")):
        scan_run(tmp_path / name)
        for file in ("config.json", SCAN.state):
            os.utime(tmp_path / name / file, (10_000 - age, 10_000 - age))
    scan_run(tmp_path / ".hidden")
    scan_run(tmp_path / "new" / "inside a run")
    write_json(tmp_path / "model" / "config.json", model_type="llama")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[1]")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [run.directory.relative_to(tmp_path).as_posix() for run in find_runs(tmp_path)] == [
        "new",
        "deep/in/there",
        "old",
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"axes": 3}', "\0", "[" * 100_000, '{"asr": [[null, "x"]]}'])
@pytest.mark.parametrize("file", ["config.json", FILE_NAME])
def test_a_damaged_run_is_listed_beside_the_others(file: str, text: str, tmp_path: Path) -> None:
    scan_run(tmp_path / "good")
    scan_run(tmp_path / "damaged")
    (tmp_path / "damaged" / file).write_text(text)
    found = {run.directory.name: run for run in find_runs(tmp_path)}
    assert found["good"].state == "finished"
    if not (file == "config.json" and text.startswith('{"a')):  # that is the configuration of something else
        assert found["damaged"].state == "damaged"
        assert found["damaged"].result


def test_the_verb_prints_a_table_or_json(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["runs"])
    assert stop.value.code == 2
    assert "There is no directory runs" in capfd.readouterr().err
    Path("runs").mkdir()
    main(["runs"])
    assert "There is no run in runs" in capfd.readouterr().out
    scan_run(Path("runs/first"))
    scan_run(Path("runs/second\x1b[31m"), done=1, model="x" * 100)
    main(["runs"])
    out = capfd.readouterr().out
    head, *rows = out.splitlines()
    assert head.split() == ["run", "kind", "model", "state", "done", "result", "changed"]
    assert "\x1b" not in out
    columns = {row.split()[0]: row for row in rows}
    assert "finished  3 of 3 points  VISAGE" in columns["runs/first"]
    assert columns["runs/first"][head.index("model") :].startswith("org/model ")
    main(["runs", "--json"])
    first, second = sorted(json.loads(capfd.readouterr().out), key=lambda run: run["directory"])
    assert (first["directory"], first["state"]) == ("runs/first", "finished")
    assert (second["model"], second["state"]) == ("x" * 100, "stopped")


def test_runs_are_listed_without_jax(tmp_path: Path) -> None:
    scan_run(tmp_path / "a")
    program = f"""
import sys
from jaxscape.cli.main import main
main(["runs", {str(tmp_path)!r}])
assert "jax" not in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "finished" in ended.stdout
