"""What a run would take on TPUs that are not here: its programs, compiled by the TPU compiler from shapes alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxscape.finetuning.batches import Batch, bucket
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
    where: Slice,
    *,
    batch_size: int,
    length: int,
    remat: bool,
    mesh_shape: MeshShape | None = None,
    dtype: str = "bfloat16",
    quick: bool = False,
) -> ProgramCost:
    """A step of full finetuning: float32 weights and moments, computing in `dtype`; `quick` as in `forecast`.

    Arguments:
        length: tokens of a chat, which are padded as `jaxscape.training.bucket` says.

    Raises:
        UserError: there is no such batch, or the mesh does not divide it.
    """
    if min(batch_size, length) < 1:
        raise UserError(f"A batch of {batch_size} chats of {length} tokens is none.")
    shape, length = shape_on(config, where, mesh_shape, dtype), bucket(length)
    check_batch(batch_size, shape.mesh)
    counts = compile_all(shape, lambda shape: _lowered_step(shape, batch_size, length, remat), where, quick)["step"]
    devices = mesh_shape_of(shape.mesh).size
    if kernels.saves_traffic(config, dtype, batch_size, length, devices):
        flops = kernels.attention_flops(config, batch_size, length, passes=2 if remat else 1)
        counts = counts._replace(flops=counts.flops + flops / devices)
    return program_cost(
        counts, chip_for_dtype(where, dtype), bytes_per_chip(shape.params)
    )  # the model that it started from


def _lowered_step(shape: ModelShape, batch_size: int, length: int, remat: bool) -> Programs:
    config = shape.config.for_length(length)
    settings = Settings(shape.mesh, shape.dtype, None, 0.0, 1.0, remat, kernel=True)
    trainable = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), shape.params)
    state: Any = jax.eval_shape(lambda weights: State(weights, optimizer(settings).init(weights)), trainable)
    there = state_shardings(state, config, settings)
    state = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, there)
    everywhere = replicated(shape.mesh)
    rows = (1, batch_size, length)
    batch = Batch(np.zeros(rows, np.int32), np.zeros(rows[:2], np.int32), np.zeros(rows, np.float32))
    axes = (None, "rows", None)
    batch, rate = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding(shape.mesh, axes[: x.ndim], x.shape) if x.ndim else everywhere
        ),
        (batch, np.float32(0)),
    )
    return {
        "step": (
            lambda: train_step.lower(state, {}, batch, rate, config=config, settings=settings),
            hlo.program_traffic,
        )
    }
