"""Directions in weight space, and the model at a point: θ(c) = θ₀ + Σ cᵢ dᵢ."""

import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from jaxscape.errors import UserError, check_seed
from jaxscape.models import Model
from jaxscape.models.checkpoint import Params, check_tensors, named_leaves, to_dtype, tree_of


def random_direction(model: Model, seed: int, orthogonal_to: Params | None = None) -> Params:
    """A random, layer-normalised direction.

    Each tensor of the direction is Gaussian, scaled to the norm of the tensor that it perturbs (Li et al., arXiv
    1712.09913, by tensor instead of by filter, as Peng et al., arXiv 2405.17374). Parameters whose name contains
    `norm` are not perturbed: the direction is zero there. A tensor's noise depends on the seed, the parameter's name
    and its shape alone.

    Arguments:
        seed: from 0 to 2³² − 1.
        orthogonal_to: a direction that each tensor of this one is made orthogonal to before it is scaled, so that the
            whole directions are orthogonal too.

    Returns:
        A tree like `model.params`, in its dtypes.
    """
    others = named_leaves(orthogonal_to) if orthogonal_to is not None else {}
    return tree_of(
        {
            name: jnp.zeros_like(weight)
            if "norm" in name
            else _random_tensor(weight, _key(seed, name), others.get(name))
            for name, weight in named_leaves(model.params).items()
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


@jax.jit
def _random_tensor(weight: Float[Array, "*shape"], key: Array, other: Float[Array, "*shape"] | None) -> Array:
    noise = jax.random.normal(key, weight.shape, jnp.float32)
    if other is not None:
        other = other.astype(jnp.float32)
        square = jnp.vdot(other, other)
        noise = noise - jnp.where(square > 0, jnp.vdot(other, noise) / square, 0.0) * other
    norm = jnp.linalg.norm(noise.ravel())
    scale = jnp.linalg.norm(weight.astype(jnp.float32).ravel()) / jnp.where(norm > 0, norm, 1.0)
    return (noise * scale).astype(weight.dtype)


@partial(jax.jit, donate_argnums=3, keep_unused=True)
def materialise(
    params: Params, directions: Sequence[Params], coords: Float[Array, " ndim"], previous: Params | None = None
) -> Params:
    """θ(c), computed in float32 from θ₀ and rounded once to each parameter's dtype.

    Arguments:
        coords: float32[n], one for each direction.
        previous: the last point's parameters, whose buffers are reused (they are gone afterwards).
    """
    del previous

    def point(weight: Array, *steps: Array) -> Array:
        moved = weight.astype(jnp.float32)
        for c, step in zip(coords, steps, strict=True):
            moved = moved + c * step.astype(jnp.float32)
        return moved.astype(weight.dtype)

    return jax.tree.map(point, params, *directions)


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
            weights = named_leaves(model.params)
            return tree_of({name: to_dtype(file.get_tensor(name), weights[name].dtype) for name in names})
    except (SafetensorError, OSError) as error:
        raise UserError(f"The direction {path} cannot be read as safetensors ({error}).") from error


def check_direction(direction: Params, model: Model) -> None:
    """Raise a `UserError` that lists the tensors in which the direction is not like the model's parameters."""
    check_tensors(_shapes(model.params), _shapes(direction), "the direction")


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in named_leaves(params).items()}
