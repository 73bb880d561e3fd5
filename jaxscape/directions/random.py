"""Random, layer-normalised directions."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Key

from jaxscape.directions.base import needs_option
from jaxscape.directions.noise import standard_normal
from jaxscape.directions.storage import Direction, Seeded, check_storage, dense, rounded
from jaxscape.directions.sums import order_free_sum, tensor_norm
from jaxscape.models.checkpoint import named_leaves, tree_of
from jaxscape.models.model import Model
from jaxscape.models.weights import is_norm
from jaxscape.runtime.errors import UserError, check_seed


def random_direction(
    model: Model, seed: int, orthogonal_to: Direction | None = None, storage: str = "exact"
) -> Direction:
    """A random, layer-normalised direction.

    Each tensor of the direction is Gaussian noise, scaled to the norm of the tensor that it perturbs (Li et al., arXiv
    1712.09913, per tensor instead of per filter, as Peng et al., arXiv 2405.17374). Parameters whose name contains
    `norm` are not perturbed: the direction is zero there. The noise of a tensor depends only on the seed, the
    parameter's name and its shape.

    Arguments:
        seed: from 0 to 2³² − 1.
        orthogonal_to: a direction. Each tensor of the new direction is made orthogonal to this one's before it is
            scaled, which makes the whole directions orthogonal too.
        storage: `exact` stores the tensors in the parameters' dtypes; `seed` draws the same tensors again wherever they
            are used; `bfloat16` and `int8` round them, see `jaxscape.directions.storage.stored`.

    Returns:
        A tree like `model.params`; with `exact`, its leaves are arrays in the parameters' dtypes.

    Raises:
        UserError: the seed is out of range, or there is no such storage.
    """
    check_storage(storage)
    others = named_leaves(orthogonal_to) if orthogonal_to is not None else {}
    direction = {}
    shardings = named_leaves(model.shardings)
    for name, weight in named_leaves(model.params).items():
        if is_norm(name):
            direction[name] = jnp.zeros(weight.shape, weight.dtype, device=shardings[name])
            continue
        draw = _seeded if storage == "seed" else _drawn
        weight = jax.device_put(weight, shardings[name])
        tensor = draw(weight, tensor_key(seed, name), others.get(name), shardings[name])
        direction[name] = rounded(tensor, storage) if storage in ("bfloat16", "int8") else tensor
    return tree_of(direction)


def noise_direction(
    model: Model,
    seed: int,
    draw: Callable[[Float[Array, "*shape"], Key[Array, ""], NamedSharding], Float[Array, "*shape"]],
) -> Direction:
    """A direction of noise. Parameters whose name contains `norm` are not perturbed.

    Arguments:
        draw: a jitted function of a weight, a key that depends on the seed and on the parameter's name, and the
            sharding of the result; it returns the direction's tensor.
    """
    shardings = named_leaves(model.shardings)

    def tensor(name: str, weight: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        if is_norm(name):
            return jnp.zeros(weight.shape, weight.dtype, device=shardings[name])
        return draw(jax.device_put(weight, shardings[name]), tensor_key(seed, name), shardings[name])

    return tree_of({name: tensor(name, weight) for name, weight in named_leaves(model.params).items()})


def scaled_to_norm(tensor: Float[Array, "*shape"], target: Float[Array, ""]) -> Float[Array, "*shape"]:
    """A float32 tensor scaled to a Euclidean norm; zeros stay zeros."""
    norm = tensor_norm(tensor)
    return tensor * (target / jnp.where(norm > 0, norm, 1.0))


def seed_of(kind: type[Any], text: str) -> int:
    """The seed that the text after the last colon of a direction's name is.

    Raises:
        UserError: it is empty, or no number.
    """
    if not needs_option(kind, text).isdecimal():
        raise UserError(f"The seed of the direction {kind.kind!r} is a number, not {text!r}: write {kind.usage}.")
    return int(text)


def tensor_key(seed: int, name: str) -> Key[Array, ""]:
    """The random key of a tensor's noise. CRC-32 and threefry are standards, so all machines draw the same."""
    return jax.random.fold_in(jax.random.key(check_seed(seed), impl="threefry2x32"), zlib.crc32(name.encode()))


@partial(jax.jit, static_argnums=3)
def _seeded(weight: Float[Array, "*shape"], key: Key[Array, ""], other: Any, sharding: NamedSharding) -> Seeded:
    """Noise for a weight, orthogonal to `other` and with the weight's norm."""
    noise, along = standard_normal(key, weight.shape, sharding), None
    if other is not None:
        tensor = dense(other)
        square = order_free_sum(tensor * tensor)
        along = jnp.where(square > 0, order_free_sum(tensor * noise) / square, 0.0)
        noise = noise - along * tensor
    norm = tensor_norm(noise)
    scale = tensor_norm(weight.astype(jnp.float32)) / jnp.where(norm > 0, norm, 1.0)
    return Seeded(key, scale, other, along, weight.shape, str(weight.dtype), sharding)


@partial(jax.jit, static_argnums=3)
def _drawn(
    weight: Float[Array, "*shape"], key: Key[Array, ""], other: Any, sharding: NamedSharding
) -> Float[Array, "*shape"]:
    return _seeded(weight, key, other, sharding).dense().astype(weight.dtype)


@dataclass(frozen=True)
class Noise:
    """What the kinds of noise that a seed alone describes share; each says how its direction is made."""

    seed: int

    kind: ClassVar[str]
    usage: ClassVar[str]
    is_interpolation: ClassVar[bool] = False
    is_drawn: ClassVar[bool] = True
    count: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @classmethod
    def parse(cls, option: str) -> Any:
        return cls(seed_of(cls, option))

    def __str__(self) -> str:
        return f"{self.kind}:{self.seed}"


@dataclass(frozen=True)
class Random(Noise):
    """`random:SEED`: the random direction of a seed. In a set with other directions, see `make_directions`."""

    kind: ClassVar[str] = "random"
    usage: ClassVar[str] = "random:SEED"
    units: ClassVar[tuple[str, ...]] = ("tensors", "weights")

    def make(self, model: Model) -> list[Direction]:
        return [random_direction(model, self.seed)]
