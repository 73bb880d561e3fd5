"""`jaxscape doctor`: what it finds, what it advises, and that no probe can make it fail."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import jaxscape
from jaxscape.cli.main import main
from jaxscape.runtime import doctor
from jaxscape.runtime.doctor import Machine, advice, examine, missing_parts, size_text
from jaxscape.runtime.software import package_version

LAPTOP = Machine(backend="cpu", gpus=(), has_tpu=False, installed={"jax": "1"}, environment={})
GPU = replace(LAPTOP, gpus=("NVIDIA T4, 550.54, 15360 MiB, 3 MiB",))
WITH_PLUGIN = replace(GPU, installed={"jax": "1", "jax-cuda12-plugin": "1"})
TPU = replace(LAPTOP, has_tpu=True)
WITH_LIBTPU = replace(TPU, installed={"jax": "1", "libtpu": "1"})


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (GPU, "no plugin for it: run pip install 'jaxscape[cuda]'"),
        (replace(GPU, backend=None), "no plugin for it"),
        (WITH_PLUGIN, "update the GPU's driver"),
        (replace(WITH_PLUGIN, environment={"JAX_PLATFORMS": "cpu"}), "JAX_PLATFORMS=cpu keeps JAX from it"),
        (replace(WITH_PLUGIN, environment={"JAX_PLATFORMS": "cuda"}), "update the GPU's driver"),
        (replace(WITH_PLUGIN, environment={"CUDA_VISIBLE_DEVICES": ""}), "unset CUDA_VISIBLE_DEVICES"),
        (replace(WITH_PLUGIN, environment={"LD_LIBRARY_PATH": "/usr"}), "unset LD_LIBRARY_PATH"),
        (TPU, "no libtpu for it: run pip install 'jaxscape[tpu]'"),
        (WITH_LIBTPU, "another process may hold it"),
        (replace(WITH_LIBTPU, environment={"JAX_PLATFORMS": "cpu"}), "unset JAX_PLATFORMS"),
        (replace(LAPTOP, backend=None), "JAX does not start"),
    ],
)
def test_an_accelerator_that_is_not_used_has_one_sentence_of_advice(machine: Machine, words: str) -> None:
    (sentence,) = advice(machine)
    assert words in sentence


@pytest.mark.parametrize("machine", [LAPTOP, replace(WITH_PLUGIN, backend="gpu"), replace(WITH_LIBTPU, backend="tpu")])
def test_where_all_is_used_there_is_no_advice(machine: Machine) -> None:
    assert advice(machine) == []


def test_extras_name_the_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of an extra of a package that an extra needs: jaxscape[cuda] is jax[cuda12]."""
    requirements = {
        "jaxscape": ["numpy", "jax[cuda12]; extra == 'cuda'", "one>=1; extra == 'a'", "two ; extra == 'a'"],
        "jax": ["jaxlib", "jax-cuda12-plugin[with-cuda]<=1,>=0; extra == 'cuda12'", "libtpu; extra == 'tpu'"],
    }
    installed = {"jax": "1", "two": "1"}

    def version(name: str) -> str:
        if name not in installed:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor.importlib.metadata, "requires", requirements.get)
    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    assert missing_parts(["cuda", "a", "none"]) == {"cuda": ["jax-cuda12-plugin"], "a": ["one"], "none": []}


def executable(directory: Path, name: str, script: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


def test_a_gpu_without_a_plugin_is_seen_and_secrets_are_not_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(tmp_path, "nvidia-smi", 'echo "Tesla T4, 550.54.15, 15360 MiB, 3 MiB"')
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "file").write_bytes(b"x" * 2048)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("JAXSCAPE_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_TOKEN", "hf_secret")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    main(["doctor"])
    out, err = capfd.readouterr()
    assert err == ""
    assert f"  jaxscape          {package_version()} in " in out
    assert "  JAX               cpu: " in out
    assert "  NVIDIA GPU        Tesla T4, 550.54.15" in out
    assert "There is an NVIDIA GPU (Tesla T4, 550.54.15, 15360 MiB, 3 MiB), but JAX " in out
    assert f"  directory         {cache}\n  size              2.0 KiB in 1 files" in out
    assert "hf_secret" not in out
    assert "(hidden)" in out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_no_probe_makes_it_fail(tmp_path: Path) -> None:
    """A JAX that ends its process, a cache that is a file, tools that fail, and no home."""
    (tmp_path / "cache").touch()
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text(
        "import os, sys\nsys.stderr.write('the driver died\\n')\nos._exit(7)\n"
    )
    executable(tmp_path, "nvidia-smi", "exit 9")
    environment = {"PATH": str(tmp_path), "PYTHONPATH": f"{tmp_path}:{Path(jaxscape.__file__).parents[1]}"}
    environment |= {"JAXSCAPE_CACHE": str(tmp_path / "cache" / "in a file")}
    command = [sys.executable, "-m", "jaxscape", "doctor", "--json"]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    found = json.loads(ended.stdout)
    assert list(found) == [*doctor.PROBES, "advice"]
    assert found["devices"]["JAX"] == "does not start (exit code 7): the driver died"
    assert "which cannot be written" in found["cache"]["directory"]
    assert "JAX does not start" in found["advice"]["1"]


def test_a_probe_that_fails_or_hangs_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> doctor.Lines:
        raise RuntimeError("broken")

    monkeypatch.setattr(doctor, "START_JAX", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "TIMEOUT", 0.2)
    monkeypatch.setitem(doctor.PROBES, "host", fails)
    monkeypatch.delenv("JAXSCAPE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fails)
    found = examine()
    assert found["host"] == {"not found out": "RuntimeError: broken"}
    assert found["devices"]["JAX"] == "does not start within 0.2 seconds"
    assert "no home directory" in found["cache"]["not found out"]
    assert found["versions"]["jaxscape"].startswith(jaxscape.__version__)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (5 * 2**30, "5.0 GiB")]
)
def test_sizes(size: int, text: str) -> None:
    assert size_text(size) == text
