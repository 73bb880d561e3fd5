"""The forecast of a finetuning step on a TPU slice that is not here."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxscape.engine.batching import bucket
from jaxscape.finetuning.batches import Batch
from jaxscape.finetuning.training import Settings, State, check_batch, optimizer, state_shardings, train_step
from jaxscape.forecast import hlo
from jaxscape.forecast.chips import Slice, bytes_per_chip, chip_for_dtype, shape_on
from jaxscape.forecast.compile import ProgramCost, Programs, compile_all, program_cost
from jaxscape.models import kernels
from jaxscape.models.config import ModelConfig
from jaxscape.models.shape import ModelShape
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.sharding import MeshShape, mesh_shape_of, replicated, sharding


def finetune_step(
    config: ModelConfig,
    tpu_slice: Slice,
    *,
    batch_size: int,
    length: int,
    remat: bool,
    mesh_shape: MeshShape | None = None,
    dtype: str = "bfloat16",
    quick: bool = False,
) -> ProgramCost:
    """The time and memory that a step of full finetuning takes on each chip, with float32 master weights and moments.

    Arguments:
        batch_size: number of chats in a step.
        length: number of tokens of each chat. Chats are padded to `jaxscape.engine.batching.bucket(length)`.
        remat: recompute activations in the backward pass instead of keeping them.
        mesh_shape: by default the weights are sharded over the fewest chips that can hold them.
        dtype: the dtype of the forward and backward passes.
        quick: compile the step for one and for two layers only, and extrapolate linearly to all layers.

    Raises:
        UserError: a number is less than 1, or the batch size is not a multiple of the mesh's `points`.
    """
    if min(batch_size, length) < 1:
        raise UserError(
            f"A batch of {batch_size} chats of {length} tokens cannot be planned: both numbers must be at least 1."
        )
    shape, length = shape_on(config, tpu_slice, mesh_shape, dtype), bucket(length)
    check_batch(batch_size, shape.mesh)
    counts = compile_all(shape, lambda shape: _programs(shape, batch_size, length, remat), tpu_slice, quick)["step"]
    devices = mesh_shape_of(shape.mesh).size
    if kernels.saves_traffic(config, dtype, batch_size, length, devices):
        # The compiler does not count the FLOPs inside a kernel.
        flops = kernels.attention_flops(config, batch_size, length, passes=2 if remat else 1)
        counts = counts._replace(flops=counts.flops + flops / devices)
    starting_model = bytes_per_chip(shape.params)  # stays in memory beside its master weights
    return program_cost(counts, chip_for_dtype(tpu_slice, dtype), starting_model)


def _programs(shape: ModelShape, batch_size: int, length: int, remat: bool) -> Programs:
    """The training step as the only program to compile, under the name `step`."""
    config = shape.config.for_length(length)
    settings = Settings(shape.mesh, shape.dtype, None, 0.0, 1.0, remat, kernel=True)
    trainable = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), shape.params)
    state: Any = jax.eval_shape(lambda weights: State(weights, optimizer(settings).init(weights)), trainable)
    shardings = state_shardings(state, config, settings)
    state = jax.tree.map(lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec), state, shardings)
    rows = (1, batch_size, length)
    batch = Batch(np.zeros(rows, np.int32), np.zeros(rows[:2], np.int32), np.zeros(rows, np.float32))

    def sharded_over_rows(x: np.ndarray) -> jax.ShapeDtypeStruct:
        spec = sharding(shape.mesh, (None, "rows", None)[: x.ndim], x.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec)

    batch = jax.tree.map(sharded_over_rows, batch)
    learning_rate = jax.ShapeDtypeStruct((), np.float32, sharding=replicated(shape.mesh))
    return {
        "step": (
            lambda: train_step.lower(state, {}, batch, learning_rate, config=config, settings=settings),
            hlo.program_traffic,
        )
    }
