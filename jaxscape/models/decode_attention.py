"""Attention of a decode step as one GPU kernel, which reads the filled cache slots only (Pallas, compiled by Triton).

Each row of the batch has one new token. XLA computes its attention in about ten kernels, which read every slot of the
cache, filled or not, and write the scores to memory. Here one program of the kernel computes the attention of the query
heads that share a key-value head, in one row: it reads blocks of keys and values, and keeps the running maximum, the
running sum and the weighted values of the softmax (FlashAttention, Dao et al., arXiv 2205.14135).
"""

import warnings
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from jaxscape.models.cache import KeysValues
from jaxscape.runtime.processes import from_first
from jaxscape.runtime.sharding import map_shards

BLOCK = 64  # slots that are read at a time
MIN_QUERIES = 16  # the least number of rows of a matrix product in Triton
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.02, "float16": 0.005}
"""The largest relative error of each dtype at which the kernel is used: a few roundings to its significant bits."""

Queries = Float[Array, "batch kv_heads group head_dim"]
Visible = Bool[Array, "batch keys"]


def attention(
    q: Queries, sources: Sequence[KeysValues], visible: Visible, *, scale: float, softcap: float | None
) -> Queries:
    """The attention of one query of each head to keys and values in several arrays, each device for its shard.

    Arguments:
        sources: keys and values [rows, kv_heads, slots, head_dim], each shared by batch / rows consecutive rows.
        visible: for each row, which keys of all sources together it attends to. Others are not read.
        scale, softcap: see `ModelConfig.score_scale` and `attention_softcap`.

    Returns:
        The weighted values in the dtype of q; 0 for a row that attends to nothing.
    """
    # Elsewhere than on a GPU, as in tests, Pallas interprets the kernel.
    interpret = jax.default_backend() != "gpu"
    run = partial(_device_attention, scale=scale, softcap=softcap, interpret=interpret)
    arrays = (q, visible.astype(jnp.int8), *(array for source in sources for array in source))
    axes = [("rows", "kv_heads", "group"), ("rows",), *[("rows", "kv_heads")] * 2 * len(sources)]
    return map_shards(run, axes, *arrays)


# The layers of a decoder call this function with the same shapes. Because it is jitted, they share one lowered kernel.
@partial(jax.jit, static_argnames=("scale", "softcap", "interpret"))
def _device_attention(
    q: Queries, visible: Array, *keys_values: Array, scale: float, softcap: float | None, interpret: bool
) -> Queries:
    """`attention` on one device, where `keys_values` are the keys and the values of each source in turn."""
    batch, kv_heads, _, _ = q.shape
    kernel = partial(_kernel, scale=scale, softcap=softcap)
    y: Array = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(batch, kv_heads),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )(q, visible, *keys_values)
    return y


def _kernel(q_ref: Any, visible_ref: Any, *refs: Any, scale: float, softcap: float | None) -> None:
    """One program of the kernel: all query heads of a key-value head, in a row."""
    *keys_values, y_ref = refs
    row, head = pl.program_id(0), pl.program_id(1)
    batch, _, group, head_dim = q_ref.shape
    # The sizes of blocks must be powers of two.
    queries, features = (
        jnp.arange(max(MIN_QUERIES, pl.next_power_of_2(group))),
        jnp.arange(pl.next_power_of_2(head_dim)),
    )
    is_feature = features[None] < head_dim
    is_output = (queries[:, None] < group) & is_feature
    q = triton.load(q_ref.at[row, head, queries[:, None], features[None]], mask=is_output, other=0)

    state = (
        jnp.full(queries.shape, jnp.finfo(jnp.float32).min),  # the running maximum of the scores
        jnp.zeros(queries.shape),  # the running sum of their powers
        jnp.zeros((queries.size, features.size)),  # the running sum of the weighted values
    )
    first = 0
    for keys_ref, values_ref in zip(keys_values[::2], keys_values[1::2], strict=True):
        source_row = row // (batch // keys_ref.shape[0])
        size = keys_ref.shape[2]

        def block(i: Any, state: Any, keys_ref: Any, values_ref: Any, source_row: Any, size: int, first: int) -> Any:
            largest, total, weighted = state
            slots = i * BLOCK + jnp.arange(BLOCK)
            is_visible = triton.load(visible_ref.at[row, first + slots], mask=slots < size, other=0) != 0
            place = (source_row, head, slots[:, None], features[None])
            is_read = is_visible[:, None] & is_feature
            # Both are loaded before they are needed, so that the program waits for memory once a block.
            keys = triton.load(keys_ref.at[place], mask=is_read, other=0)
            values = triton.load(values_ref.at[place], mask=is_read, other=0)
            scores = _product(q, keys.T) * scale
            if softcap is not None:
                scores = softcap * jnp.tanh(scores / softcap)
            scores = jnp.where(is_visible[None], scores, jnp.finfo(jnp.float32).min)
            new_largest = jnp.maximum(largest, scores.max(axis=1))
            powers = jnp.where(is_visible[None], jnp.exp(scores - new_largest[:, None]), 0)
            shrink = jnp.exp(largest - new_largest)
            weighted = weighted * shrink[:, None] + _product(powers.astype(values.dtype), values)
            return new_largest, total * shrink + powers.sum(axis=1), weighted

        body = partial(block, keys_ref=keys_ref, values_ref=values_ref, source_row=source_row, size=size, first=first)
        state = jax.lax.fori_loop(0, pl.cdiv(size, BLOCK), body, state)
        first += size
    _, total, weighted = state
    y = weighted / jnp.where(total == 0, 1, total)[:, None]
    triton.store(y_ref.at[row, head, queries[:, None], features[None]], y.astype(y_ref.dtype), mask=is_output)


