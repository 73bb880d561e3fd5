"""Sums over tensors whose results have the same bits on every mesh, however the tensors are sharded."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@jax.jit
def order_free_sum(x: Float[Array, "*shape"]) -> Float[Array, ""]:
    """The sum of float32 numbers, float32, with the same bits in whatever order they are added.

    Each number is rounded to a multiple of 2⁻²⁴ times the power of two above the largest one. These integers are added
    in pieces of 12 bits. An int32 holds the exact sum of 2¹⁸ pieces, so the last axis is summed first, and its sums are
    cut into pieces again before they are summed over the other axes.
    """
    x = jnp.atleast_2d(x)
    highest = jnp.abs(x).max()
    shift = 24 - jnp.maximum(jnp.frexp(highest)[1], -100)
    integers = jnp.round(jnp.ldexp(x, shift)).astype(jnp.int32)
    rows = jnp.stack([(integers >> 12).sum(-1), (integers & 4095).sum(-1)])
    sums = jnp.stack([rows >> 24, (rows >> 12) & 4095, rows & 4095]).sum(range(2, rows.ndim + 1)).astype(jnp.float32)
    total = jnp.float32(0)
    for i, j in np.ndindex(sums.shape):  # the highest pieces first, because a negative sum cancels most of them
        # The product is exact, so a fused multiply-add gives the same bits.
        total += sums[i, j] * 2.0 ** (36 - 12 * (i + j))
    return jnp.where(jnp.isfinite(highest), jnp.ldexp(total, -shift), highest)


def tensor_norm(x: Float[Array, "*shape"]) -> Float[Array, ""]:
    """The Euclidean norm of a float32 tensor, the same on every mesh."""
    return jnp.sqrt(order_free_sum(x * x))
