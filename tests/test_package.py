"""The wheel, the citation file, and that all agree on the version."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import jaxscape

ROOT = Path(__file__).parents[1]
LARGEST = 20 * 2**20  # bytes of the wheel; PyPI takes 100 MB


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(directory)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (path,) = directory.glob("*.whl")
    assert path.name == f"jaxscape-{jaxscape.__version__}-py3-none-any.whl"
    assert path.stat().st_size < LARGEST
    return zipfile.ZipFile(path)


def test_the_wheel_has_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = {name for name in wheel.namelist() if not name.endswith("/")}
    info = f"jaxscape-{jaxscape.__version__}.dist-info"
    in_package = {name for name in files if name.startswith("jaxscape/")}
    source = {path for path in (ROOT / "jaxscape").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert in_package == {path.relative_to(ROOT).as_posix() for path in source}
    assert all(wheel.read(name) == (ROOT / name).read_bytes() for name in in_package)
    names = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    assert files - in_package == {f"{info}/{name}" for name in names}


def test_the_wheel_installs_the_command_and_requires_what_the_project_says(wheel: zipfile.ZipFile) -> None:
    info = f"jaxscape-{jaxscape.__version__}.dist-info"
    assert "jaxscape = jaxscape.cli.main:main" in wheel.read(f"{info}/entry_points.txt").decode()
    metadata = wheel.read(f"{info}/METADATA").decode()
    required = re.findall(r"^Requires-Dist: ([\w.-]+)(?!.*extra ==)", metadata, re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(required) == sorted(re.match(r"[\w.-]+", text)[0] for text in project["dependencies"])  # type: ignore[index]
    assert "# jaxscape" in metadata, "the README is the description"


def test_all_files_that_name_the_version_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    changes = re.findall(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert [project["version"]] == cited == [jaxscape.__version__]
    assert changes[0] == jaxscape.__version__
