"""What a run would take on TPUs that are not here: its programs, compiled by the TPU compiler from shapes alone."""

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
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.sharding import MeshShape, default_mesh_shape, make_mesh

# The compiler's library would look for the TPU that it is on, and keep other processes away from it.
COMPILER_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Chip:
    """A TPU chip, by its maker's documentation.

    Attributes:
        flops: of bfloat16 products, per second.
        memory: bytes that programs can use.
        bandwidth: bytes per second from and to its memory.
        links: bytes per second that it sends to its two neighbours in a ring.
    """

    flops: float
    memory: float
    bandwidth: float
    links: float


CHIPS = {
    "v4": Chip(275e12, 30.75 * 2**30, 1228e9, 90e9),
    "v5e": Chip(197e12, 15.75 * 2**30, 819e9, 90e9),
    "v5p": Chip(459e12, 94.75 * 2**30, 2765e9, 180e9),
    "v6e": Chip(918e12, 31.25 * 2**30, 1640e9, 180e9),
}


class ProgramCounts(NamedTuple):
    """Of a compiled program: see `ProgramCost`; `results` are bytes that it returns in new places, `kept` those that a loop
    holds on the chip, and `missing` what the compiler says when it gives up."""

    arguments: float = 0.0
    results: float = 0.0
    temporaries: float = 0.0
    flops: float = 0.0
    memory_bytes: float = 0.0
    sent_bytes: float = 0.0
    collectives: float = 0.0
    kept: float = 0.0
    compiler_seconds: float = 0.0
    missing: float | None = None


@dataclass(frozen=True)
class Slice:
    """Abstract chips.

    Attributes:
        name: such as v5e:2x4.
        known: what was counted in programs that were compiled for it, by their text before that.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    known: dict[tuple[str, str], ProgramCounts] = field(default_factory=dict, repr=False, compare=False)


@cache
def open_slice(name: str) -> Slice:
    """Ask the TPU compiler for a slice, by a name such as v5e:2x4 (v5p:2x2x1).

    Raises:
        UserError: there is no such slice, or the compiler is not installed.
    """
    kind = name.partition(":")[0]
    if kind not in CHIPS or not re.fullmatch(r"\w+:\d+x\d+(x\d+)?", name):
        raise UserError(
            f"The topology {name!r} is none: give a kind ({', '.join(CHIPS)}) and its shape, as in v5e:2x4."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("Planning needs the TPU compiler: run pip install libtpu, which works on any Linux machine.")
    for variable, value in COMPILER_ALONE.items():
        os.environ.setdefault(variable, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # whatever the compiler's plugin raises
        raise UserError(f"The TPU compiler has no topology {name!r} ({' '.join(str(error).split())[:200]}).") from error
    return Slice(name, CHIPS[kind], tuple(found.devices))


def chip_for_dtype(where: Slice, dtype: str) -> Chip:
    """What a chip is in programs of this dtype: a float32 product is six of bfloat16."""
    return where.chip if dtype == "bfloat16" else replace(where.chip, flops=where.chip.flops / 6)


def shape_on(config: ModelConfig, where: Slice, mesh_shape: MeshShape | None, dtype: str) -> ModelShape:
    """The model's shapes on a slice, split as weights of their size are by default."""
    if mesh_shape is None:
        weights = bytes_per_chip(model_shape(config, make_mesh(MeshShape(), 1, where.devices), dtype).params)
        mesh_shape = default_mesh_shape(weights, round(where.chip.memory), len(where.devices))
    return model_shape(config, make_mesh(mesh_shape, config.num_kv_heads, where.devices), dtype)


def bytes_per_chip(tree: Any) -> int:
    """Bytes on each chip."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
