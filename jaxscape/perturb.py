"""Directions in weight space, and the model at a point: θ(c) = θ₀ + Σ cᵢ dᵢ."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Key, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from jaxscape.errors import UserError, check_seed
from jaxscape.models import Model
from jaxscape.models.checkpoint import Params, check_tensors, named_leaves, to_dtype, tree_of

STORAGES = ("exact", "bfloat16", "int8", "seed")

Direction = Params
"""A tree like the parameters, whose leaves are arrays, `Scaled` or `Seeded` tensors."""


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclass(frozen=True)
class Scaled:
    """A direction's tensor in fewer bits: values in bfloat16 or int8, times one float32; or the shapes of both."""

    values: Shaped[Any, "*shape"]
    scale: Float[Any, ""]

    def dense(self) -> Float[Array, "*shape"]:
        return self.values.astype(jnp.float32) * self.scale


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "scale", "other", "along"],
    meta_fields=["shape", "dtype", "where"],
)
@dataclass(frozen=True)
class Seeded:
    """A random direction's tensor that is not stored, but drawn where it is used; or the shapes of what it takes.

    Attributes:
        scale: what the noise is multiplied by, float32.
        other, along: a tensor, and how much of it is taken from the noise.
        dtype: what the tensor is rounded to.
        where: the devices that draw it, each its own part.
    """

    key: Key[Any, ""]
    scale: Float[Any, ""]
    other: "Array | Scaled | Seeded | None"
    along: Float[Any, ""] | None
    shape: tuple[int, ...]
    dtype: str
    where: NamedSharding

    def dense(self) -> Float[Array, "*shape"]:
        noise = _noise(self.key, self.shape, self.where)
        if self.other is not None and self.along is not None:
            noise = noise - self.along * dense(self.other)
        return (noise * self.scale).astype(self.dtype).astype(jnp.float32)


def dense(step: "Array | Scaled | Seeded") -> Float[Array, "*shape"]:
    """A direction's tensor, however it is held, in float32."""
    return step.astype(jnp.float32) if isinstance(step, jax.Array) else step.dense()


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "steps", "coords"], meta_fields=[])
@dataclass(frozen=True)
class PerturbedWeight:
    """W + Σ cᵢ Dᵢ, which is never formed: x (W + Σ cᵢ Dᵢ) = x W + Σ cᵢ (x Dᵢ).

    The coordinates are numbers, or arrays that broadcast against what the weight is used for: [B, 1, 1] where each of B
    rows is at a point of its own. Either way, and under `jax.vmap` over coordinates, all rows share one product with W
    and one with each D.
    """

    weight: Float[Array, "*shape"]
    steps: tuple[Any, ...]
    coords: tuple[Float[Array, "*rows"], ...]

    def apply(self, use: Callable[[Array], Array]) -> Array:
        total = use(self.weight)
        for c, step in zip(self.coords, self.steps, strict=True):
            if isinstance(step, Scaled):  # the product is scaled, not the values, which stay as small as weights are
                one = 128 if step.values.dtype == jnp.int8 else 1
                values = step.values.astype(self.weight.dtype) / one
                moved = step.scale * one * use(values).astype(jnp.float32)
            else:
                moved = use(dense(step).astype(self.weight.dtype)).astype(jnp.float32)
            if c.ndim:  # one for each row, also of what has more dimensions: heads
                c = c.reshape(c.shape + (1,) * (moved.ndim - c.ndim))
            # At 0 it is the weight to the bit, also where the direction overflows.
            moved = jnp.where(c == 0, 0, c * moved)
            total = (total.astype(jnp.float32) + moved).astype(total.dtype)
        return total


def at_point(params: Params, directions: Sequence[Direction], coords: Float[Array, "*rows ndim"]) -> Params:
    """The parameters at coordinates, as sums that are not formed; without directions, the parameters themselves.

    Arguments:
        coords: float32[n], or [B, n]: for inputs whose first axis is B rows, each at its own point.
    """
    if not directions:
        return params
    shape = (-1, 1, 1) if coords.ndim == 2 else ()
    each = tuple(coords[..., i].reshape(shape) for i in range(len(directions)))
    return jax.tree.map(lambda weight, *steps: PerturbedWeight(weight, steps, each), params, *directions)


