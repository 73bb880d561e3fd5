"""Environments as people have them: locales, closed pipes, backends, devices and options that the program inherits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import random_landscape

import jaxscape as js
from jaxscape.cli.options import ModelOptions
from jaxscape.forecast.chips import LIBTPU_ENVIRONMENT
from jaxscape.runtime.streams import BROKEN_PIPE

PLATFORM = "JAX_PLATFORMS"


@pytest.fixture(autouse=True)
def _without_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forecasts, in the same process, tell libtpu of a TPU by these variables."""
    for name in LIBTPU_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """A directory with a landscape in it, whose name no ASCII terminal can show."""
    directory = tmp_path / "über"
    random_landscape(1).save(directory)
    return directory


def jaxscape(*arguments: object, shell: str = '"$@"', **environment: str | None) -> subprocess.CompletedProcess[bytes]:
    """The ended program. `shell` is the script that starts it as `"$@"`; None unsets a variable."""
    command = ["bash", "-c", f"set -o pipefail; {shell}", "bash", sys.executable, "-m", "jaxscape"]
    changed = {name: value for name, value in (os.environ | environment).items() if value is not None}
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, env=changed, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_characters_that_the_terminal_lacks_are_replaced(run_directory: Path, encoding: str) -> None:
    ended = jaxscape("plot", run_directory, PYTHONIOENCODING=encoding)
    assert (ended.returncode, ended.stderr) == (0, b"")
    expected = f"{run_directory}/landscape.png\n".encode(encoding, errors="replace")
    assert ended.stdout == expected


def test_errors_are_sentences_in_ascii_too(tmp_path: Path) -> None:
    ended = jaxscape("plot", tmp_path / "fehlt 日本", PYTHONIOENCODING="ascii")
    assert ended.returncode == 2
    assert ended.stderr.startswith(b"jaxscape: ")
    assert b"Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("shell", "buffered"),
    [('"$@" | true', None), ('"$@" | true', "1"), ('"$@" >&-', None), ('"$@" >&- 2>&- <&-', None)],
)
def test_a_finished_run_does_not_mind_that_no_one_reads_it(
    run_directory: Path, shell: str, buffered: str | None
) -> None:
    ended = jaxscape("plot", run_directory, shell=shell, PYTHONUNBUFFERED=buffered)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert (run_directory / "landscape.png").read_bytes().startswith(b"\x89PNG")


def test_closed_streams_leave_no_place_for_messages_in_files(run_directory: Path) -> None:
    """A file that took the number of a closed stream would get what libraries write to that stream."""
    program = "from jaxscape.runtime.streams import safe_streams\nimport os\n"
    program += (
        "with safe_streams():\n    assert all(os.readlink(f'/proc/self/fd/{n}') == '/dev/null' for n in range(3))"
    )
    script = 'exec "$0" -c "$1" >&- 2>&- <&-'
    assert subprocess.run(["bash", "-c", script, sys.executable, program], check=False).returncode == 0


@pytest.mark.parametrize("arguments", [["--help"], ["scan", "--help"]])
def test_help_that_is_not_read_ends_quietly(arguments: list[str]) -> None:
    ended = jaxscape(*arguments, shell='"$@" | true')
    assert ended.returncode in (0, BROKEN_PIPE)
    assert ended.stderr == b""


def test_a_scan_whose_progress_no_one_reads_ends_like_other_programs(tiny_dir: Path, tmp_path: Path) -> None:
    scan = ["scan", "--model", tiny_dir, "--num-prompts", 2, "--steps", 4, "--max-new-tokens", 2, "--out", tmp_path]
    scan += ["--no-shares"]  # their progress is no other
    ended = jaxscape(*scan, shell='"$@" 2>&1 | head -1')
    assert ended.returncode == BROKEN_PIPE
    assert ended.stdout.count(b"\n") == 1
    assert jaxscape(*scan).returncode == 0, "it can be resumed"
    assert js.Landscape.load(tmp_path).complete


