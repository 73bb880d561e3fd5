"""What is installed, which devices there are, and what is missing: facts for a bug report, and advice."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jaxscape.runtime.errors import reason
from jaxscape.runtime.files import cache_dir
from jaxscape.runtime.software import PACKAGE, package_version
from jaxscape.runtime.texts import listed

EXTRAS = {
    "cuda": "NVIDIA GPUs",
    "tpu": "TPUs",
    "plan": "jaxscape plan",
    "cloud": "runs at the URLs of object stores",
    "notebooks": "the notebooks",
}
"""What the optional parts of jaxscape are for, by the name of the extra that installs each; others have their name
alone."""
FOR_COMPARISON = ("torch", "peft", "accelerate")  # jaxscape check compares with transformers only where they are
VARIABLES = ("JAX_", "XLA_", "JAXSCAPE_", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "TPU_", "HF_HOME", "HF_HUB_")
"""Beginnings of the names of environment variables that change what jaxscape does."""
SECRET = re.compile("token|key|secret|password", re.IGNORECASE)  # in a name: the value is not shown
START_JAX = """
import json
from jaxscape.runtime.hardware import free_memory, skip_absent_tpu
skip_absent_tpu()
import jax
devices = [device.device_kind for device in jax.devices()]
print(json.dumps({"backend": jax.default_backend(), "devices": devices, "free": free_memory()}))
"""
TIMEOUT = 120.0  # seconds; the first start on a GPU or a TPU pod takes some

Lines = dict[str, str]
"""What a probe found: texts by their headings."""


@dataclass(frozen=True)
class Machine:
    """What advice follows from.

    Attributes:
        backend: the platform that JAX starts on, `cpu`, `gpu` or `tpu`; None if it does not start.
        gpus: the NVIDIA GPUs that their driver shows.
        has_tpu: whether there are devices that a TPU's driver makes.
        installed: the versions of the installed packages, by name.
        environment: the environment variables.
    """

    backend: str | None
    gpus: tuple[str, ...]
    has_tpu: bool
    installed: Mapping[str, str]
    environment: Mapping[str, str]


def examine() -> dict[str, Lines]:
    """All facts by their sections, and at the end `advice`. No probe can fail: it says what went wrong instead, and
    nothing is downloaded, no model is loaded and no file is written."""
    found: dict[str, Lines] = {}
    for section, probe in PROBES.items():
        found[section] = _safely(probe)
    found["advice"] = _safely(lambda: _numbered(advice(_machine(found["devices"]))))
    return found


def advice(machine: Machine) -> list[str]:
    """What to do so that jaxscape uses the devices that the machine has."""
    sentences = []
    chosen = machine.environment.get("JAX_PLATFORMS", "")
    if machine.gpus and machine.backend not in ("gpu", "tpu"):
        sentences.append(_gpu_advice(machine, chosen))
    if machine.has_tpu and machine.backend != "tpu":
        if "libtpu" not in machine.installed:
            sentences.append("There is a TPU, but JAX has no libtpu for it: run pip install 'jaxscape[tpu]'.")
        elif chosen and "tpu" not in chosen:
            sentences.append(f"There is a TPU, but JAX_PLATFORMS={chosen} keeps JAX from it: unset JAX_PLATFORMS.")
        else:
            sentences.append("There is a TPU, but JAX does not start on it: another process may hold it.")
    if machine.backend is None and not sentences:
        sentences.append("JAX does not start; see the error under devices.")
    return sentences


def _gpu_advice(machine: Machine, chosen: str) -> str:
    """Why JAX does not use the NVIDIA GPU that is there, and what to do."""
    plugins = [name for name in machine.installed if name.startswith("jax-cuda") and name.endswith("-plugin")]
    there_is = f"There is an NVIDIA GPU ({machine.gpus[0]}), but"
    if not plugins:
        return f"{there_is} JAX has no plugin for it: run pip install 'jaxscape[cuda]'."
    if chosen and not {"cuda", "gpu"} & set(chosen.split(",")):
        return f"{there_is} JAX_PLATFORMS={chosen} keeps JAX from it: unset JAX_PLATFORMS."
    if machine.environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return f"{there_is} CUDA_VISIBLE_DEVICES hides it: unset CUDA_VISIBLE_DEVICES."
    if "LD_LIBRARY_PATH" in machine.environment:
        return f"{there_is} JAX does not start on it: unset LD_LIBRARY_PATH, by which it may find another CUDA."
    return f"{there_is} JAX does not start on it: update the GPU's driver, and run pip install -U 'jaxscape[cuda]'."


def missing_parts(extras: Collection[str]) -> dict[str, list[str]]:
    """The packages that are not installed of each extra of jaxscape, by the extra's name."""
    return {extra: list(dict.fromkeys(_missing(PACKAGE, frozenset({extra})))) for extra in extras}


def _missing(package: str, extras: frozenset[str]) -> Iterator[str]:
    """The packages that the extras of an installed package need and that are not installed."""
    for text in importlib.metadata.requires(package) or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or not any(marker.evaluate({"extra": extra}) for extra in extras) or marker.evaluate():
            continue
        try:
            importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield requirement.name
        else:
            yield from _missing(requirement.name, frozenset(requirement.extras)) if requirement.extras else ()


def _versions() -> Lines:
    import jaxscape

    lines = {
        PACKAGE: f"{package_version()} in {Path(jaxscape.__file__).parent}",
        "Python": f"{platform.python_version()} at {sys.executable}",
        "system": f"{platform.platform()}{_distribution()}",
    }
    names = [Requirement(text).name for text in _base_requirements()] or ["jax"]
    installed = _installed()
    plugins = [name for name in installed if name.startswith(("jax-", "libtpu"))]
    for name in dict.fromkeys([*names, "jaxlib", *plugins, *FOR_COMPARISON]):
        lines[name] = installed.get(canonicalize_name(name), "not installed")
    return lines


