"""The parameters at a point: θ(c) = θ₀ + Σ cᵢ dᵢ, formed (`materialise`) or as sums that are never formed (`at_point`).

A point is always computed from θ₀ and its coordinates, never from a neighbouring point, so that rounding errors do not
accumulate and points can be evaluated in any order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Float

from jaxscape.directions.stacked import Stacked, StackedFactors
from jaxscape.directions.storage import Direction, Factored, Scaled, dense, is_zero
from jaxscape.models.checkpoint import Params, named_leaves, tree_of
from jaxscape.models.decoder import LookUp, Product
from jaxscape.models.fusion import fuse


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "tensors", "coords"], meta_fields=[])
@dataclass(frozen=True)
class PerturbedWeight:
    """W + Σ cᵢ Dᵢ, which is never formed: x (W + Σ cᵢ Dᵢ) = x W + Σ cᵢ (x Dᵢ).

    Attributes:
        tensors: the Dᵢ.
        coords: the cᵢ. Each is a scalar, or an array that broadcasts against the product: [B, 1, 1] when each of B rows
            is at a point of its own. In both cases, and under `jax.vmap` over coordinates, all rows share one product
            with W and one product with each Dᵢ.
    """

    weight: Float[Array, "*shape"]
    tensors: tuple[Any, ...]
    coords: tuple[Float[Array, "*rows"], ...]

    def apply(self, use: Any) -> Array:
        """`use(W + Σ cᵢ Dᵢ)`, for a function `use` that is linear in the weight; in the dtype of `use(W)`."""
        total = use(self.weight)
        for c, tensor in zip(self.coords, self.tensors, strict=True):
            product = _used(tensor, use, self.weight.dtype).astype(jnp.float32)
            if c.ndim:  # one coordinate for each row, also where the product has more dimensions, such as heads
                c = c.reshape(c.shape + (1,) * (product.ndim - c.ndim))
            # At c = 0 the result has the bits of use(W), even where the product with the direction overflows.
            product = jnp.where(c == 0, 0, c * product)
            total = (total.astype(jnp.float32) + product).astype(total.dtype)
        return total


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "factors"], meta_fields=[])
@dataclass(frozen=True)
class OwnWeights:
    """W + leftᵀ right with factors of their own for each of N points, to which B / N consecutive rows belong."""

    weight: Float[Array, "out in"]
    factors: StackedFactors

    def apply(self, use: Product | LookUp) -> Array:
        """`use(W + leftᵀ right)`; in the dtype of `use(W)`."""
        total = use(self.weight)
        return (total.astype(jnp.float32) + use.of_factors(*self.factors).astype(jnp.float32)).astype(total.dtype)


def _used(tensor: Any, use: Any, dtype: jnp.dtype) -> Array:
    """`use(D)` for a direction's tensor D, with a product in the dtype of the weights."""
    if isinstance(tensor, Scaled):  # scale the product; `values` have about the magnitude of weights
        one = 128 if tensor.values.dtype == jnp.int8 else 1
        return tensor.scale * one * use(tensor.values.astype(dtype) / one).astype(jnp.float32)
    if isinstance(tensor, Factored) and len(tensor.shape) == 2:
        return use.of_factors(tensor.left.T.astype(dtype), tensor.right.astype(dtype))
    return use(dense(tensor).astype(dtype))


