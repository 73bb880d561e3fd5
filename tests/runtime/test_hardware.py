"""The compiler options of the package's programs."""

import platform
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxscape.runtime import hardware
from jaxscape.runtime.hardware import COMPILER_OPTIONS, compiler_options, platform_jit


@pytest.fixture
def unknown_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has no options of its own."""
    monkeypatch.setattr(hardware, "_CPUINFO", Path("no-such-file"))


@pytest.fixture
def given_options(monkeypatch: pytest.MonkeyPatch, unknown_cpu: None) -> list[object]:
    """The compiler options that JAX is given, in a list that grows, on a CPU with the options of a GPU."""
    given: list[object] = []
    make = jax.jit

    def record(function: object, compiler_options: object = None, **options: object) -> object:
        given.append(compiler_options)
        return make(function, compiler_options=compiler_options, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(hardware.jax, "jit", record)
    monkeypatch.setitem(COMPILER_OPTIONS, "cpu", COMPILER_OPTIONS["gpu"])
    return given


def test_programs_are_compiled_with_the_options_of_the_platform(
    given_options: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "")

    @platform_jit(static_argnames="times")
    def repeated(x: float, *, times: int) -> float:
        """Several x."""
        return x * times

    assert float(repeated(2.0, times=3)) == 6
    assert float(repeated(3.0, times=3)) == 9
    assert repeated._cache_size() == 1
    assert given_options == [None, COMPILER_OPTIONS["gpu"]]
    assert repeated.__doc__ == "Several x."
    # For other platforms it is lowered without them.
    assert float(repeated.lower(2.0, times=3).compile()(2.0)) == 6


def test_options_that_the_user_sets_are_left_to_the_user(
    given_options: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    double = platform_jit()(lambda x: 2 * x)
    assert float(double(2.0)) == 4
    assert given_options[1] == {
        name: value for name, value in COMPILER_OPTIONS["gpu"].items() if name != "xla_gpu_enable_triton_gemm"
    }
    assert given_options[1]


@pytest.mark.usefixtures("unknown_cpu")
def test_without_options_the_program_is_a_plain_one() -> None:
    double = platform_jit()(lambda x: 2 * x)
    assert float(double(2.0)) == 4
    assert double._jitted is double._plain


CASCADE_LAKE = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 85
model name\t: Intel(R) Xeon(R) Processor @ 2.50GHz

processor\t: 1
vendor_id\t: GenuineIntel
"""
ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (CASCADE_LAKE, {"xla_cpu_prefer_vector_width": 512}),
        (CASCADE_LAKE.replace("85", "143"), {}),
        (CASCADE_LAKE.replace("GenuineIntel", "AuthenticAMD"), {}),
        (ARM, {}),
        (None, {}),
    ],
)
def test_a_kind_of_cpu_has_options_of_its_own(
    cpuinfo: str | None, expected: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XLA accepts the options, and a program computes the same with them. A flag that the user sets takes their
    place."""
    monkeypatch.setattr(hardware, "_CPUINFO", tmp_path / "cpuinfo")
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert compiler_options("cpu") == expected
    assert compiler_options("gpu") == COMPILER_OPTIONS["gpu"]
    x = np.linspace(-1, 1, 1000, dtype=np.float32)
    monkeypatch.setenv("XLA_FLAGS", "")
    tangent = platform_jit()(lambda x: jax.numpy.tanh(x).sum())
    assert float(tangent(x * x)) == pytest.approx(float(np.tanh(x * x).sum()), rel=1e-6)
    assert (tangent._jitted is tangent._plain) == (not expected)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=256")
    own = platform_jit()(lambda x: x)
    assert own._jitted is own._plain


HEAP_WITH_GAPS = """
from pathlib import Path
from jaxscape.runtime.hardware import return_free_memory

def resident() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

parts = [bytes(60_000) for _ in range(6000)]
del parts[:-1]
before = resident()
return_free_memory()
assert before - resident() > 100e6, (before, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to give memory back")
def test_free_memory_between_parts_that_are_used_is_given_back() -> None:
    subprocess.run([sys.executable, "-c", HEAP_WITH_GAPS], check=True)
