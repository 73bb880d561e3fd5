"""The devices: free memory and measured roofline, and the options and the cache with which JAX compiles for them."""

import ctypes
import gc
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property, update_wrapper
from pathlib import Path
from typing import Any, Generic, NoReturn, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.backend import register_backend_factory
from jaxtyping import Array, Float

from jaxscape.runtime.errors import UserError
from jaxscape.runtime.files import cache_dir, write_whole

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Roofline:
    """The speed of a device in matrix products of one dtype (Williams et al., "Roofline", CACM 52, 2009).

    Attributes:
        flops: floating-point operations per second in large matrix products.
        bandwidth: bytes of the weight matrix read per second in a product with few rows.
    """

    flops: float
    bandwidth: float


_COMMAND_BUFFERS = ("FUSION", "CUBLAS", "CUBLASLT", "CUSTOM_CALL", "CUDNN", "DYNAMIC_SLICE_FUSION")  # XLA's default
CompilerOptions = dict[str, bool | int | str]

COMPILER_OPTIONS: dict[str, CompilerOptions] = {
    "gpu": {
        # XLA tries many Triton kernels for every matrix product, which takes most of the compile time; the products of
        # cuBLAS are as fast.
        "xla_gpu_enable_triton_gemm": False,
        # With loops in command buffers, the GPU runs all steps of a loop without waiting for the host.
        "xla_gpu_enable_command_buffer": ",".join((*_COMMAND_BUFFERS, "WHILE", "CONDITIONAL")),
    },
}
"""XLA's options for the package's programs, by platform."""

CPU_COMPILER_OPTIONS: dict[tuple[str, str, str], CompilerOptions] = {
    # Skylake-SP and Cascade Lake: XLA's own choice is 256 bits, and with 512 a decode step takes 7 % less time.
    ("GenuineIntel", "6", "85"): {"xla_cpu_prefer_vector_width": 512},
}
"""XLA's options for programs on a CPU, by the CPU's vendor, family and model as Linux names them.

The table is fixed, and no machine measures its own. With other options, a scan may give other texts where logits are
tied. A measured choice would depend on what else the machine did at that moment, and so would the texts."""

_CPUINFO = Path("/proc/cpuinfo")


def compiler_options(platform: str) -> CompilerOptions:
    """The options of XLA with which this machine compiles the package's programs for a platform."""
    kind = _cpu_kind(_CPUINFO) if platform == "cpu" else None
    return COMPILER_OPTIONS.get(platform, {}) | (CPU_COMPILER_OPTIONS.get(kind, {}) if kind else {})


@cache
def _cpu_kind(cpuinfo: Path) -> tuple[str, str, str] | None:
    """The CPU's vendor, family and model; None where the system does not tell them. The file is read once, because
    every program of a process asks, and Linux takes long to write it on a machine with many cores."""
    try:
        lines = (line.partition(":") for line in cpuinfo.read_text().partition("\n\n")[0].splitlines())
        said = {name.strip(): value.strip() for name, _, value in lines}
        return said["vendor_id"], said["cpu family"], said["model"]
    except (OSError, ValueError, KeyError):  # this is not Linux, or no x86-64
        return None


class PlatformJit(Generic[P, R]):
    """A function jitted with the `compiler_options` of JAX's default platform, without those that `XLA_FLAGS` sets.

    It can be called and lowered like the result of `jax.jit`. A lowered program has no such options, because it may be
    compiled for another platform.

    Arguments:
        options: the keyword arguments of `jax.jit`.
    """

    def __init__(self, function: Callable[P, R], **options: Any) -> None:
        self._function, self._options = function, options
        self._plain = jax.jit(function, **options)
        update_wrapper(self, function)

    @cached_property
    def _jitted(self) -> Any:
        flags = os.environ.get("XLA_FLAGS", "")
        chosen = compiler_options(jax.default_backend())
        used = {name: value for name, value in chosen.items() if name not in flags}
        return jax.jit(self._function, compiler_options=used, **self._options) if used else self._plain

    def __call__(self, *arguments: P.args, **options: P.kwargs) -> R:
        result: R = self._jitted(*arguments, **options)
        return result

    def lower(self, *arguments: Any, **options: Any) -> jax.stages.Lowered:
        return self._plain.lower(*arguments, **options)

    def _cache_size(self) -> int:
        """The number of compiled programs."""
        size: int = self._jitted._cache_size()
        return size


def platform_jit(**options: Any) -> Callable[[Callable[P, R]], PlatformJit[P, R]]:
    """A decorator that makes a `PlatformJit` with these keyword arguments of `jax.jit`."""
    return lambda function: PlatformJit(function, **options)


# Options of JAX that change what is computed, or with which programs cannot be compiled, and the values that they need.
# Each can also be set by the environment variable of the same name in capitals.
_OPTIONS = {
    "jax_enable_x64": False,
    "jax_threefry_partitionable": True,  # otherwise the same seed gives other random directions
    "jax_numpy_rank_promotion": "allow",
    "jax_numpy_dtype_promotion": "standard",
    "jax_disable_jit": False,
}


