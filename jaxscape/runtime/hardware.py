"""What the machine can do: its memory, and how fast it multiplies and reads, measured once and remembered."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxscape.runtime.errors import UserError
from jaxscape.runtime.files import cache_dir, write_whole


@dataclass(frozen=True)
class Roofline:
    """A device's speed with matrices of one dtype (Williams et al., "Roofline", CACM 52, 2009).

    Attributes:
        flops: floating-point operations per second in large products.
        bandwidth: bytes per second at which a product with few rows reads its matrix.
    """

    flops: float
    bandwidth: float


def keep_compiled_programs() -> None:
    """Have JAX keep what it compiles in the cache directory, for the next process, unless it has been told where."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        try:
            jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
        except UserError:  # there is no place to keep them: they are compiled again next time
            return
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@contextmanager
def not_kept() -> Iterator[None]:
    """While it lasts, JAX keeps no program: it could not read back those of a machine that is not here."""
    least = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def free_memory() -> int | None:
    """The bytes that can still be allocated where arrays live, or None if nobody knows."""
    device = jax.local_devices()[0]  # of those of other processes nothing is known
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    free = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        # A container may have less than its machine.
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = [
            line.split()[1] for line in (group / "memory.stat").read_text().splitlines() if "inactive_file" in line
        ]
        free.append(limit - used + int(cached[0]))
    except (OSError, ValueError, LookupError):
        pass  # no Linux, or no limit
    return min(free, default=None)


def roofline(dtype: str) -> Roofline:
    """The first device's, from the cache, or measured in about a second and kept there."""
    device = jax.local_devices()[0]
    key = f"{device.device_kind}, {os.cpu_count() if device.platform == 'cpu' else 1}, {dtype}, jax {jax.__version__}"
    known: dict[str, dict[str, float]] = {}
    path = None
    try:
        path = cache_dir() / "devices.json"
        known = json.loads(path.read_text())
        return Roofline(**known[key])
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # no cache, or a damaged one: it is made anew
    found = measure_roofline(dtype)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps((known if isinstance(known, dict) else {}) | {key: asdict(found)}, indent=1))
        except OSError:
            pass  # a cache that cannot be written saves nothing
    return found


def measure_roofline(dtype: str) -> Roofline:
    """Measure the first device: the best of several products of each kind."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    square = jnp.full((size, size), 0.5, dtype)
    flops = 2 * size**3 / _seconds(_product, square, square)
    # Too large for the caches, so that it has to be read from memory, and for an accelerator's launches to count.
    matrix = jnp.full((16 * size, size // 2), 0.5, dtype)
    rows = jnp.full((2, size // 2), 0.5, dtype)
    return Roofline(flops, matrix.nbytes / _seconds(_product, rows, matrix))


@jax.jit
def _product(x: Float[Array, "rows in"], weight: Float[Array, "out in"]) -> Float[Array, "rows out"]:
    return jnp.einsum("ri,oi->ro", x, weight, precision=jax.lax.Precision.HIGHEST)


def _seconds(function: Callable[..., Array], *arguments: Array, rounds: int = 10) -> float:
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - started)
    return min(times)
