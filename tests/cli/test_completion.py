"""`jaxscape completion`: what a shell completes."""

import contextlib
import os
import pty
import shutil
import subprocess
from pathlib import Path

import pytest

from jaxscape.cli.main import VERBS, main

TRY = """
source "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
"$(complete -p jaxscape | sed 's/.*-F \\([^ ]*\\) .*/\\1/')"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script_of("bash", tmp_path_factory.mktemp("completion") / "jaxscape")


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ([""], set(VERBS)),
        (["sc"], {"scan", "score"}),
        (["scan", "--num-p"], {"--num-prompts", "--num-processes"}),
        (["scan", "--form", "f"], {"factorised"}),
        (["plot", "run", "--fig"], {"--figure"}),
    ],
)
def test_bash_completes_verbs_options_and_values(words: list[str], completed: set[str], bash_script: Path) -> None:
    command = [shutil.which("bash") or "bash", "-c", TRY, "bash", str(bash_script), "jaxscape", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(ended.stdout.split()) - {"-h", "--help"} == completed


def script_of(shell: str, path: Path) -> Path:
    """A file with what `jaxscape completion SHELL` prints."""
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setattr("sys.stdout", file)
        with pytest.raises(SystemExit) as end:
            main(["completion", shell])
    assert end.value.code in (None, 0)
    return path


def installed(shell: str) -> str:
    """The path of a shell; the test is skipped where it is missing."""
    return shutil.which(shell) or pytest.skip(f"{shell} is not installed")


def test_fish_completes_verbs_options_and_values(tmp_path: Path) -> None:
    fish, script = installed("fish"), script_of("fish", tmp_path / "jaxscape.fish")
    words = ["", "sc", "scan --num-p", "scan --form f", "plot run --fig"]
    commands = [f"source {script}", *(f"complete -C 'jaxscape {word}'; echo ." for word in words)]
    environment = os.environ | {"HOME": str(tmp_path), "TERM": "dumb"}
    ended = subprocess.run(
        [fish, "--no-config", "-c", "\n".join(commands)], capture_output=True, text=True, check=True, env=environment
    )
    completed = [
        {line.partition("\t")[0] for line in part.splitlines()} - {"", "-h", "--help"}
        for part in ended.stdout.split(".\n")
    ]
    assert completed[0] >= set(VERBS)
    assert completed[1:5] == [{"scan", "score"}, {"--num-prompts", "--num-processes"}, {"factorised"}, {"--figure"}]


def test_zsh_completes_verbs_options_and_values(tmp_path: Path) -> None:
    """An interactive zsh gets words and the tab key. Its line is printed with what it has made of them."""
    zsh = installed("zsh")
    script_of("zsh", tmp_path / "_jaxscape")
    typed = {"finet": "finetune", "scan --num-prom": "scan --num-prompts", "scan --form f": "scan --form factorised"}
    setup = (
        "PS1= PS2= RPS1=; unsetopt zle_bracketed_paste; fpath=($ZDOTDIR $fpath); autoload -Uz compinit; compinit -uD\n"
    )
    home, print_line = "\x01", "print -r -- completed: "
    keys = setup + "".join(f"jaxscape {words}\t{home}{print_line}\n" for words in typed) + "exit\n"
    ours, theirs = pty.openpty()
    environment = os.environ | {"ZDOTDIR": str(tmp_path), "HOME": str(tmp_path), "TERM": "dumb"}
    shell = subprocess.Popen([zsh, "-f", "-i"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    os.write(ours, keys.encode())
    output = b""
    with contextlib.suppress(OSError):  # the terminal's other end is closed
        while data := os.read(ours, 4096):
            output += data
    shell.wait()
    os.close(ours)
    lines = [line.strip() for line in output.decode().splitlines()]
    for words in typed.values():
        assert f"completed: jaxscape {words}" in lines, output.decode()