def at_point(
    params: Params,
    directions: Sequence[Direction] | Stacked,
    coords: Float[Array | np.ndarray, "*points ndim"],
    rows: int = 1,
) -> Params:
    """The parameters at coordinates, as sums that are never formed; a parameter that does not move is itself.

    Arguments:
        coords: float32[n], or float32[N, n] for inputs of N × `rows` rows, of which `rows` consecutive ones are at each
            of N points.
        rows: number of rows at each point.
    """
    leaves = named_leaves(params)
    if isinstance(directions, Stacked):
        for name, factors in directions.at(jnp.asarray(coords)).items():
            in_dtype = StackedFactors(*(factor.astype(leaves[name].dtype) for factor in factors))
            leaves[name] = OwnWeights(leaves[name], in_dtype)
        return tree_of(leaves)
    by_row = jnp.asarray(coords)
    if by_row.ndim == 2:
        by_row = jnp.repeat(by_row, rows, axis=0)[:, None, None]
    by_direction = [named_leaves(direction) for direction in directions]

    def moved(name: str, weight: Array) -> Array | PerturbedWeight:
        tensors = {i: direction[name] for i, direction in enumerate(by_direction) if not is_zero(direction[name])}
        by_tensor = tuple(by_row[..., i] for i in tensors)
        return PerturbedWeight(weight, tuple(tensors.values()), by_tensor) if tensors else weight

    return tree_of({name: moved(name, weight) for name, weight in leaves.items()})


@partial(jax.jit, donate_argnums=3, keep_unused=True, static_argnames="is_fused")
def materialise(
    params: Params,
    directions: Sequence[Direction],
    coords: Float[Array | np.ndarray, " ndim"],
    previous: Params | None = None,
    *,
    is_fused: bool = False,
) -> Params:
    """θ(c), computed in float32 from θ₀ and rounded once to each parameter's dtype.

    Arguments:
        coords: float32[n], one for each direction.
        previous: the previous point's parameters. Their buffers are donated to the result.
        is_fused: fuse the projections of the result, see `jaxscape.models.fusion`.
    """
    del previous
    moved: Params = jax.tree.map(partial(_moved, coords), params, *directions)
    return fuse(moved) if is_fused else moved


def materialise_by_tensor(
    params: Params,
    directions: Sequence[Direction],
    coords: Float[Array | np.ndarray, " ndim"],
    previous: Params | None = None,
    *,
    shardings: Params,
) -> Params:
    """θ(c) as `materialise` computes it, tensor by tensor, from parameters in host memory or on the devices.

    Parameters and directions in host memory are sent one tensor at a time, so the devices hold the parameters at the
    point, one tensor of each of these, and the other directions as they are stored. Tensors of equal shapes share a
    compiled program: one that draws all tensors of a direction from its seed would take long to compile.

    Arguments:
        shardings: a tree like `params`, the sharding of each parameter.
    """
    by_name = named_leaves(shardings)
    previous_tensors = named_leaves(previous) if previous is not None else {}
    direction_tensors = [named_leaves(direction) for direction in directions]
    moved = {}
    for name, weight in named_leaves(params).items():
        tensors = tuple(_sent(direction[name], by_name[name]) for direction in direction_tensors)
        weight = jax.device_put(weight, by_name[name])
        # Without waiting, the host would send further tensors before there is room for them.
        moved[name] = _moved_tensor(coords, weight, tensors, previous_tensors.get(name)).block_until_ready()
    return tree_of(moved)


def _sent(tensor: Any, sharding: Sharding) -> Any:
    """A direction's tensor, on the devices with this sharding if it is an array in host memory."""
    return jax.device_put(tensor, sharding) if isinstance(tensor, np.ndarray) else tensor


@partial(jax.jit, donate_argnums=3, keep_unused=True)
def _moved_tensor(
    coords: Float[Array | np.ndarray, " ndim"],
    weight: Float[Array, "*shape"],
    tensors: tuple[Any, ...],
    previous: Array | None,
) -> Float[Array, "*shape"]:
    del previous
    return _moved(coords, weight, *tensors)


def _moved(
    coords: Float[Array | np.ndarray, " ndim"], weight: Float[Array, "*shape"], *tensors: Any
) -> Float[Array, "*shape"]:
    moved = weight.astype(jnp.float32)
    for c, tensor in zip(coords, tensors, strict=True):
        moved = moved + c * dense(tensor)
    return moved.astype(weight.dtype)
