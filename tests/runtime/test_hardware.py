"""The compiler options of the package's programs."""

import platform
import subprocess
import sys

import jax
import pytest

from jaxscape.runtime import hardware
from jaxscape.runtime.hardware import COMPILER_OPTIONS, platform_jit


@pytest.fixture
def given_options(monkeypatch: pytest.MonkeyPatch) -> list[object]:
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


def test_without_options_the_program_is_a_plain_one() -> None:
    double = platform_jit()(lambda x: 2 * x)
    assert float(double(2.0)) == 4
    assert double._jitted is double._plain


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