def _base_requirements() -> list[str]:
    """What jaxscape requires without any extra; nothing if it runs without being installed."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return [text for text in importlib.metadata.requires(PACKAGE) or () if "extra ==" not in text]
    return []


def _distribution() -> str:
    with suppress(OSError):
        return f", {platform.freedesktop_os_release().get('PRETTY_NAME', '')}"
    return ""


def _devices() -> Lines:
    """What JAX starts on, found in another process, which may crash or hang; and what the machine has."""
    lines = {"JAX": "", "NVIDIA GPU": listed(_gpus()) or "none", "TPU": "present" if _has_tpu() else "none"}
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # a run may be using the GPU
    command = [sys.executable, "-P", "-c", START_JAX]  # no file of the current directory takes the place of a module
    try:
        child = _output(command, TIMEOUT, environment)
        found = json.loads(child.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        lines["JAX"] = f"does not start within {TIMEOUT:g} seconds"
    except (IndexError, ValueError):
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        lines["JAX"] = f"does not start (exit code {child.returncode}): {last[:300]}"
    else:
        kinds = found["devices"]
        lines["JAX"] = f"{found['backend']}: {len(kinds)} x {kinds[0]}"
        if found["backend"] != "cpu":  # whose memory is the host's
            lines["free memory"] = "unknown" if found["free"] is None else size_text(found["free"])
    return lines


def _gpus() -> list[str]:
    """The NVIDIA GPUs with their driver and memory, as nvidia-smi shows them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader"]
    try:
        child = _output(query, 30.0, os.environ)
        child.check_returncode()
    except (OSError, subprocess.SubprocessError):
        return ["present, but nvidia-smi does not run"] if any(Path("/dev").glob("nvidia[0-9]*")) else []
    return [line.strip() for line in child.stdout.splitlines() if line.strip()]


def _output(command: list[str], timeout: float, environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """A finished process, with what it wrote."""
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment, timeout=timeout, check=False
    )


def _has_tpu() -> bool:
    """Whether there are devices that a TPU's driver makes. Those of newer TPUs are VFIO's, which other hardware has as
    well, so that there must be a PCI device of Google's too."""
    if any(Path("/dev").glob("accel[0-9]*")):
        return True
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(Path("/dev").glob("vfio/[0-9]*")) and any("0x1ae0" in vendor.read_text() for vendor in vendors)


def _host() -> Lines:
    lines = {"CPU cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"}
    values = {}
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            values[name] = 1024 * int(value.split()[0])
    if "MemTotal" in values:
        lines["memory"] = f"{size_text(values['MemAvailable'])} of {size_text(values['MemTotal'])} available"
    return lines


def _cache() -> Lines:
    directory = cache_dir()
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    can_write = os.access(existing, os.W_OK | os.X_OK)
    return {
        "directory": f"{directory}{'' if can_write else ', which cannot be written: set JAXSCAPE_CACHE'}",
        "size": _size(directory),
        "free disk": size_text(shutil.disk_usage(existing).free),
    }


def _size(directory: Path) -> str:
    """How much the files in a directory take; what cannot be read, or goes away meanwhile, is left out."""
    count, total = 0, 0
    for path, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):
                total += (Path(path) / name).lstat().st_size
                count += 1
    return f"{size_text(total)} in {count} files"


def _parts() -> Lines:
    extras = importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    lines = {}
    for extra, missing in missing_parts([extra for extra in extras if extra != "test"]).items():
        use = f" ({EXTRAS[extra]})" if extra in EXTRAS else ""
        lines[extra] = f"missing: {listed(missing)}; pip install 'jaxscape[{extra}]'{use}" if missing else "installed"
    absent = [name for name in FOR_COMPARISON if name not in _installed()]
    if absent:
        lines["check"] = f"compares less with transformers without {listed(absent)}; pip install {' '.join(absent)}"
    return lines


def _environment() -> Lines:
    chosen = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    return {name: "(hidden)" if SECRET.search(name) else value for name, value in chosen.items()} or {"": "nothing set"}


PROBES: dict[str, Callable[[], Lines]] = {
    "versions": _versions,
    "devices": _devices,
    "host": _host,
    "cache": _cache,
    "optional parts": _parts,
    "environment": _environment,
}


def _safely(probe: Callable[[], Lines]) -> Lines:
    try:
        return probe()
    except Exception as error:  # a report without one section is better than none
        return {"not found out": reason(error)}


def _machine(devices: Lines) -> Machine:
    backend = devices.get("JAX", "").partition(":")[0]
    return Machine(
        backend=backend if backend in ("cpu", "gpu", "tpu") else None,
        gpus=tuple(_gpus()),
        has_tpu=_has_tpu(),
        installed=_installed(),
        environment=os.environ,
    )


def _installed() -> dict[str, str]:
    """The versions of all installed packages, by their normalised names."""
    found: dict[str, Any] = {}
    for distribution in importlib.metadata.distributions():
        with suppress(Exception):  # a damaged package has no name or no version
            found.setdefault(canonicalize_name(distribution.metadata["Name"]), distribution.version)
    return found


def _numbered(sentences: list[str]) -> Lines:
    return {str(number): sentence for number, sentence in enumerate(sentences, 1)} or {"": "nothing to do"}


def size_text(size: int) -> str:
    """A number of bytes in a unit that a person reads."""
    for unit, length in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= length:
            return f"{size / length:.1f} {unit}"
    return f"{size} bytes"