@pytest.mark.parametrize(
    "backend", ["module://matplotlib_inline.backend_inline", "module://no.such", "no such", "tkagg"]
)
def test_any_backend_may_be_named(run_directory: Path, backend: str) -> None:
    """Programs that a notebook starts inherit the first of these, and Matplotlib cannot be imported with the third."""
    program = f"""
import sys
from jaxscape.cli.main import main
main(["plot", {str(run_directory)!r}])
import os
assert os.environ["MPLBACKEND"] == {backend!r}
assert "matplotlib.pyplot" not in sys.modules
"""
    environment = os.environ | {"MPLBACKEND": backend}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_the_backend_that_a_notebook_has_chosen_is_kept() -> None:
    program = """
import jaxscape as js
js.plot_landscape
import matplotlib
assert dict.__getitem__(matplotlib.rcParams, "backend") == {!r}
"""
    for program_text in (program.format("svg"), "import matplotlib\nmatplotlib.use('pdf')" + program.format("pdf")):
        subprocess.run([sys.executable, "-c", program_text], env=os.environ | {"MPLBACKEND": "svg"}, check=True)


def test_a_figure_shows_itself_in_a_notebook() -> None:
    assert js.plot_landscape(random_landscape(1))._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (".", "here"),
        ("..", "above"),
        ("./", "here"),
        ("../here/", "here"),
        ("x/..", "here"),
        ("../model.Q4_0.GGUF", "model.Q4_0"),
        ("/", "model"),
        ("meta-llama/Llama-2-7b-chat-hf", "Llama-2-7b-chat-hf"),
        ("org/name@v1", "name@v1"),
        ("org/name@refs/pr/1", "name@refs-pr-1"),
        ("smollm2-135m", "smollm2-135m"),
    ],
)
def test_a_run_is_named_after_its_model(model: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "above" / "here" / "x").mkdir(parents=True)
    (tmp_path / "above" / "model.Q4_0.GGUF").touch()
    monkeypatch.chdir(tmp_path / "above" / "here")
    assert ModelOptions(model).short_name == name


def test_libtpu_says_nothing_where_there_is_no_tpu() -> None:
    pytest.importorskip("libtpu")
    program = """
from jaxscape.runtime.hardware import _may_have_tpu, skip_absent_tpu
assert not _may_have_tpu()
skip_absent_tpu()
import jax
assert jax.default_backend() == "cpu"
"""
    environment = {name: value for name, value in os.environ.items() if name != PLATFORM}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--tpu"], {PLATFORM: None}, "JAX finds no TPU here, but a CPU"),
        (["--gpu"], {PLATFORM: None}, "JAX finds no GPU here, but a CPU"),
        ([], {PLATFORM: "nonsense"}, "JAX cannot start on this machine with JAX_PLATFORMS=nonsense"),
        ([], {"JAX_ENABLE_X64": "1"}, "JAX's option jax_enable_x64 is True, and jaxscape needs False"),
        ([], {"JAX_THREEFRY_PARTITIONABLE": "0"}, "unset JAX_THREEFRY_PARTITIONABLE in the environment"),
    ],
)
def test_what_the_environment_asks_of_jax_and_cannot_be_had_is_one_sentence(
    arguments: list[str], environment: dict[str, str | None], message: str, tiny_dir: Path, tmp_path: Path
) -> None:
    ended = jaxscape("scan", "--model", tiny_dir, "--out", tmp_path / "run", *arguments, **environment)
    assert ended.returncode == 2
    assert ended.stderr.decode().startswith("jaxscape: ")
    assert ended.stderr.count(b"\n") == 1
    assert message in ended.stderr.decode()
    assert not (tmp_path / "run").exists()


def test_files_in_the_current_directory_do_not_replace_pythons_own(tmp_path: Path) -> None:
    for name in ("json.py", "random.py", "jax.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong file')")
    ended = jaxscape("plan", "--help", shell=f'cd "{tmp_path}"; "$@"')
    assert ended.returncode == 0, ended.stderr


def test_help_without_docstrings_and_in_a_narrow_terminal() -> None:
    for environment in ({"PYTHONOPTIMIZE": "2"}, {"COLUMNS": "1"}, {"COLUMNS": "x", "TERM": "dumb"}):
        ended = jaxscape("scan", "--help", **environment)
        assert ended.returncode == 0
        assert b"--num-prompts" in ended.stdout


def test_a_deleted_directory_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    ended = jaxscape("scan", shell=f'cd "{tmp_path}/gone"; rmdir ../gone; "$@"')
    assert (ended.returncode, ended.stderr.count(b"\n")) == (2, 1)
    assert b"The current directory has been deleted" in ended.stderr


def test_a_cache_that_cannot_be_written_is_done_without(tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    program = """
import sys
from jaxscape.runtime.hardware import enable_compilation_cache
enable_compilation_cache()
import jax
assert jax.config.values["jax_compilation_cache_dir"] is None
"""
    environment = os.environ | {"JAXSCAPE_CACHE": str(tmp_path / "file"), "PYTHONWARNINGS": "error"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
