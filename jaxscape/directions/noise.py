"""Standard normal noise, with the same bits on every mesh."""

import math

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl, threefry_prng_impl
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Key, UInt32

# The rotations of Threefry-2x32 in its even and odd groups of four rounds, and the constant of its key schedule (Salmon
# et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def standard_normal(key: Key[Array, ""], shape: tuple[int, ...], sharding: NamedSharding) -> Float[Array, "*shape"]:
    """Standard normal noise in float32, with the same values under every sharding."""
    if sharding.mesh.devices.flat[0].platform == "cpu" and math.prod(shape) <= 2**32:
        key = jax.random.wrap_key_data(jax.random.key_data(key), impl=_UNROLLED)
    return jax.lax.with_sharding_constraint(jax.random.normal(key, shape, jnp.float32), sharding)


def threefry(
    key: UInt32[Array, " 2"], x0: UInt32[Array, "*shape"], x1: UInt32[Array, "*shape"]
) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]]:
    """Threefry-2x32 with 20 rounds of the pairs (x0, x1), as one elementwise expression.

    On a CPU, JAX's own is a loop over the rounds, each of which reads and writes whole arrays.
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x0, x1 = x0 + schedule[0], x1 + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << rotation) | (x1 >> (32 - rotation))
            x1 = x0 ^ x1
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1


def _random_bits(key: UInt32[Array, " 2"], bit_width: int, shape: tuple[int, ...]) -> UInt32[Array, "*shape"]:
    """The 32 random bits that JAX's threefry draws for each of at most 2³² numbers: those of the number's index."""
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index = index + jnp.uint32(stride % 2**32) * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        stride *= shape[axis]
    high, low = threefry(key, jnp.zeros_like(index), index)
    return high ^ low


# JAX's threefry, except for how its bits are computed. XLA fuses them with all that is computed from them.
_JAX = threefry_prng_impl
_UNROLLED = define_prng_impl(
    key_shape=(2,), seed=_JAX.seed, split=_JAX.split, random_bits=_random_bits, fold_in=_JAX.fold_in, name="unrolled"
)
