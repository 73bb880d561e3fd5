"""Sweeps that run: the states of their tasks, failures, shards, tables and reports."""

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.cli.sweep import load_tasks
from jaxscape.sweeps.results import finish_scan
from jaxscape.sweeps.tasks import Status, Task, is_done, note_ending, status_of

SCAN = "num_prompts: 2, steps: 2, max_new_tokens: 4, no_shares: true, cpu: true"
OWN_EVALUATOR = """
import os, signal
def keen(prompts, answers):
    return [0.0 for _ in answers]
def silent(prompts, answers):
    os._exit(137)
def deadly(prompts, answers):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def sweep_file(directory: Path, model: Path, matrix: str, shards: int = 1, scan: str = SCAN) -> Path:
    path = directory / "sweep.yaml"
    text = f"out: {directory / 'out'}\nshards: {shards}\nscan: {{model: {model}, {scan}}}\nmatrix: {{{matrix}}}\n"
    path.write_text(text, "utf-8")
    return path


def states(path: Path) -> list[str]:
    return [status_of(task).state for task in load_tasks(path, None)]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_a_task_runs_once_and_the_table_has_its_numbers(
    tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = sweep_file(tmp_path, tiny_dir, "seed: [0, 1]")
    main(["sweep", str(path), "--run", "2"])
    assert states(path) == ["waiting", "done"]
    assert "VISAGE: " in capfd.readouterr().out
    run = tmp_path / "out" / "seed-1"
    before = {file: file.stat().st_mtime_ns for file in run.iterdir()}
    main(["sweep", str(path), "--run", "2"])
    assert {file: file.stat().st_mtime_ns for file in run.iterdir()} == before
    assert capfd.readouterr().out == f"Task 2 is done: {run}\n"

    main(["sweep", str(path), "--list"])
    lines = capfd.readouterr().out.splitlines()
    command = (
        f"jaxscape scan --seed 1 --model {tiny_dir} --num-prompts 2 --steps 2 --max-new-tokens 4 --no-shares --cpu"
    )
    assert len(lines) == 2
    assert lines[1].split() == ["2", "done", str(run), *command.split(), "--out", str(run)]

    main(["sweep", str(path), "--table"])
    out = capfd.readouterr().out
    head, _, waiting, done = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert out.startswith(f"{head}\n")
    assert head.startswith("| scan | seed | state | num\\_prompts | num\\_directions | ASR of the model (%) | VISAGE |")
    assert waiting.startswith("| seed-0 | 0 | waiting |  |")
    assert done.startswith("| seed-1 | 1 | done | 2 | 1 | ")
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    land = js.Landscape.load(run)
    assert land.visage_values is not None
    assert [row["state"] for row in rows] == ["waiting", "done"]
    assert [float(rows[1][f"visage{end}"]) for end in ("", "_low", "_high")] == [
        land.visage_values["paper"],
        *land.visage_values["interval"],
    ]
    assert [float(rows[1][f"asr{end}"]) for end in ("", "_low", "_high")] == [
        rates[0, 1] for rates in (land.asr, land.asr_low, land.asr_high)
    ]
    assert "seed-1" in (tmp_path / "out" / "report.html").read_text()


def test_a_failure_is_written_down_until_the_task_is_done(
    tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = sweep_file(tmp_path, tiny_dir, "evaluator: [keywords, nobody]")
    with pytest.raises(SystemExit) as stop:
        main(["sweep", str(path), "--run", "2"])
    assert stop.value.code == 2
    assert capfd.readouterr().err.startswith("jaxscape: Unknown evaluator 'nobody'")
    main(["sweep", str(path), "--status"])
    first, second, last = capfd.readouterr().out.splitlines()
    assert first.split() == ["1", "waiting", str(tmp_path / "out" / "keywords")]
    assert second.split()[:2] == ["2", "failed"]
    assert "Unknown evaluator 'nobody'" in second
    assert last == "2 tasks: 1 waiting, 1 failed. Of those that have begun, 0 of 0 points are done."


def test_a_task_that_crashes_does_not_stop_the_others(
    tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(OWN_EVALUATOR)
    names = [str(tmp_path / f"own.py:{name}") for name in ("deadly", "silent", "keen")]
    path = sweep_file(tmp_path, tiny_dir, f"evaluator: {json.dumps(names)}")
    with pytest.raises(SystemExit) as stop:
        main(["sweep", str(path)])  # each task in a process of its own
    assert stop.value.code == 1
    assert states(path) == ["failed", "failed", "done"]
    assert capfd.readouterr().out.endswith(
        "Task 1 failed: Its process was ended by a signal (Killed); is the memory full?\n"
        "Task 2 failed: Its process ended with exit code 137.\n"
        "1 of 3 tasks are done, 0 of them before.\n"
    )


def test_a_task_that_runs_in_another_process_is_left_to_it(
    tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = sweep_file(tmp_path, tiny_dir, "seed: [0, 1]")
    first, _ = load_tasks(path, None)
    first.directory.mkdir(parents=True)
    with (first.directory / "generations.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as stop:
            main(["sweep", str(path)])
        assert stop.value.code == 1
        assert states(path) == ["running", "done"]
    out = capfd.readouterr().out
    assert out.endswith("Task 1 is running in another process.\n1 of 2 tasks are done, 0 of them before.\n")


def test_shards_merge_into_the_run_of_one_machine(tiny_dir: Path, tmp_path: Path) -> None:
    path = sweep_file(tmp_path, tiny_dir, "seed: [3]", shards=2)
    first, second = load_tasks(path, None)
    form = ["--form", "factorised"]  # a CPU would choose the other one
    main(["scan", *second.arguments, *form])  # by hand, as by a task that was ended before it could say so
    assert states(path) == ["waiting", "stopped"]
    main(["sweep", str(path), "--run", "1"])  # takes the form of the other shard
    assert states(path) == ["done", "stopped"]
    assert not first.whole.directory.exists()
    main(["sweep", str(path), "--run", "2"])
    assert is_done(first.whole)
    main(["scan", *first.cell.arguments, "--out", str(tmp_path / "whole"), *form])
    assert contents(first.whole.directory) == contents(tmp_path / "whole")
    # Of two processes that merge, the one that comes later finds the run.
    (tmp_path / "out" / "notes" / f"{first.cell.name}.json").unlink()
    finish_scan([first, second])
    assert is_done(first.whole)
    assert contents(first.whole.directory) == contents(tmp_path / "whole")
    # A scan that is there needs no shards.
    fewer = sweep_file(tmp_path, tiny_dir, "seed: [3]", shards=3)
    assert states(fewer) == ["done"] * 3


def test_a_task_whose_options_have_changed_is_not_done(
    tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (task,) = load_tasks(sweep_file(tmp_path, tiny_dir, "seed: [0]"), None)
    main(["sweep", str(tmp_path / "sweep.yaml"), "--run", "1"])
    changed = sweep_file(tmp_path, tiny_dir, "seed: [0]", scan=SCAN.replace("steps: 2", "steps: 4"))
    assert states(changed) == ["stopped"]
    with pytest.raises(SystemExit):
        main(["sweep", str(changed), "--run", "1"])
    assert "holds a run with another configuration (different: axes)" in capfd.readouterr().err
    assert states(changed) == ["failed"]
    assert json.loads((task.directory / "landscape.json").read_text())["complete"]


def test_states_are_read_from_the_disk(tmp_path: Path) -> None:
    (task,) = load_tasks(sweep_file(tmp_path, tmp_path, "seed: [0]"), None)
    assert status_of(task) == Status("waiting")
    note_ending(task, 2, "It is too hot.")
    assert status_of(task) == Status("failed", "It is too hot.")
    task.directory.mkdir()
    (task.directory / "config.json").write_text("{")
    assert status_of(task).state == "failed"
    note_ending(task, 0)
    assert status_of(task).state == "done"
    (tmp_path / "out" / "notes" / "seed-0.json").write_text("{}")
    with pytest.raises(js.UserError, match="is not what jaxscape sweep writes"):
        status_of(task)
    (tmp_path / "out" / "notes" / "seed-0.json").unlink()
    status = status_of(task)
    assert status.state == "stopped"
    assert "is not valid JSON" in status.reason
    with (task.directory / "generations.jsonl").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert status_of(task) == Status("running")


def wait_for(task: Task, process: subprocess.Popen[str]) -> None:
    """Wait until a point of a task is done."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        progress = status_of(task).progress
        if progress is not None and progress.done:
            return
        time.sleep(0.1)


