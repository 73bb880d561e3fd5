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
    """The versions of what decides the numbers of a run: `jaxscape` (see `package_version`), `jax` and `transformers`;
    and `device`, the kind of JAX's first device, such as `cpu` or `NVIDIA H100 80GB HBM3`."""
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
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=.changed"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return ""


def _commit_of_installation() -> str:
    """The commit that pip installed; empty if it installed no commit."""
    with suppress(importlib.metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        text = importlib.metadata.distribution(PACKAGE).read_text("direct_url.json")
        return str(json.loads(text or "")["vcs_info"]["commit_id"])[:12]
    return ""