def check_jax_options() -> None:
    """Raise a `UserError` if an option of JAX has a value with which jaxscape would compute something else."""
    for name, needed in _OPTIONS.items():
        if (value := jax.config.values[name]) != needed:
            raise UserError(
                f"JAX's option {name} is {value}, and jaxscape needs {needed}: unset {name.upper()} in the "
                f"environment, or set the option in the program."
            )


# Environment variables that say that there is a TPU, or that JAX should look for one.
_TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "TPU_NAME", "JAX_FORCE_TPU_INIT")


def skip_absent_tpu() -> None:
    """Keep JAX from starting a TPU on a machine that shows no sign of one. Must be called before JAX looks for devices.

    `jaxscape plan` needs libtpu for its compiler. Where libtpu is installed, JAX also tries to start a TPU with it,
    and without a TPU libtpu writes warnings and a stack trace to the error stream.
    """
    if not _may_have_tpu():
        register_backend_factory("tpu", _no_tpu, fail_quietly=True)


def _may_have_tpu() -> bool:
    """Whether the machine has devices that a TPU's driver makes, or an environment variable speaks of a TPU, or JAX
    found a TPU when it was imported or was told its platforms by the user."""
    devices = [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]
    return bool(devices) or any(map(os.environ.get, _TPU_VARIABLES)) or bool(jax.config.values["jax_platforms"])


def _no_tpu() -> NoReturn:
    raise RuntimeError("no TPU is attached to this machine")


def enable_compilation_cache() -> None:
    """Let JAX keep compiled programs in the cache directory for later processes, unless the user configured another
    directory."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        try:
            directory = cache_dir() / "compiled"
            directory.mkdir(parents=True, exist_ok=True)
        except (UserError, OSError):  # there is no cache directory: programs are compiled again in the next process
            return
        if not os.access(directory, os.W_OK | os.X_OK):  # JAX would warn about each program
            return
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@contextmanager
def compiling_for_absent_devices() -> Iterator[None]:
    """A context in which programs are compiled for devices that this machine does not have.

    JAX does not write these programs to its cache, because this machine could not load them. `XLA_FLAGS` is hidden,
    because the compiler of another platform ends the process when it meets a flag that it does not know.
    """
    min_seconds = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    flags = os.environ.pop("XLA_FLAGS", None)
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", min_seconds)
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags


def free_memory() -> int | None:
    """The bytes that can still be allocated on the first local device (on a CPU: in the host's memory), or None if
    that is unknown."""
    device = jax.local_devices()[0]  # a process has no statistics of the devices of other processes
    if device.platform == "cpu":
        return _free_host_memory()
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None


def _free_host_memory() -> int | None:
    """The bytes available on the machine, or in the container (cgroup v2) if it has a lower limit."""
    free = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        cgroup = Path("/sys/fs/cgroup")
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
        stats = (cgroup / "memory.stat").read_text().splitlines()
        reclaimable = [int(line.split()[1]) for line in stats if "inactive_file" in line]
        free.append(limit - used + reclaimable[0])
    except (OSError, ValueError, LookupError):
        pass  # this is not Linux, or the container has no limit
    return min(free, default=None)


def return_free_memory() -> None:
    """Give memory that is free in this process back to the machine, where the C library is glibc.

    Tensors of a few megabytes lie in glibc's heap, which keeps what is freed between parts that are still used.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def roofline(dtype: str, keep: bool = True) -> Roofline:
    """The roofline of the first local device. It is read from the cache, or measured in about a second.

    Arguments:
        keep: whether what is measured is written to the cache.
    """
    device = jax.local_devices()[0]
    key = f"{device.device_kind}, {os.cpu_count() if device.platform == 'cpu' else 1}, {dtype}, jax {jax.__version__}"
    rooflines: dict[str, dict[str, float]] = {}
    path = None
    try:
        path = cache_dir() / "devices.json"
        rooflines = json.loads(path.read_text())
        return Roofline(**rooflines[key])
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # there is no cache file, this device is not in it, or it is damaged and will be written again
    measured = measure_roofline(dtype)
    if path is not None and keep:
        others = rooflines if isinstance(rooflines, dict) else {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(others | {key: asdict(measured)}, indent=1))
        except OSError:
            pass  # the next process measures again
    return measured


def measure_roofline(dtype: str) -> Roofline:
    """Measure the roofline of the first device, with the fastest of several large matrix products and the fastest of
    several products with few rows."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    square = jnp.full((size, size), 0.5, dtype)
    flops = 2 * size**3 / _seconds(_product, square, square)
    # This matrix is too large for a CPU's caches, and its product takes much longer than launching a kernel does, so
    # the time is that of reading it from memory.
    matrix = jnp.full((16 * size, size // 2), 0.5, dtype)
    rows = jnp.full((2, size // 2), 0.5, dtype)
    return Roofline(flops, matrix.nbytes / _seconds(_product, rows, matrix))


@platform_jit()
def _product(x: Float[Array, "rows in"], weight: Float[Array, "out in"]) -> Float[Array, "rows out"]:
    return jnp.einsum("ri,oi->ro", x, weight, precision=jax.lax.Precision.HIGHEST)


def _seconds(function: Callable[..., Array], *arguments: Array, rounds: int = 10) -> float:
    """The time of the fastest of `rounds` calls, in seconds, after a first call that compiles the function."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - started)
    return min(times)
