"""The mesh of devices, and which of its axes each dimension of an array is split over.

A mesh has the axis `points`, over which the rows of a batch are split, and the axis `model`, over which weights and
heads are. The latter consists of two: `kv`, over which key-value heads are split, and `q`, over which the query heads
of each of them are, and along which key-value heads are copied. So it may be longer than there are key-value heads.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxscape.runtime.errors import UserError

MESH_AXES = ("points", "kv", "q")
COPIES = 3  # of the weights that a device should have room for

RULES: dict[str | None, tuple[str, ...]] = {
    "rows": ("points",),
    "vocab": ("kv", "q"),
    "heads": ("kv", "q"),
    "kv_heads": ("kv",),
    "group": ("q",),  # the query heads of a key-value head
    "mlp": ("kv", "q"),
    "embed": ("kv", "q"),  # of a table whose vocabulary they do not divide
    None: (),
}
"""From logical axes, the names that dimensions have in the decoder, to axes of the mesh."""

Axes = tuple[str | None, ...]
"""The logical axis of each dimension."""


class MeshShape(NamedTuple):
    """How many devices share the rows of a batch, and how many the weights."""

    points: int = 1
    model: int = 1

    @property
    def size(self) -> int:
        return self.points * self.model

    def __str__(self) -> str:
        """As `parse_mesh_shape` reads it."""
        return f"points={self.points},model={self.model}"


Split = MeshShape  # the name of MeshShape in earlier versions


def make_mesh(split: MeshShape, num_kv_heads: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over these devices, by default the first of JAX's.

    Raises:
        UserError: there are not as many, or several processes have others, which would have nothing to do.
    """
    there = jax.devices() if devices is None else devices
    if split.size > len(there) or (jax.process_count() > 1 and split.size < len(there)):
        raise UserError(f"The mesh {split} does not fit {len(there)} devices.")
    kv = math.gcd(num_kv_heads, split.model)
    shape = (split.points, kv, split.model // kv)
    try:
        # Where a TPU's own axes are longer than the mesh's, they are split.
        chosen = mesh_utils.create_device_mesh(shape, there[: split.size], allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"The mesh {split} cannot be laid out on {len(there)} devices as they are connected ({error}); use all of "
            f"them, in powers of two."
        ) from error
    return Mesh(chosen, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_shape_of(mesh: Mesh) -> MeshShape:
    return MeshShape(mesh.shape["points"], mesh.shape["kv"] * mesh.shape["q"])


def parse_mesh_shape(text: str) -> MeshShape:
    """The split that `points=2,model=4` describes; what is left out is 1.

    Raises:
        UserError: it describes none.
    """
    try:
        pairs = [part.split("=") for part in text.split(",")]
        numbers = {name.strip(): int(number) for name, number in pairs}
        split = MeshShape(**numbers)
        if len(numbers) != len(pairs) or min(split) < 1:
            raise ValueError
    except (ValueError, TypeError) as error:
        raise UserError(f"The mesh {text!r} is none; write it as points=2,model=4.") from error
    return split


def default_mesh_shape(size: int, free: int | None, count: int) -> MeshShape:
    """The shortest model axis on which weights of `size` bytes fit three times, as the model's, a point's, and a
    direction; all other devices stand along `points`. It is a power of two: others hardly divide a model's shapes.

    Arguments:
        free: bytes of a device; None if nobody knows.
        count: of the devices.
    """
    powers = [2**i for i in range(count.bit_length()) if count % 2**i == 0]
    model = next((n for n in powers if free is None or COPIES * size <= n * free), powers[-1])
    return MeshShape(count // model, model)


def partition(mesh: Mesh | jax.sharding.AbstractMesh, axes: Axes, shape: Sequence[int]) -> PartitionSpec:
    """The mesh axes of each dimension: those that divide it, and that no dimension before it took. Along the others the
    array is copied."""
    parts: list[tuple[str, ...] | None] = []
    taken: set[str] = set()
    for axis, size in zip(axes, shape, strict=True):
        names = tuple(name for name in RULES[axis] if mesh.shape[name] > 1)
        while names and (taken & set(names) or size % math.prod(mesh.shape[name] for name in names)):
            names = names[:-1]
        taken |= set(names)
        parts.append(names or None)
    while parts and parts[-1] is None:  # as JAX writes it: programs are compiled for one spelling
        parts.pop()
    return PartitionSpec(*(names[0] if names and len(names) == 1 else names for names in parts))


def sharding(mesh: Mesh, axes: Axes, shape: Sequence[int]) -> NamedSharding:
    return NamedSharding(mesh, partition(mesh, axes, shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def on_mesh(mesh: Mesh) -> AbstractContextManager[Any]:
    """What is traced inside is for this mesh."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def constrain(x: Array, *axes: str | None) -> Array:
    """Have an array inside `on_mesh` a mesh split as its logical axes say; outside it stays as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(mesh, axes, x.shape))
