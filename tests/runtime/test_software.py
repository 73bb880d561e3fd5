"""`config.json` records the version and the commit of jaxscape, and lists all software that has worked on the run."""

import json
import subprocess
from pathlib import Path
from typing import Any

import jax
import pytest
import transformers

import jaxscape as js
from jaxscape.landscapes.merge import merge
from jaxscape.runtime import rundir
from jaxscape.runtime import software as versions

PROMPTS = ["Write a poem about geese", "Hi"]
OPTIONS: dict[str, Any] = {"max_new_tokens": 2, "progress": False, "shares": False, "steps": 2}


def git(directory: Path, *arguments: str) -> str:
    person = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    command = ["git", "-C", str(directory), *person, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which the package is looked for, instead of its own."""
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    monkeypatch.setattr(versions, "package_version", versions.package_version.__wrapped__)
    return tmp_path


def test_a_clone_has_its_commit_and_says_whether_files_differ(root: Path) -> None:
    git(root, "init", "--quiet")
    (root / "file.py").write_text("1\n")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "first")
    git(root, "tag", "v7")
    commit = git(root, "rev-parse", "HEAD")[:12]
    assert versions.package_version() == f"{js.__version__}+{commit}"
    (root / "new.txt").write_text("output\n")  # is no part of the program
    assert versions.package_version() == f"{js.__version__}+{commit}"
    (root / "file.py").write_text("2\n")
    index = (root / ".git" / "index").read_bytes()
    assert versions.package_version() == f"{js.__version__}+{commit}.changed"
    (root / "file.py").write_text("1\n")
    assert versions.package_version() == f"{js.__version__}+{commit}"
    assert (root / ".git" / "index").read_bytes() == index, "nothing is written to the repository"


def test_a_repository_that_git_cannot_read_has_the_version_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / ".git").mkdir()
    assert versions.package_version() == js.__version__
    monkeypatch.setenv("PATH", str(root))  # without git
    assert versions.package_version() == js.__version__


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (
            '{"url": "https://example.org/j", "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"}}',
            "+0123456789ab",
        ),
        ('{"url": "file:///somewhere", "dir_info": {"editable": true}}', ""),
        ("damaged", ""),
        (None, ""),
    ],
)
def test_an_installation_has_the_commit_that_pip_installed(
    text: str | None, end: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = root / "jaxscape-0.1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: jaxscape\nVersion: 0.1.0\n")
    if text is not None:
        (package / "direct_url.json").write_text(text)
    monkeypatch.syspath_prepend(root)
    assert versions.package_version() == js.__version__ + end


def test_the_software_of_this_process() -> None:
    found = versions.software()
    assert found["jaxscape"].startswith(js.__version__)
    assert (found["jax"], found["transformers"]) == (jax.__version__, transformers.__version__)
    assert found["device"] == jax.devices()[0].device_kind


def recorded(run: Path) -> Any:
    return json.loads((run / "config.json").read_text())["software"]


def test_a_run_lists_every_version_that_has_met_it(
    tiny: js.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, here = tmp_path / "run", versions.software()
    other = here | {"jaxscape": "0.2.0"}
    js.scan(tiny, [0], prompts=PROMPTS[:1], out=run, **OPTIONS)
    assert recorded(run) == [here]
    before = (run / "config.json").read_bytes()
    js.scan(tiny, [0], prompts=PROMPTS[:1], out=run, **OPTIONS)
    assert (run / "config.json").read_bytes() == before

    monkeypatch.setattr(rundir, "software", lambda: other)
    js.scan(tiny, [0], prompts=PROMPTS[:1], out=run, **OPTIONS)
    assert recorded(run) == [here, other]
    monkeypatch.undo()
    js.scan(tiny, [0], prompts=PROMPTS, out=run, extend=True, **OPTIONS)
    assert recorded(run) == [here, other]
    js.scan(tiny, [0], prompts=PROMPTS, out=run, overwrite=True, **OPTIONS)
    assert recorded(run) == [here]


@pytest.mark.parametrize("was", [None, "0.1.0"])
def test_a_run_of_an_earlier_version_goes_on(was: str | None, tiny: js.Model, tmp_path: Path) -> None:
    js.scan(tiny, [0], prompts=PROMPTS, out=tmp_path, **OPTIONS)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["software"]
    (tmp_path / "config.json").write_text(json.dumps(config if was is None else config | {"software": was}))
    js.scan(tiny, [0], prompts=PROMPTS, out=tmp_path, **OPTIONS)
    assert recorded(tmp_path) == [versions.software()]


def test_shards_of_several_versions_are_merged_and_all_are_listed(
    tiny: js.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, shards = versions.software(), [tmp_path / "1", tmp_path / "2"]
    other = here | {"device": "NVIDIA H100 80GB HBM3"}
    js.scan(tiny, [0], prompts=PROMPTS, out=shards[0], shard="1/2", **OPTIONS)
    monkeypatch.setattr(rundir, "software", lambda: other)
    js.scan(tiny, [0], prompts=PROMPTS, out=shards[1], shard="2/2", **OPTIONS)
    merge(shards[::-1], tmp_path / "whole")
    assert recorded(tmp_path / "whole") == [here, other]
