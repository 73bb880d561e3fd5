"""What the engine does differently on each platform."""

from dataclasses import dataclass

from jax.sharding import Mesh

from jaxscape.models import decode_attention
from jaxscape.models.cache import CPU_ORDER, GPU_ORDER, GPU_ORDER_WITHOUT_KERNEL, TPU_ORDER, CacheOrder
from jaxscape.models.config import ModelConfig
from jaxscape.runtime.hardware import Roofline
from jaxscape.runtime.sharding import mesh_shape_of


@dataclass(frozen=True)
class Platform:
    """The choices for a platform.

    Attributes:
        order: how the cache lies in memory and is read.
        order_without_kernel: the order where no kernel reads the cache; it is `order` where that has no kernel.
        fuses_projections: whether decoding is faster with fused projections, see `jaxscape.models.fusion`. On several
            devices along the mesh axis `model` they are never fused, because a fused matrix is sharded as one, and its
            parts would be exchanged.
        prefill_tokens: number of tokens in a full batch of `jaxscape.engine.prefill`, for each device along the mesh
            axis `points`: enough for large products to reach their full speed.
        prefill_sizes: number of sizes that such a batch may have. A program is compiled for each, which takes longer on
            an accelerator than computing some padding.
        draws_by_tensor: whether θ(c) is formed tensor by tensor where directions are drawn from their seeds. XLA for
            CPUs takes long to compile a program that draws all tensors, and such a program needs their memory at once.
        flops_share, bandwidth_share: the FLOP/s and the bandwidth that decoding reaches, divided by those of the
            measured roofline. On a GPU the bandwidth is measured with two rows, which read weights more slowly than a
            batch does, so its share is above 1.
    """

    order: CacheOrder
    order_without_kernel: CacheOrder
    fuses_projections: bool = False
    prefill_tokens: int = 8192
    prefill_sizes: int = 2
    draws_by_tensor: bool = False
    flops_share: float = 1.0
    bandwidth_share: float = 1.0

    def reached(self, measured: Roofline) -> Roofline:
        """The roofline that decoding reaches on a device with this measured one."""
        return Roofline(self.flops_share * measured.flops, self.bandwidth_share * measured.bandwidth)


PLATFORMS = {
    "cpu": Platform(CPU_ORDER, CPU_ORDER, prefill_tokens=1024, prefill_sizes=8, draws_by_tensor=True),
    "gpu": Platform(GPU_ORDER, GPU_ORDER_WITHOUT_KERNEL, fuses_projections=True, flops_share=0.75, bandwidth_share=1.5),
    "tpu": Platform(TPU_ORDER, TPU_ORDER),
}
"""The choices by the name that JAX gives to a device's platform."""


def platform_of(mesh: Mesh) -> Platform:
    """The choices for the devices of a mesh."""
    return PLATFORMS[mesh.devices.flat[0].platform]


def cache_order(mesh: Mesh, dtype: str, config: ModelConfig) -> CacheOrder:
    """The order of the cache for a model on these devices."""
    platform = platform_of(mesh)
    if platform.order.kernel and not decode_attention.matches_reference(mesh, dtype, config.head_dim):
        return platform.order_without_kernel
    return platform.order


def fuses_projections(mesh: Mesh, config: ModelConfig) -> bool:
    """Whether decoding would be faster with projections that are not fused yet."""
    return platform_of(mesh).fuses_projections and mesh_shape_of(mesh).model == 1 and not config.is_fused
