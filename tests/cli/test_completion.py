"""`jaxscape completion`: what a shell completes."""

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
    path = tmp_path_factory.mktemp("completion") / "jaxscape"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setattr("sys.stdout", file)
        with pytest.raises(SystemExit) as end:
            main(["completion", "bash"])
    assert end.value.code in (None, 0)
    return path


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


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_scripts_with_every_verb(shell: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["completion", shell])
    script = capfd.readouterr().out
    assert all(verb in script for verb in VERBS)
    assert "--num-prompts" in script
    if interpreter := shutil.which(shell):
        subprocess.run([interpreter, "-n", "/dev/stdin"], input=script, text=True, check=True)
