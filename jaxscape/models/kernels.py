"""Attention without its matrix of scores, by a kernel for TPUs that comes with JAX, where that moves fewer bytes."""

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
from jaxscape.runtime.sharding import partition

LANES = 128  # of a TPU's vector registers: what the kernel's blocks and heads are made of
ON_CHIP = 64 * 2**20  # bytes; scores that take less the compiler keeps out of memory by itself
LARGEST = 512  # tokens of a block
TOLERANCE = 0.02  # a few roundings to bfloat16, which has 8 bits

Queries = Float[Array, "batch kv_heads group time head_dim"]
Keys = Float[Array, "batch kv_heads time head_dim"]


def saves_traffic(config: ModelConfig, dtype: str, rows: int, time: int, devices: int) -> bool:
    """Whether the kernel can be used for so many rows of so many tokens, and moves fewer bytes than the plain path."""
    scores = 4 * rows * config.num_heads * time**2 / devices
    is_plain = config.attention_softcap is None and all(kind.window is None for kind in config.layers)
    fits = dtype == "bfloat16" and config.head_dim % LANES == time % LANES == 0
    return is_plain and fits and scores > ON_CHIP


def attention_flops(config: ModelConfig, rows: int, time: int, passes: int) -> float:
    """Of the kernel in a gradient, which the compiler does not count: two products in each of so many forward passes
    and five in the backward one, of the blocks that causal attention reads."""
    blocks = time // _block(time)
    read = (blocks + 1) / (2 * blocks)
    return (2 * passes + 5) * 2 * rows * config.num_layers * config.num_heads * time**2 * config.head_dim * read


def attention(q: Queries, k: Keys, v: Keys, real: Bool[Array, "batch time"]) -> Queries:
    """Causal attention (FlashAttention, Dao et al., arXiv 2205.14135), each device computing its rows and heads.

    Arguments:
        q: with the scale of the scores.
        real: which tokens are none of the padding; the outputs at the others mean nothing.
    """
    axes = (("rows", "kv_heads", "group"), ("rows", "kv_heads"), ("rows", "kv_heads"), ("rows",))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _own(q, k, v, real)
    specs = tuple(
        partition(mesh, (*names, *(None,) * (x.ndim - len(names))), x.shape)
        for names, x in zip(axes, (q, k, v, real), strict=True)
    )
    return jax.shard_map(_own, in_specs=specs, out_specs=specs[0], check_vma=False)(q, k, v, real)


def _own(q: Queries, k: Keys, v: Keys, real: Bool[Array, "batch time"]) -> Queries:
    group, time = q.shape[2:4]
    block = _block(time)
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

    def row(q: Array, k: Array, v: Array, real: Array) -> Array:
        text = real.astype(jnp.int32)  # of which a token attends to its own alone
        return jax.vmap(lambda *head: kernel(*head, segment_ids=splash.SegmentIds(text, text)))(q, k, v)

    y: Array = jax.vmap(row)(q, k, v, real)
    return y


def _block(time: int) -> int:
    return math.gcd(time, LARGEST)


def matches_reference(mesh: Mesh) -> bool:
    """Whether the mesh is one of TPUs on which the kernel gives what the plain path does; it is tried, once."""
    return mesh.devices.flat[0].platform == "tpu" and from_first(lambda: _agrees(jax.local_devices()[0]))


@cache
def _agrees(device: jax.Device) -> bool:
    found = difference(device)
    if not found <= TOLERANCE:
        warnings.warn(
            f"JAX's attention kernel is {found:.3f} off on a {device.device_kind}: it is not used.", stacklevel=2
        )
    return found <= TOLERANCE


def difference(device: jax.Device) -> float:
    """The largest difference between the kernel and attention as it is defined, as a part of the largest number: of the
    outputs, and of the gradients of queries, keys and values, for some random ones in bfloat16."""
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), 4)
    shapes = [(2, 2, 2, 2 * LANES, LANES), *[(2, 2, 2 * LANES, LANES)] * 2, (2, 2, 2, 2 * LANES, LANES)]
    with jax.default_device(device):
        *inputs, weights = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True))
        inputs[0] *= LANES**-0.5
        real = jnp.arange(2 * LANES) < jnp.array([[2 * LANES], [LANES + 1]])
        weights *= real[:, None, None, :, None]

        @partial(jax.jit, static_argnums=0)
        def of(attend: Callable[..., Array], *inputs: Array) -> tuple[Array, ...]:
            ys, backward = jax.vjp(lambda *x: attend(*x, real), *inputs)
            return ys * (weights != 0), *backward(weights)

        pairs = zip(of(attention, *inputs), of(_defined, *inputs), strict=True)
        return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


def _defined(q: Queries, k: Keys, v: Keys, real: Bool[Array, "batch time"]) -> Queries:
    scores = jnp.einsum("bkgqh,bksh->bkgqs", q, k, preferred_element_type=jnp.float32)
    visible = jnp.tril(jnp.ones((q.shape[-2],) * 2, bool)) & real[:, None]
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bkgqs,bksh->bkgqh", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