def random_direction(
    model: Model, seed: int, orthogonal_to: Direction | None = None, storage: str = "exact"
) -> Direction:
    """A random, layer-normalised direction.

    Each tensor of the direction is Gaussian, scaled to the norm of the tensor that it perturbs (Li et al., arXiv
    1712.09913, by tensor instead of by filter, as Peng et al., arXiv 2405.17374). Parameters whose name contains
    `norm` are not perturbed: the direction is zero there. A tensor's noise depends on the seed, the parameter's name
    and its shape alone.

    Arguments:
        seed: from 0 to 2³² − 1.
        orthogonal_to: a direction that each tensor of this one is made orthogonal to before it is scaled, so that the
            whole directions are orthogonal too.
        storage: `exact` holds the tensors in the parameters' dtypes; `seed` makes the same tensors again wherever they
            are used; `bfloat16` and `int8` hold them in fewer bits, see `stored`.

    Returns:
        A tree like `model.params`; with `exact`, of arrays in its dtypes.
    """
    others = named_leaves(orthogonal_to) if orthogonal_to is not None else {}
    direction = {}
    where = named_leaves(model.shardings)
    for name, weight in named_leaves(model.params).items():
        if "norm" in name:
            direction[name] = jnp.zeros(weight.shape, weight.dtype, device=where[name])
            continue
        draw = _seeded if storage == "seed" else _drawn
        tensor = draw(jax.device_put(weight, where[name]), _key(seed, name), others.get(name), where[name])
        direction[name] = _in_fewer_bits(tensor, storage) if storage in ("bfloat16", "int8") else tensor
    return tree_of(direction)


def stored(direction: Direction, storage: str) -> Direction:
    """A direction's tensors held in `bfloat16` or `int8`, and scaled to the norms that they had before.

    The result *is* the direction then: landscapes along it are exact, but it is another than in full precision.
    """
    return jax.tree.map(lambda tensor: _in_fewer_bits(tensor, storage), direction)


@partial(jax.jit, static_argnums=1)
def _in_fewer_bits(tensor: Float[Array, "*shape"], storage: str) -> Scaled:
    tensor = tensor.astype(jnp.float32)
    if storage == "int8":
        highest = jnp.abs(tensor).max()
        values = jnp.round(tensor * (127 / jnp.where(highest > 0, highest, 1))).astype(jnp.int8)
    else:
        values = tensor.astype(jnp.bfloat16)
    norm = _norm(values.astype(jnp.float32))
    return Scaled(values, _norm(tensor) / jnp.where(norm > 0, norm, 1.0))


def placed(direction: Direction, model: Model) -> Direction:
    """A direction that is split over the devices as the model's parameters are."""
    where = named_leaves(model.shardings)
    return tree_of(
        {
            name: jax.device_put(tensor, where[name]) if isinstance(tensor, jax.Array | np.ndarray) else tensor
            for name, tensor in named_leaves(direction).items()
        }
    )


def difference(model: Model, other: Model) -> Params:
    """The direction from one model to another, which stands at 1 along it: a float32 tree like `model.params`.

    Raises:
        UserError: the models do not have the same parameters; those that differ are listed.
    """
    check_tensors(_shapes(model.params), _shapes(other.params), other.name)
    return jax.tree.map(lambda a, b: b.astype(jnp.float32) - a.astype(jnp.float32), model.params, other.params)


def _key(seed: int, name: str) -> Array:
    # The hash is fixed by a standard, so other versions and machines make the same noise; so is threefry.
    return jax.random.fold_in(jax.random.key(check_seed(seed), impl="threefry2x32"), zlib.crc32(name.encode()))


@partial(jax.jit, static_argnums=3)
def _seeded(weight: Float[Array, "*shape"], key: Key[Array, ""], other: Any, where: NamedSharding) -> Seeded:
    """Noise for a weight, orthogonal to `other` and as long as the weight."""
    noise, along = _noise(key, weight.shape, where), None
    if other is not None:
        there = dense(other)
        square = order_free_sum(there * there)
        along = jnp.where(square > 0, order_free_sum(there * noise) / square, 0.0)
        noise = noise - along * there
    norm = _norm(noise)
    scale = _norm(weight.astype(jnp.float32)) / jnp.where(norm > 0, norm, 1.0)
    return Seeded(key, scale, other, along, weight.shape, str(weight.dtype), where)


@partial(jax.jit, static_argnums=3)
def _drawn(
    weight: Float[Array, "*shape"], key: Key[Array, ""], other: Any, where: NamedSharding
) -> Float[Array, "*shape"]:
    return _seeded(weight, key, other, where).dense().astype(weight.dtype)


def _noise(key: Key[Array, ""], shape: tuple[int, ...], where: NamedSharding) -> Float[Array, "*shape"]:
    """Standard normal noise, which is the same however it is split."""
    return jax.lax.with_sharding_constraint(jax.random.normal(key, shape, jnp.float32), where)


def _norm(x: Float[Array, "*shape"]) -> Float[Array, ""]:
    return jnp.sqrt(order_free_sum(x * x))