def _product(a: Array, b: Array) -> Array:
    """The matrix product in float32; float32 inputs are not rounded to fewer bits."""
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def matches_reference(mesh: Mesh, dtype: str, head_dim: int) -> bool:
    """Whether the mesh consists of GPUs on which the kernel agrees with plain attention. One device is tested, once."""
    is_gpu = mesh.devices.flat[0].platform == "gpu"
    return is_gpu and from_first(lambda: _is_accurate(jax.local_devices()[0], dtype, head_dim))


@cache
def _is_accurate(device: jax.Device, dtype: str, head_dim: int) -> bool:
    try:
        error = relative_error(device, dtype, head_dim)
    except Exception as failure:  # whatever Triton or the driver says: the plain path computes the same
        warnings.warn(f"The decode attention kernel does not run on a {device.device_kind}: {failure}", stacklevel=2)
        return False
    if not error <= TOLERANCES[dtype]:
        warnings.warn(
            f"The decode attention kernel differs from plain attention by {error:.3g} on a {device.device_kind}, more "
            f"than {TOLERANCES[dtype]}; it is not used.",
            stacklevel=2,
        )
    return error <= TOLERANCES[dtype]


def relative_error(device: jax.Device, dtype: str, head_dim: int, interpret: bool = False) -> float:
    """The kernel's largest absolute error against plain attention, divided by the latter's largest absolute value.

    The inputs are random numbers of this dtype: two sources, of which one is shared by two rows, and random masks.
    """
    rng, scale = np.random.default_rng(0), head_dim**-0.5
    shapes = [(4, 2, 3, head_dim), *[(2, 2, 21, head_dim)] * 2, *[(4, 2, 100, head_dim)] * 2]
    # The inputs are drawn on the host, where nothing has to be compiled.
    q, *arrays = (rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in shapes)
    visible = rng.random((4, 121)) < 0.5
    inputs = jax.device_put((q, visible.astype(np.int8), *arrays), device)
    y = np.asarray(_device_attention(*inputs, scale=scale, softcap=None, interpret=interpret), np.float64)
    expected = plain_attention(q, arrays, visible, scale=scale, softcap=None)
    return float(np.abs(y - expected).max() / np.abs(expected).max())


def plain_attention(
    q: Any, keys_values: Sequence[Any], visible: Any, *, scale: float, softcap: float | None
) -> Float[np.ndarray, "batch kv_heads group head_dim"]:
    """`attention` by its definition, in float64 on the host."""
    q, *arrays = (np.asarray(x, np.float64) for x in (q, *keys_values))
    keys, values = (
        np.concatenate([np.repeat(x, len(q) // len(x), axis=0) for x in arrays[i::2]], axis=2) for i in (0, 1)
    )
    scores = np.einsum("bkgh,bksh->bkgs", q, keys) * scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(np.asarray(visible)[:, None, None], scores, -np.inf)
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bkgs,bksh->bkgh", powers / powers.sum(axis=-1, keepdims=True), values)
