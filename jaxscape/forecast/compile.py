"""What a run would take on TPUs that are not here: its programs, compiled by the TPU compiler from shapes alone."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxscape.forecast import hlo
from jaxscape.forecast.chips import Chip, ProgramCounts, Slice
from jaxscape.models.shape import ModelShape, model_shape
from jaxscape.runtime.hardware import without_compilation_cache

UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}  # bytes, as the compiler writes them
LATENCY = 2e-6  # seconds that a collective operation takes besides its bytes

# The compiler cannot read its own text of gathers on SparseCores back, which v5p chips would do (libtpu 0.0.52).
READABLE = {
    "xla_tpu_offload_gather_to_sparsecore": "false",
    "xla_tpu_offload_all_supported_gathers_to_sparsecore": "false",
}


@dataclass(frozen=True)
class ProgramCost:
    """A compiled program, on each chip.

    Attributes:
        arguments, temporaries: bytes; what a program returns in the place of an argument is not counted twice.
        flops: floating-point operations of one pass.
        memory_bytes: read from and written to memory in one pass.
        sent_bytes, collectives: to other chips, and in how many operations.
        compiler_seconds: the compiler's own estimate; None where it is unusable (negative).
        seconds: by the roofline: the longer of computing and moving bytes, and then the bytes between chips.
        used: bytes of memory while it runs, with what stands beside it; None if the compiler refused it.
        missing: bytes by which it does not fit; None if it does.
    """

    arguments: int = 0
    temporaries: int = 0
    flops: float = 0.0
    memory_bytes: float = 0.0
    sent_bytes: float = 0.0
    collectives: int = 0
    compiler_seconds: float | None = None
    seconds: float = math.inf
    used: float | None = None
    missing: float | None = None


Programs = dict[str, tuple[Callable[[], Any], Callable[[str], hlo.Traffic]]]
"""By name, a function that lowers a program, and one that counts what its text moves."""


def compile_all(
    shape: ModelShape, programs: Callable[[ModelShape], Programs], where: Slice, quick: bool
) -> dict[str, ProgramCounts]:
    """The counts of each program, compiled; with `quick`, extrapolated from one layer and two."""
    layers = shape.config.num_layers
    if not quick or layers < 3:
        return {name: _once(where, *each) for name, each in programs(shape).items()}
    one, two = (
        compile_all(model_shape(replace(shape.config, num_layers=n), shape.mesh, shape.dtype), programs, where, False)
        for n in (1, 2)
    )
    return {name: _extrapolated(one[name], two[name], layers) for name in one}


def _extrapolated(one: ProgramCounts, two: ProgramCounts, layers: int) -> ProgramCounts:
    failed = next((counts for counts in (one, two) if counts.missing is not None), None)
    if failed is not None:
        return failed
    unusable = min(one.compiler_seconds, two.compiler_seconds) <= 0
    # One layer's cache may stay on the chip; of all layers no more can than of two.
    kept = two.kept
    one, two = (each._replace(memory_bytes=each.memory_bytes + each.kept) for each in (one, two))
    found = ProgramCounts(*(max(b, a + (layers - 1) * (b - a)) for a, b in zip(one[:-1], two[:-1], strict=True)))
    found = found._replace(memory_bytes=found.memory_bytes - kept, kept=kept)
    return found._replace(compiler_seconds=0.0) if unusable else found


def _once(where: Slice, lower: Callable[[], Any], traffic: Callable[[str], hlo.Traffic]) -> ProgramCounts:
    lowered = lower()
    key = (traffic.__name__, lowered.as_text())
    if key not in where.known:
        where.known[key] = _compiled(lowered, traffic)
    return where.known[key]


def _compiled(lowered: Any, traffic: Callable[[str], hlo.Traffic]) -> ProgramCounts:
    try:
        with without_compilation_cache():
            compiled = lowered.compile(compiler_options=READABLE)
    except jax.errors.JaxRuntimeError as error:
        # It says how much it would take, and then how much there is.
        sizes = [float(size) * UNITS[unit] for size, unit in re.findall(r"\b([\d.]+)([MGT])\b", str(error))[:2]]
        if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error).lower() or len(sizes) < 2:
            raise
        return ProgramCounts(missing=sizes[0] - sizes[1])
    memory, cost, moved = compiled.memory_analysis(), compiled.cost_analysis(), traffic(compiled.as_text())
    return ProgramCounts(
        arguments=memory.argument_size_in_bytes,
        results=max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
        temporaries=memory.temp_size_in_bytes,
        flops=cost["flops"],
        memory_bytes=moved.memory,
        sent_bytes=moved.between,
        collectives=moved.collectives,
        kept=moved.kept,
        compiler_seconds=cost.get("optimal_seconds", 0.0),
    )


def program_cost(counts: ProgramCounts, chip: Chip, beside: int) -> ProgramCost:
    """A program on a chip; `beside` are bytes that stay in memory while it runs."""
    if counts.missing is not None:
        return ProgramCost(missing=beside + counts.missing)
    used = counts.arguments + counts.temporaries + counts.results + beside
    seconds = max(counts.flops / chip.flops, counts.memory_bytes / chip.bandwidth)
    return ProgramCost(
        arguments=round(counts.arguments),
        temporaries=round(counts.temporaries),
        flops=counts.flops,
        memory_bytes=counts.memory_bytes,
        sent_bytes=counts.sent_bytes,
        collectives=round(counts.collectives),
        compiler_seconds=counts.compiler_seconds if counts.compiler_seconds > 0 else None,
        seconds=seconds + counts.sent_bytes / chip.links + counts.collectives * LATENCY,
        used=float(used),
        missing=used - chip.memory if used > chip.memory else None,
    )