def test_a_sweep_that_gets_sigterm_is_to_be_run_again(tiny_dir: Path, tmp_path: Path) -> None:
    scan = SCAN.replace("steps: 2", "steps: 400")
    path = sweep_file(tmp_path, tiny_dir, "seed: [0, 1]", scan=scan)
    task, other = load_tasks(path, None)
    command = [sys.executable, "-m", "jaxscape", "sweep", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        wait_for(task, process)
        os.kill(process.pid, signal.SIGTERM)
        out = process.communicate(timeout=120)[0]
    assert process.returncode == 75, out
    assert "ended by SIGTERM, with what is finished on disk" in out
    status = status_of(task)
    assert status.state == "stopped"
    assert status.progress is not None
    assert 0 < status.progress.done < 401
    assert status_of(other) == Status("waiting")


def test_a_sweep_at_a_url_is_that_on_a_disk(tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, url = sweep_file(tmp_path, tiny_dir, "seed: [0, 1]", shards=2), f"file://{tmp_path}/store"
    for number in ("1", "2", "2"):
        for out in ([], ["--out", url]):
            main(["sweep", str(path), "--run", number, *out])
    capfd.readouterr()
    main(["sweep", str(path), "--out", url, "--status"])
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["done", "done", "waiting", "waiting"]
    assert f"{url}/shards/seed-0-1-of-2" in lines[0]
    assert contents(tmp_path / "store" / "seed-0") == contents(tmp_path / "out" / "seed-0")
    main(["sweep", str(path), "--out", url, "--table"])
    main(["sweep", str(path), "--table"])
    assert f"\n{url}/table.md\n" in capfd.readouterr().out
    for name in ("table.md", "table.csv", "report.html"):
        assert (tmp_path / "store" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
