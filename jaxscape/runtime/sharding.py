"""The mesh of devices, and how arrays are sharded over it.

A mesh has the axis `points`, over which the rows of a batch are sharded, and the axis `model`, over which weights and
attention heads are. In JAX's mesh the latter consists of two axes: key-value heads are sharded over `kv`; the query
heads of each of them are sharded over `q`, along which key-value heads are replicated. So `model` may be larger than
the number of key-value heads.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxscape.runtime.errors import UserError, reason

MODEL_AXES = ("kv", "q")  # the two axes of JAX's mesh that make up `model`
MESH_AXES = ("points", *MODEL_AXES)
# The devices should have room for this many arrays of the weights' size: the weights of the model, those of a point of
# the landscape, and a direction.
WEIGHT_COPIES = 3

RULES: dict[str | None, tuple[str, ...]] = {
    "rows": ("points",),  # the rows of a batch do not depend on one another
    "vocab": MODEL_AXES,  # in the embedding and the output head, which are the largest tensors of small models
    "embed": MODEL_AXES,  # features of these two tensors, for a vocabulary that does not divide evenly
    "heads": MODEL_AXES,  # query heads in the weights: heads do not depend on one another before the output projection
    "kv_heads": ("kv",),  # in weights and caches; replicated along q, since there may be fewer of them than devices
    "group": ("q",),  # the query heads of one key-value head, whose keys and values are replicated along q
    "mlp": MODEL_AXES,  # hidden features: up and gate are sharded by columns, down by rows, and one all-reduce follows
    None: (),  # everything else is replicated: features of the residual stream, positions, the head dimension
}
"""The mesh axes that each logical axis is sharded over. Logical axes are the names of dimensions in the decoder."""

Axes = tuple[str | None, ...]
"""The logical axis of each dimension of an array."""


class MeshShape(NamedTuple):
    """The sizes of a mesh: the rows of a batch are sharded over `points` devices, and the weights over `model`."""

    points: int = 1
    model: int = 1

    @property
    def size(self) -> int:
        """The number of devices."""
        return self.points * self.model

    def __str__(self) -> str:
        """The text that `parse_mesh_shape` reads."""
        return f"points={self.points},model={self.model}"


Split = MeshShape  # the name of MeshShape in earlier versions


def make_mesh(mesh_shape: MeshShape, num_kv_heads: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the first `mesh_shape.size` of the devices, by default of `jax.devices()`.

    Arguments:
        num_kv_heads: the model's number of key-value heads. The size of the axis `kv` is the greatest common divisor of
            this number and `mesh_shape.model`.

    Raises:
        UserError: there are too few devices; or there are several processes and the mesh does not use all devices, so
            that some processes would have nothing to do; or the devices are connected in a way that does not fit.
    """
    available = jax.devices() if devices is None else devices
    if mesh_shape.size > len(available) or (jax.process_count() > 1 and mesh_shape.size < len(available)):
        limit = "" if jax.process_count() > 1 else "at most "
        raise UserError(
            f"The mesh {mesh_shape} does not fit {len(available)} devices: points times model must be "
            f"{limit}{len(available)}."
        )
    kv = math.gcd(num_kv_heads, mesh_shape.model)
    sizes = (mesh_shape.points, kv, mesh_shape.model // kv)
    try:
        # An axis of a TPU's torus may be longer than any axis of the mesh, so JAX may split it over several of them.
        used = mesh_utils.create_device_mesh(sizes, available[: mesh_shape.size], allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"The mesh {mesh_shape} cannot be laid out on {len(available)} devices as they are connected "
            f"({reason(error)}): use all of them, in powers of two."
        ) from error
    return Mesh(used, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_shape_of(mesh: Mesh) -> MeshShape:
    """The shape of a mesh that `make_mesh` made."""
    return MeshShape(mesh.shape["points"], mesh.shape["kv"] * mesh.shape["q"])


def parse_mesh_shape(text: str) -> MeshShape:
    """The mesh shape that a text such as `points=2,model=4` describes. An axis that is left out has size 1.

    Raises:
        UserError: the text describes no mesh shape.
    """
    try:
        pairs = [part.split("=") for part in text.split(",")]
        sizes = {name.strip(): int(size) for name, size in pairs}
        mesh_shape = MeshShape(**sizes)
        if len(sizes) != len(pairs) or min(mesh_shape) < 1:
            raise ValueError
    except (ValueError, TypeError) as error:
        raise UserError(
            f"Cannot parse --mesh {text!r}: write points=N,model=M with whole numbers, for example points=2,model=4."
        ) from error
    return mesh_shape


def default_mesh_shape(weight_bytes: int, free_bytes: int | None, num_devices: int) -> MeshShape:
    """The mesh shape that shards the weights over the fewest devices that can hold three copies of them.

    The three copies are the model's weights, those of a point of the landscape, and a direction. `points` is the
    number of devices divided by `model`. `model` is a power of two, because other sizes rarely divide the dimensions of
    a model.

    Arguments:
        weight_bytes: bytes of the weights.
        free_bytes: free bytes of each device; None if that is unknown.
    """
    powers = [2**i for i in range(num_devices.bit_length()) if num_devices % 2**i == 0]
    fits = (n for n in powers if free_bytes is None or WEIGHT_COPIES * weight_bytes <= n * free_bytes)
    model = next(fits, powers[-1])
    return MeshShape(num_devices // model, model)


def partition(mesh: Mesh | jax.sharding.AbstractMesh, axes: Axes, shape: Sequence[int]) -> PartitionSpec:
    """The partition spec of an array with these logical axes.

    A dimension is sharded over the mesh axes in `RULES`, without the last ones if they do not divide it evenly or
    shard an earlier dimension. The array is replicated along all other mesh axes.
    """
    parts: list[tuple[str, ...] | None] = []
    used: set[str] = set()
    for axis, size in zip(axes, shape, strict=True):
        names = tuple(name for name in RULES[axis] if mesh.shape[name] > 1)
        while names and (used & set(names) or size % math.prod(mesh.shape[name] for name in names)):
            names = names[:-1]
        used |= set(names)
        parts.append(names or None)
    while parts and parts[-1] is None:  # JAX's own spelling: a spec that is spelled otherwise would compile again
        parts.pop()
    return PartitionSpec(*(names[0] if names and len(names) == 1 else names for names in parts))


def sharding(mesh: Mesh, axes: Axes, shape: Sequence[int]) -> NamedSharding:
    """The sharding over a mesh of an array with these logical axes."""
    return NamedSharding(mesh, partition(mesh, axes, shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that each device has a full copy of."""
    return NamedSharding(mesh, PartitionSpec())


def on_mesh(mesh: Mesh) -> AbstractContextManager[Any]:
    """A context in which `constrain` shards arrays over this mesh."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def constrain(x: Array, *axes: str | None) -> Array:
    """The array with a sharding constraint for its logical axes, inside `on_mesh`; outside it the array unchanged."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(mesh, axes, x.shape))


def map_shards(function: Callable[..., Array], axes: Sequence[Axes], *arrays: Array) -> Array:
    """`function(*arrays)`, computed by each device of the mesh for its shards of the arrays.

    XLA cannot split a kernel by itself, nor does it know which gathers stay within a shard, so these are called through
    this function. Outside `on_mesh`, and on one device, the function is called as it is.

    Arguments:
        function: its result has the logical axes of the first array.
        axes: the logical axes of each array; those of the last dimensions may be left out if they are None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*arrays)
    specs = tuple(
        partition(mesh, (*names, *(None,) * (x.ndim - len(names))), x.shape)
        for names, x in zip(axes, arrays, strict=True)
    )
    mapped: Array = jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)
    return mapped
