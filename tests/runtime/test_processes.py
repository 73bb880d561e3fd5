"""Two processes against one: they compute one run, and end when one of them does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import device_flags
from safetensors.numpy import load_file

import jaxscape as js
from jaxscape.cli.main import main


def free_port() -> int:
    with socket.socket() as connection:
        connection.bind(("localhost", 0))
        return int(connection.getsockname()[1])


# Short, so that the tests need not wait long, and long enough for processes that hardly get a processor.
IMPATIENT = """
from jaxscape.cli.main import main
from jaxscape.runtime import processes
processes.HEARTBEAT_SECONDS = 10
main()
"""


def processes(
    command: list[str],
    environment: list[dict[str, str]] | None = None,
    flags: bool = True,
    program: str = IMPATIENT,
) -> list[subprocess.Popen[str]]:
    """The same command in two processes of four devices each, which soon notice that the other is gone."""
    port = free_port()
    found = []
    for number in range(2):
        env = os.environ | device_flags(4)
        env |= environment[number] if environment else {}
        others = ["--coordinator", f"localhost:{port}", "--num-processes", "2", "--process-id", str(number)]
        found.append(
            subprocess.Popen(
                [sys.executable, "-c", program, *command, *(others if flags else [])],
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    return found


def wait_for_lines(file: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until a running process has written at least `count` lines to a file."""
    for _ in range(2400):
        if file.exists() and file.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.1)
        assert process.poll() is None, process.communicate()


def scan_command(model: Path, out: Path, steps: int = 4) -> list[str]:
    command = ["scan", "--model", str(model), "--num-prompts", "6", "--max-new-tokens", "6", "--steps", str(steps)]
    return [*command, "--form", "materialised", "--out", str(out)]


TWO = ["--mesh", "points=2,model=4"]


def test_two_processes_are_one_run_and_survive_one_of_them(tiny_dir: Path, tmp_path: Path) -> None:
    """One is killed: the other ends within a minute with a sentence, and one process finishes the run, whose files are
    those of an unbroken run."""
    command = [*scan_command(tiny_dir, tmp_path / "two", steps=60), "--no-shares"]
    first, second = processes([*command, *TWO])
    generations = tmp_path / "two" / "generations.jsonl"
    wait_for_lines(generations, 12, first)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    _, error = first.communicate(timeout=60)
    assert first.returncode == 2, error
    assert error.strip().splitlines()[-1].startswith("jaxscape: another process of this run has ended")
    kept = generations.read_bytes()
    assert kept.count(b"\n") >= 12
    main(command)
    assert generations.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    main([*scan_command(tiny_dir, tmp_path / "one", steps=60), "--no-shares"])
    assert generations.read_bytes() == (tmp_path / "one" / "generations.jsonl").read_bytes()


COUNTING = """
import time
from dataclasses import dataclass
from pathlib import Path
import jax
from jaxscape.cli.main import run_program
from jaxscape.cli.options import Group, RunOptions
from jaxscape.runtime.preemption import postponed

@dataclass
class Count:
    devices: Group[RunOptions]

    def run(self) -> None:
        self.devices.start(keep_compiled=False)
        with Path(f"DIRECTORY/{jax.process_index()}").open("w") as file, postponed() as stop_if_asked:
            for number in range(10**6):
                print(number, file=file, flush=True)
                time.sleep(0.05)
                stop_if_asked()

run_program(Count)
"""


def test_sigterm_to_one_process_ends_all_at_the_same_point(tmp_path: Path) -> None:
    first, second = processes([], program=COUNTING.replace("DIRECTORY", str(tmp_path)))
    wait_for_lines(tmp_path / "0", 3, first)
    second.terminate()
    _, error = second.communicate(timeout=60)
    first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (75, 75), error
    counts = [(tmp_path / name).read_text().split() for name in ("0", "1")]
    assert counts[0] == counts[1] == [str(number) for number in range(len(counts[0]))]
    assert "jaxscape: ended by SIGTERM" in error


def test_two_processes_finetune_and_end_when_told(tiny_dir: Path, tmp_path: Path) -> None:
    """One is terminated, and both end; one process finishes the training as one alone would have done all of it."""
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in js.load_chats("safe:22")))
    command = ["finetune", "--model", str(tiny_dir), "--data", str(data), "--epochs", "4", "--batch-size", "4"]
    command += ["--learning-rate", "1e-3", "--out"]
    first, second = processes([*command, str(tmp_path / "two"), *TWO])
    log = tmp_path / "two" / "log.jsonl"
    wait_for_lines(log, 7, first)  # in the second epoch
    second.terminate()
    _, error = second.communicate(timeout=60)
    assert second.returncode == 75, error
    _, error = first.communicate(timeout=60)
    assert first.returncode == 2, error
    assert {path.name for path in (tmp_path / "two" / "checkpoints").iterdir()} >= {"1"}
    main([*command, str(tmp_path / "two")])
    main([*command, str(tmp_path / "one")])
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("two", "one")]
    steps = [[json.loads(line)["step"] for line in log] for log in logs]
    assert steps[0] == steps[1] == list(range(1, 25))
    two, one = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("two", "one"))
    for name, factor in one.items():
        np.testing.assert_allclose(two[name], factor, rtol=1e-3, atol=1e-5)


def test_a_launcher_says_who_takes_part(tiny_dir: Path, tmp_path: Path) -> None:
    """Two processes count themselves by Open MPI's environment; a message of the first ends both."""
    environment = [
        {
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": str(number),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(number),
        }
        for number in range(2)
    ]
    coordinator = ["--coordinator", f"localhost:{free_port()}"]
    running = processes([*scan_command(tiny_dir, tmp_path / "run"), *TWO, *coordinator], environment, flags=False)
    results = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], results
    assert "landscape.png" in results[0][0]
    assert "landscape.png" not in results[1][0]
    assert json.loads((tmp_path / "run" / "landscape.json").read_text())["complete"]
    running = processes([*scan_command(tiny_dir, tmp_path / "run", steps=2), *TWO])
    results = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [2, 2]
    assert "holds a run with another configuration" in results[0][1]


def test_processes_are_described_completely(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = ("--num-processes", "2", "--process-id")
    for flags, message in {
        ("--coordinator", "localhost:1"): "--coordinator, --num-processes and --process-id together",
        ("--coordinator", "localhost:1", *two, "2"): "--process-id 2 is not one of 2 processes",
        ("--coordinator", "localhost", *two, "0"): "Cannot parse the coordinator 'localhost'",
        ("--coordinator", "localhost:99999", *two, "0"): "Cannot parse the coordinator 'localhost:99999'",
        (): "Open MPI does not say where its first process is",
    }.items():
        if not flags:
            monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
        with pytest.raises(SystemExit, match="2"):
            main([*scan_command(tiny_dir, tmp_path / "run"), *flags])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
