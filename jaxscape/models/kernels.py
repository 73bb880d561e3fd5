"""Splash attention, JAX's attention kernel for TPUs, and the rules for when it replaces the decoder's own attention."""

import math
import warnings
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from jaxscape.models.config import ModelConfig
from jaxscape.runtime.processes import from_first
from jaxscape.runtime.sharding import map_shards

# The number of lanes of a TPU's vector registers. The kernel's block size and head dimension must be multiples of it.
LANES = 128
ON_CHIP_BYTES = 64 * 2**20  # XLA keeps smaller score matrices in on-chip memory, where the kernel would save nothing
MAX_BLOCK = 512  # the kernel's largest block size, in tokens
# The largest relative error at which the kernel is used: a few roundings to bfloat16, which has 8 significant bits.
TOLERANCE = 0.02

Queries = Float[Array, "batch kv_heads group time head_dim"]
Keys = Float[Array, "batch kv_heads time head_dim"]


def saves_traffic(config: ModelConfig, dtype: str, rows: int, time: int, devices: int) -> bool:
    """Whether the kernel supports this model and batch, and moves fewer bytes than the decoder's own attention.

    It moves fewer because the scores stay on the chip.

    Arguments:
        rows, time: the batch's rows and tokens per row.
        devices: the number of devices that the batch and the heads are sharded over.
    """
    score_bytes = 4 * rows * config.num_heads * time**2 / devices
    is_causal_only = config.attention_softcap is None and all(kind.window is None for kind in config.layers)
    fits_blocks = dtype == "bfloat16" and config.head_dim % LANES == time % LANES == 0
    return is_causal_only and fits_blocks and score_bytes > ON_CHIP_BYTES


def attention_flops(config: ModelConfig, rows: int, time: int, passes: int) -> float:
    """FLOPs of the kernel in a training step, on all devices together. XLA's own count leaves the kernel out.

    A forward pass has two matrix products (scores, and weighted values) and the backward pass five. Each takes
    2 × rows × layers × heads × time² × head_dim FLOPs, times the part of the blocks that causal attention computes:
    of n × n blocks, the n (n + 1) / 2 on and below the diagonal.

    Arguments:
        passes: forward passes; 2 if the backward pass repeats the forward pass (`remat`).
    """
    blocks = time // _block_size(time)
    causal_part = (blocks + 1) / (2 * blocks)
    return (2 * passes + 5) * 2 * rows * config.num_layers * config.num_heads * time**2 * config.head_dim * causal_part


def attention(q: Queries, k: Keys, v: Keys, is_token: Bool[Array, "batch time"]) -> Queries:
    """Causal attention by the kernel (FlashAttention, Dao et al., arXiv 2205.14135), on each device for its shard.

    Arguments:
        q: queries, already multiplied by the scale of the scores.
        is_token: False for padding; the outputs there are meaningless.
    """
    axes = (("rows", "kv_heads", "group"), ("rows", "kv_heads"), ("rows", "kv_heads"), ("rows",))
    return map_shards(_device_attention, axes, q, k, v, is_token)


def _device_attention(q: Queries, k: Keys, v: Keys, is_token: Bool[Array, "batch time"]) -> Queries:
    """`attention` on one device."""
    group, time = q.shape[2:4]
    block = _block_size(time)
    kernel = splash.make_splash_mqa_single_device(
        masks.MultiHeadMask([masks.CausalMask((time, time))] * group),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            use_fused_bwd_kernel=True,
        ),
    )

    def row_attention(q: Array, k: Array, v: Array, is_token: Array) -> Array:
        segments = is_token.astype(jnp.int32)  # tokens attend only within their segment: text is 1, padding 0
        return jax.vmap(lambda *head: kernel(*head, segment_ids=splash.SegmentIds(segments, segments)))(q, k, v)

    y: Array = jax.vmap(row_attention)(q, k, v, is_token)
    return y


def _block_size(time: int) -> int:
    return math.gcd(time, MAX_BLOCK)


def matches_reference(mesh: Mesh) -> bool:
    """Whether the mesh consists of TPUs on which the kernel agrees with plain attention. One device is tested, once."""
    return mesh.devices.flat[0].platform == "tpu" and from_first(lambda: _is_accurate(jax.local_devices()[0]))


@cache
def _is_accurate(device: jax.Device) -> bool:
    error = relative_error(device)
    if not error <= TOLERANCE:
        warnings.warn(
            f"JAX's attention kernel differs from plain attention by {error:.3f} on a {device.device_kind}, more than "
            f"{TOLERANCE}; it is not used.",
            stacklevel=2,
        )
    return error <= TOLERANCE


def relative_error(device: jax.Device) -> float:
    """The relative error of the kernel, measured against plain attention for random bfloat16 inputs.

    It is computed for the outputs and for the gradients of queries, keys and values, and the largest of these four is
    returned: in each, the largest absolute difference divided by the largest absolute number of plain attention.
    """
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), 4)
    shapes = [(2, 2, 2, 2 * LANES, LANES), *[(2, 2, 2 * LANES, LANES)] * 2, (2, 2, 2, 2 * LANES, LANES)]
    with jax.default_device(device):
        *inputs, weights = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True))
        inputs[0] *= LANES**-0.5
        is_token = jnp.arange(2 * LANES) < jnp.array([[2 * LANES], [LANES + 1]])
        weights *= is_token[:, None, None, :, None]

        @partial(jax.jit, static_argnums=0)
        def outputs_and_gradients(attend: Callable[..., Array], *inputs: Array) -> tuple[Array, ...]:
            y, backward = jax.vjp(lambda *x: attend(*x, is_token), *inputs)
            return y * (weights != 0), *backward(weights)

        pairs = zip(
            outputs_and_gradients(attention, *inputs), outputs_and_gradients(_plain_attention, *inputs), strict=True
        )
        return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


def _plain_attention(q: Queries, k: Keys, v: Keys, is_token: Bool[Array, "batch time"]) -> Queries:
    """`attention` by its definition, with the scores in memory."""
    scores = jnp.einsum("bkgqh,bksh->bkgqs", q, k, preferred_element_type=jnp.float32)
    visible = jnp.tril(jnp.ones((q.shape[-2],) * 2, bool)) & is_token[:, None]
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bkgqs,bksh->bkgqh", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
