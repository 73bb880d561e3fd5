"""Programs compiled for a TPU slice from shapes alone, and the time and memory that they take on each chip."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxscape.forecast import hlo
from jaxscape.forecast.chips import Chip, ProgramCounts, Slice
from jaxscape.models.shape import ModelShape, model_shape
from jaxscape.runtime.hardware import compiling_for_absent_devices

UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}  # bytes, as the compiler's messages abbreviate them
COLLECTIVE_LATENCY = 2e-6  # seconds that a collective takes in addition to sending its bytes

# Gathers are not offloaded to the SparseCores of v5p chips, because the compiler cannot parse its own text of such a
# gather (libtpu 0.0.52).
COMPILER_OPTIONS = {
    "xla_tpu_offload_gather_to_sparsecore": "false",
    "xla_tpu_offload_all_supported_gathers_to_sparsecore": "false",
}


@dataclass(frozen=True)
class ProgramCost:
    """The time and memory that one pass of a compiled program takes on each chip.

    Attributes:
        argument_bytes: size of the arguments, and of the results that reuse their memory.
        temporary_bytes: size of the intermediate buffers.
        flops: floating-point operations.
        hbm_bytes: bytes read from and written to HBM.
        sent_bytes: bytes sent to other chips.
        collectives: number of collective operations.
        compiler_seconds: the compiler's own estimate of the time; None where that is unusable (zero or negative).
        seconds: the roofline estimate of the time: the longer of computing and HBM traffic, plus inter-chip traffic;
            infinite if the compiler refused the program.
        used_bytes: bytes of HBM in use while the program runs, with what stays resident beside it; None if the compiler
            refused the program.
        missing_bytes: bytes of HBM by which the program does not fit; None if it fits.
    """

    argument_bytes: int = 0
    temporary_bytes: int = 0
    flops: float = 0.0
    hbm_bytes: float = 0.0
    sent_bytes: float = 0.0
    collectives: int = 0
    compiler_seconds: float | None = None
    seconds: float = math.inf
    used_bytes: float | None = None
    missing_bytes: float | None = None


CountTraffic = Callable[[str], hlo.Traffic]
"""A function from a compiled program's text to its traffic."""

Programs = dict[str, tuple[Callable[[], Any], CountTraffic]]
"""For each program's name: a function that lowers the program, and one that counts its traffic."""


def compile_all(
    shape: ModelShape, programs: Callable[[ModelShape], Programs], tpu_slice: Slice, quick: bool
) -> dict[str, ProgramCounts]:
    """Compile programs for a slice, and count what each takes, by the program's name.

    Arguments:
        programs: a function from a model's shapes to the programs for it.
        quick: compile the programs for one layer and for two, and extrapolate the counts linearly to all layers.
    """
    num_layers = shape.config.num_layers
    if not quick or num_layers < 3:
        return {name: _cached_counts(tpu_slice, lower, count) for name, (lower, count) in programs(shape).items()}
    one, two = (
        compile_all(
            model_shape(replace(shape.config, num_layers=n), shape.mesh, shape.dtype), programs, tpu_slice, quick=False
        )
        for n in (1, 2)
    )
    return {name: _extrapolate(one[name], two[name], num_layers) for name in one}


def _extrapolate(one: ProgramCounts, two: ProgramCounts, num_layers: int) -> ProgramCounts:
    """The counts for `num_layers` layers, extrapolated from those for one and two; a refused program's as they are."""
    for counts in (one, two):
        if counts.missing_bytes is not None:
            return counts
    is_unusable = min(one.compiler_seconds, two.compiler_seconds) <= 0
    # On-chip memory is assumed to hold no more of all layers' caches than of two layers'. HBM traffic is therefore
    # extrapolated as if nothing stayed on the chip, and what two layers keep there is subtracted once.
    on_chip_bytes = two.on_chip_bytes
    one, two = (counts._replace(hbm_bytes=counts.hbm_bytes + counts.on_chip_bytes) for counts in (one, two))
    total = ProgramCounts(*(max(b, a + (num_layers - 1) * (b - a)) for a, b in zip(one[:-1], two[:-1], strict=True)))
    total = total._replace(hbm_bytes=total.hbm_bytes - on_chip_bytes, on_chip_bytes=on_chip_bytes)
    return total._replace(compiler_seconds=0.0) if is_unusable else total


def _cached_counts(tpu_slice: Slice, lower: Callable[[], Any], count_traffic: CountTraffic) -> ProgramCounts:
    lowered = lower()
    key = (count_traffic.__name__, lowered.as_text())
    if key not in tpu_slice.counts:
        tpu_slice.counts[key] = compile_program(lowered, count_traffic)
    return tpu_slice.counts[key]


def compile_program(lowered: Any, count_traffic: CountTraffic) -> ProgramCounts:
    """Compile a lowered program, and count what it takes: memory, FLOPs and traffic."""
    try:
        with compiling_for_absent_devices():
            compiled = lowered.compile(compiler_options=COMPILER_OPTIONS)
    except jax.errors.JaxRuntimeError as error:
        # The message gives the memory that the program needs, and then the memory that there is.
        sizes = [float(size) * UNITS[unit] for size, unit in re.findall(r"\b([\d.]+)([MGT])\b", str(error))[:2]]
        if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error).lower() or len(sizes) < 2:
            raise
        return ProgramCounts(missing_bytes=sizes[0] - sizes[1])
    memory, cost, traffic = compiled.memory_analysis(), compiled.cost_analysis(), count_traffic(compiled.as_text())
    return ProgramCounts(
        argument_bytes=memory.argument_size_in_bytes,
        result_bytes=max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
        temporary_bytes=memory.temp_size_in_bytes,
        flops=cost["flops"],
        hbm_bytes=traffic.hbm_bytes,
        sent_bytes=traffic.sent_bytes,
        collectives=traffic.collectives,
        on_chip_bytes=traffic.on_chip_bytes,
        compiler_seconds=cost.get("optimal_seconds", 0.0),
    )


def program_cost(counts: ProgramCounts, chip: Chip, resident_bytes: int) -> ProgramCost:
    """The cost of a program on a chip, by the roofline model.

    Arguments:
        resident_bytes: bytes of HBM that stay in use while the program runs and are not among its arguments.
    """
    if counts.missing_bytes is not None:
        return ProgramCost(missing_bytes=resident_bytes + counts.missing_bytes)
    used_bytes = counts.argument_bytes + counts.temporary_bytes + counts.result_bytes + resident_bytes
    seconds = max(counts.flops / chip.flops, counts.hbm_bytes / chip.bandwidth)
    return ProgramCost(
        argument_bytes=round(counts.argument_bytes),
        temporary_bytes=round(counts.temporary_bytes),
        flops=counts.flops,
        hbm_bytes=counts.hbm_bytes,
        sent_bytes=counts.sent_bytes,
        collectives=round(counts.collectives),
        compiler_seconds=counts.compiler_seconds if counts.compiler_seconds > 0 else None,
        seconds=seconds + counts.sent_bytes / chip.link_bandwidth + counts.collectives * COLLECTIVE_LATENCY,
        used_bytes=float(used_bytes),
        missing_bytes=used_bytes - chip.memory if used_bytes > chip.memory else None,
    )
