"""TPU chips and slices, which this machine need not have, and how a model is sharded over a slice."""

import importlib.util
import math
import os
import re
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from jaxscape.models.config import ModelConfig
from jaxscape.models.shape import ModelShape, model_shape
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.hardware import compiling_for_absent_devices
from jaxscape.runtime.sharding import MeshShape, default_mesh_shape, make_mesh

# Without these, libtpu would look for a TPU on this machine and lock it against other processes.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Chip:
    """A kind of TPU chip, with the numbers of Google's documentation.

    Attributes:
        flops: bfloat16 floating-point operations per second.
        memory: bytes of HBM that programs can use.
        bandwidth: bytes per second between HBM and the chip.
        link_bandwidth: bytes per second that a chip sends to its two neighbours in a ring.
    """

    flops: float
    memory: float
    bandwidth: float
    link_bandwidth: float


CHIPS = {
    "v4": Chip(275e12, 30.75 * 2**30, 1228e9, 90e9),
    "v5e": Chip(197e12, 15.75 * 2**30, 819e9, 90e9),
    "v5p": Chip(459e12, 94.75 * 2**30, 2765e9, 180e9),
    "v6e": Chip(918e12, 31.25 * 2**30, 1640e9, 180e9),
}


class ProgramCounts(NamedTuple):
    """What one pass of a compiled program takes on each chip.

    Attributes:
        argument_bytes: size of the arguments.
        result_bytes: size of the results that do not reuse the memory of an argument.
        temporary_bytes: size of the intermediate buffers.
        flops: floating-point operations.
        hbm_bytes: bytes read from and written to HBM.
        sent_bytes: bytes sent to other chips.
        collectives: number of collective operations.
        on_chip_bytes: size of the loop-carried buffers that stay on the chip, outside HBM.
        compiler_seconds: the compiler's own estimate of the time; zero or negative where it has none.
        missing_bytes: bytes of HBM by which the program is too large, if the compiler refused it for that; else None.
            The other counts of a refused program are 0.
    """

    argument_bytes: float = 0.0
    result_bytes: float = 0.0
    temporary_bytes: float = 0.0
    flops: float = 0.0
    hbm_bytes: float = 0.0
    sent_bytes: float = 0.0
    collectives: float = 0.0
    on_chip_bytes: float = 0.0
    compiler_seconds: float = 0.0
    missing_bytes: float | None = None


@dataclass(frozen=True)
class Slice:
    """A TPU slice that programs can be compiled for. It need not exist.

    Attributes:
        name: a kind of chip and the slice's shape, for example v5e:2x4.
        devices: the abstract devices of the slice.
        counts: a cache of the counts of programs that were compiled for the slice. A key is the name of the function
            that counted the traffic, and the program's text.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    counts: dict[tuple[str, str], ProgramCounts] = field(default_factory=dict, repr=False, compare=False)


@cache
def open_slice(name: str) -> Slice:
    """The slice of this name.

    Arguments:
        name: for example v5e:2x4, or v5p:2x2x1.

    Raises:
        UserError: there is no such slice, or the TPU compiler is not installed.
    """
    kind = name.partition(":")[0]
    if kind not in CHIPS or not re.fullmatch(r"\w+:\d+x\d+(x\d+)?", name):
        raise UserError(
            f"Cannot parse the topology {name!r}: write a kind ({', '.join(CHIPS)}) and a shape, as in v5e:2x4."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("Planning needs the TPU compiler: run pip install libtpu, which works on any Linux machine.")
    for variable, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        with compiling_for_absent_devices():
            topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # the compiler's plugin raises several types
        raise UserError(
            f"The TPU compiler has no topology {name!r}: choose another shape ({reason(error)})."
        ) from error
    return Slice(name, CHIPS[kind], tuple(topology.devices))


def chip_for_dtype(tpu_slice: Slice, dtype: str) -> Chip:
    """The slice's chip, with the `flops` that it reaches in this dtype: a float32 product takes six of bfloat16."""
    chip = tpu_slice.chip
    return chip if dtype == "bfloat16" else replace(chip, flops=chip.flops / 6)


def shape_on(config: ModelConfig, tpu_slice: Slice, mesh_shape: MeshShape | None, dtype: str) -> ModelShape:
    """The shapes of a model, sharded over a slice.

    Arguments:
        mesh_shape: by default the weights are sharded over the fewest chips that can hold three copies of them, see
            `jaxscape.runtime.sharding.default_mesh_shape`.
    """
    if mesh_shape is None:
        weights = bytes_per_chip(model_shape(config, make_mesh(MeshShape(), 1, tpu_slice.devices), dtype).params)
        mesh_shape = default_mesh_shape(weights, round(tpu_slice.chip.memory), len(tpu_slice.devices))
    return model_shape(config, make_mesh(mesh_shape, config.num_kv_heads, tpu_slice.devices), dtype)


def bytes_per_chip(tree: Any) -> int:
    """Bytes that the arrays of a tree take on each chip."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
