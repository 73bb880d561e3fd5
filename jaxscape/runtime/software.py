"""What computes a run: versions of the software, and the kind of device."""

import importlib.metadata
import json
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path

PACKAGE = "jaxscape"
ROOT = Path(__file__).parents[2]
"""The directory of the package: that of the repository, where jaxscape runs from a clone."""


@cache
def software() -> dict[str, str]:
    """The software and the device that compute a run: the versions of `jaxscape` (see `package_version`), `jax` and
    `transformers`; and `device`, the kind of JAX's first device, such as `cpu` or `NVIDIA H100 80GB HBM3`."""
    import jax

    return {
        PACKAGE: package_version(),
        "jax": jax.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "device": jax.devices()[0].device_kind,
    }


@cache
def package_version() -> str:
    """The version of jaxscape, such as `0.1.0`, and its commit where that is known: `0.1.0+0123456789ab`.

    The commit is known in a clone of the repository, where `.changed` at the end says that files differ from it, and
    where pip has installed jaxscape from a repository.
    """
    import jaxscape

    commit = _commit_of_clone() if (ROOT / ".git").exists() else _commit_of_installation()
    return f"{jaxscape.__version__}+{commit}" if commit else jaxscape.__version__


def _commit_of_clone() -> str:
    """The commit of the repository that holds the package; empty if git cannot say."""
    git = ["git", "-C", str(ROOT), "--no-optional-locks"]  # it is not to write to the repository
    command = [*git, "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    with suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
        commits = [line.removeprefix("# branch.oid ")[:12] for line in lines if line.startswith("# branch.oid ")]
        changes = [line for line in lines if not line.startswith("# ")]
        return ".".join([*commits, *(["changed"] if changes else [])])
    return ""


def _commit_of_installation() -> str:
    """The commit that pip installed; empty if it installed no commit."""
    with suppress(importlib.metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        text = importlib.metadata.distribution(PACKAGE).read_text("direct_url.json")
        return str(json.loads(text or "")["vcs_info"]["commit_id"])[:12]
    return ""
