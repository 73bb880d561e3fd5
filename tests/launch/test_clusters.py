"""`launch/slurm.sbatch` on a real SLURM, and `launch/ray_sweep.py` on a real Ray, each set up for these tests only.

A small program stands in for `jaxscape sweep`, and ends in the ways in which that ends. `benchmarks/engines.py` runs
the real program on them.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import load_script

pytestmark = pytest.mark.skipif(
    "JAXSCAPE_TEST_ENGINES" not in os.environ, reason="waits for minutes, and needs SLURM and Ray: .ci/engines runs it"
)

ROOT = Path(__file__).parents[2]
engines = load_script(ROOT / "benchmarks" / "engines.py")

STAND_IN = f"""#!{sys.executable}
import os, signal, sys, time
arguments = sys.argv[sys.argv.index("sweep") + 1:]
folder = arguments[arguments.index("--out") + 1]

def wait_for_sigterm():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    open(folder + "/waits", "w").close()
    time.sleep(300)

if "--list" in arguments:
    print("1  waiting\\n2  waiting\\n3  waiting")
elif "--run" in arguments:
    number = arguments[arguments.index("--run") + 1]
    attempt = len([name for name in os.listdir(folder) if name.startswith("task-" + number)])
    open(f"{{folder}}/task-{{number}}-{{attempt}}", "w").close()
    WHAT_TO_DO
"""


def attempts(folder: Path) -> dict[int, int]:
    """How often each task was started."""
    numbers = [int(path.name.split("-")[1]) for path in folder.glob("task-*")]
    return {number: numbers.count(number) for number in sorted(set(numbers))}


Slurm = Callable[..., str]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Slurm, Path]]:
    """A function that runs a command of SLURM's, and the directory in which its jobs find `jaxscape`."""
    if shutil.which("sbatch") is None:
        pytest.skip("needs SLURM: apt-get install slurm-wlm munge")
    programs = tmp_path_factory.mktemp("programs")
    with engines.local_slurm(programs) as run:
        yield run, programs


def submit(slurm: tuple[Slurm, Path], folder: Path, what_to_do: str, *options: str) -> str:
    """Submit the job array of `launch/slurm.sbatch` with a `jaxscape` that does this; return its number."""
    run, programs = slurm
    program = programs / "jaxscape"
    program.write_text(STAND_IN.replace("WHAT_TO_DO", what_to_do))
    program.chmod(0o755)
    script = ROOT / "launch" / "slurm.sbatch"
    return run("sbatch", "--parsable", f"--output={folder}/%a.log", *options, script, "FILE.yaml", "--out", folder)


def wait(slurm: tuple[Slurm, Path]) -> None:
    """Wait until all jobs have ended."""
    engines.wait_for(lambda: not slurm[0]("squeue", "--noheader"), 180)


def test_slurm_starts_a_task_again_on_exit_code_75_and_on_no_other(slurm: tuple[Slurm, Path], tmp_path: Path) -> None:
    submit(slurm, tmp_path, "sys.exit({'1': 75 if attempt == 0 else 0, '2': 2, '3': 0}[number])", "--array=1-3")
    wait(slurm)
    assert attempts(tmp_path) == {1: 2, 2: 1, 3: 1}


def test_slurm_starts_a_task_again_that_it_has_displaced(slurm: tuple[Slurm, Path], tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "wait_for_sigterm() if attempt == 0 else sys.exit(0)", "--array=1")
    engines.wait_for((tmp_path / "waits").exists, 60)
    slurm[0]("scontrol", "requeue", f"{job}_1")
    wait(slurm)
    assert attempts(tmp_path) == {1: 2}


def test_a_task_that_was_cancelled_stays_so(slurm: tuple[Slurm, Path], tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "wait_for_sigterm()", "--array=1")
    engines.wait_for((tmp_path / "waits").exists, 60)
    slurm[0]("scancel", job)
    wait(slurm)
    assert attempts(tmp_path) == {1: 1}


def test_slurm_stops_a_task_before_its_time_limit_and_starts_it_again(
    slurm: tuple[Slurm, Path], tmp_path: Path
) -> None:
    submit(slurm, tmp_path, "wait_for_sigterm() if attempt == 0 else sys.exit(0)", "--array=1", "--time=2")
    wait(slurm)
    assert attempts(tmp_path) == {1: 2}


def test_ray_starts_a_task_again_on_exit_code_75_and_if_its_worker_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason='needs Ray: pip install "ray[default]"')
    what_to_do = """
    if number == "1" and attempt < 2: sys.exit(75)
    if number == "2": sys.exit(2)
    if number == "3" and attempt == 0:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(5)
        open(f"{folder}/outlived-its-worker", "w").close()
    """
    package = tmp_path / "packages" / "jaxscape"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()  # without it, an installed jaxscape would be found first
    (package / "__main__.py").write_text(STAND_IN.replace("WHAT_TO_DO", what_to_do.strip()))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    folder = tmp_path / "out"
    folder.mkdir()
    with engines.local_ray() as (ray, _):
        command = ("job", "submit", f"--working-dir={ROOT / 'launch'}", "--", "python", "ray_sweep.py", "FILE.yaml")
        with pytest.raises(engines.subprocess.CalledProcessError):  # because task 2 has failed
            ray(*command, "--out", folder)
    assert attempts(folder) == {1: 3, 2: 1, 3: 2}
    assert not (folder / "outlived-its-worker").exists()