def order_free_sum(x: Float[Array, "*shape"]) -> Float[Array, ""]:
    """The sum of float32 numbers, the same to the bit however they are split over devices.

    Each is rounded to 24 bits below the largest, and what is added up are integers: in pieces of 12 bits, of which an
    int32 holds the sum of a quarter of a million, first along the last axis and then over the others.
    """
    x = jnp.atleast_2d(x)
    highest = jnp.abs(x).max()
    shift = 24 - jnp.maximum(jnp.frexp(highest)[1], -100)
    integers = jnp.round(jnp.ldexp(x, shift)).astype(jnp.int32)
    rows = jnp.stack([(integers >> 12).sum(-1), (integers & 4095).sum(-1)])
    sums = jnp.stack([rows >> 24, (rows >> 12) & 4095, rows & 4095]).sum(range(2, rows.ndim + 1)).astype(jnp.float32)
    total = jnp.float32(0)
    for i, j in np.ndindex(sums.shape):  # the highest come first, of which a negative sum cancels the most
        total += sums[i, j] * 2.0 ** (36 - 12 * (i + j))  # exact but for the addition, as an FMA too
    return jnp.where(jnp.isfinite(highest), jnp.ldexp(total, -shift), highest)


@partial(jax.jit, donate_argnums=3, keep_unused=True)
def materialise(
    params: Params,
    directions: Sequence[Direction],
    coords: Float[Array | np.ndarray, " ndim"],
    previous: Params | None = None,
) -> Params:
    """θ(c), computed in float32 from θ₀ and rounded once to each parameter's dtype.

    Arguments:
        coords: float32[n], one for each direction.
        previous: the last point's parameters, whose buffers are reused (they are gone afterwards).
    """
    del previous
    return jax.tree.map(partial(_moved, coords), params, *directions)


def materialise_streamed(
    params: Params,
    directions: Sequence[Direction],
    coords: Float[Array | np.ndarray, " ndim"],
    previous: Params | None = None,
    *,
    shardings: Params,
) -> Params:
    """What `materialise` gives, from parameters in host memory, tensor by tensor: the devices hold the point's
    parameters, one tensor of the model, and of directions what is stored there.

    Arguments:
        shardings: of each parameter.
    """
    where = named_leaves(shardings)
    olds = named_leaves(previous) if previous is not None else {}
    steps = [named_leaves(direction) for direction in directions]
    moved = {}
    for name, weight in named_leaves(params).items():
        tensors = tuple(step[name] for step in steps)
        # Waited for, because the host would send the next tensors before there is room for them.
        there = jax.device_put(weight, where[name])
        moved[name] = _moved_tensor(coords, there, tensors, olds.get(name)).block_until_ready()
    return tree_of(moved)


@partial(jax.jit, donate_argnums=3, keep_unused=True)
def _moved_tensor(
    coords: Float[Array | np.ndarray, " ndim"],
    weight: Float[Array, "*shape"],
    steps: tuple[Any, ...],
    previous: Array | None,
) -> Float[Array, "*shape"]:
    del previous
    return _moved(coords, weight, *steps)


def _moved(
    coords: Float[Array | np.ndarray, " ndim"], weight: Float[Array, "*shape"], *steps: Any
) -> Float[Array, "*shape"]:
    moved = weight.astype(jnp.float32)
    for c, step in zip(coords, steps, strict=True):
        moved = moved + c * dense(step)
    return moved.astype(weight.dtype)


def save_direction(direction: Params, path: str | Path, model: Model) -> None:
    """Write a direction as safetensors under Hugging Face parameter names and in Hugging Face layouts.

    Raises:
        UserError: the direction does not fit the model, or the file cannot be written.
    """
    check_direction(direction, model)
    try:
        save_file(named_leaves(direction), path, metadata={"format": "flax", "model": model.name})
    except (OSError, SafetensorError) as error:
        raise UserError(f"The direction cannot be written to {path} ({error}).") from error


def load_direction(path: str | Path, model: Model) -> Params:
    """Read a direction that `save_direction`, or another tool, wrote for this model.

    Raises:
        UserError: the file cannot be read, or its tensors are not those of the model; they are listed.
    """
    try:
        with safe_open(path, framework="flax") as file:
            names = list(file.keys())
            found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            check_tensors(_shapes(model.params), found, f"the direction {path}")
            weights, where = named_leaves(model.params), named_leaves(model.shardings)
            return tree_of(
                {
                    name: jax.device_put(to_dtype(file.get_tensor(name), weights[name].dtype), where[name])
                    for name in names
                }
            )
    except (SafetensorError, OSError) as error:
        raise UserError(f"The direction {path} cannot be read as safetensors ({error}).") from error


def check_direction(direction: Params, model: Model) -> None:
    """Raise a `UserError` that lists the tensors in which the direction is not like the model's parameters."""
    check_tensors(_shapes(model.params), _shapes(direction), "the direction")


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in named_leaves(params).items()}
