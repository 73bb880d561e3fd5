"""The training step: its state, how the state is sharded, and the jitted program that updates it with AdamW."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxscape.finetuning.batches import Batch, mean_loss, put_batch
from jaxscape.finetuning.chats import Example
from jaxscape.finetuning.options import Training
from jaxscape.models import kernels
from jaxscape.models.checkpoint import Params, parameter_shardings
from jaxscape.models.config import ModelConfig
from jaxscape.models.lora import Factors, attach, init_factors
from jaxscape.models.loss import summed_loss
from jaxscape.models.model import Model
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.hardware import platform_jit
from jaxscape.runtime.sharding import mesh_shape_of, on_mesh, replicated


class State(NamedTuple):
    """What a training step changes. Weights, factors and moments are float32.

    Attributes:
        trainable: the model's weights, or an adapter's factors.
        optimizer: the state of AdamW: its moments, and the number of steps taken.
    """

    trainable: Any
    optimizer: Any


@dataclass(frozen=True)
class Settings:
    """What the training step is compiled for besides the model's configuration: a static argument, hence hashable.

    Attributes:
        mesh: the rows of a batch are sharded over `points`; weights that are trained in full, and their moments, over
            `model`. An adapter is replicated.
        dtype: the dtype in which the model computes; the state is float32.
        lora_scale: the factor alpha / rank of an adapter; None if the weights are trained in full.
        weight_decay, max_grad_norm: see `Training`.
        remat: recompute activations in the backward pass.
        kernel: compute attention with splash attention where that reduces memory traffic, see `jaxscape.models.loss`.
    """

    mesh: Mesh
    dtype: str
    lora_scale: float | None
    weight_decay: float
    max_grad_norm: float
    remat: bool
    kernel: bool


@dataclass(frozen=True, eq=False)
class Trainer:
    """What all steps of a training have in common.

    Attributes:
        frozen: the weights that are not trained: the base model of an adapter, or an empty tree.
    """

    config: ModelConfig
    settings: Settings
    frozen: Params

    def initial_state(self, trainable: Any) -> State:
        """The sharded state before the first step. Steps overwrite the buffers of `trainable`: do not use it again."""
        shapes = jax.eval_shape(lambda: State(trainable, optimizer(self.settings).init(trainable)))
        shardings = state_shardings(shapes, self.config, self.settings)
        trainable = jax.device_put(trainable, shardings.trainable)
        moments = jax.jit(optimizer(self.settings).init, out_shardings=shardings.optimizer)(trainable)
        return State(trainable, moments)

    def step(self, state: State, batch: Batch, learning_rate: float) -> tuple[State, dict[str, Float[Array, ""]]]:
        """The results of a `train_step`, which the devices compute while the host goes on."""
        batch, rate = put_batch(batch, self.settings.mesh), np.float32(learning_rate)
        return train_step(state, self.frozen, batch, rate, config=self.config, settings=self.settings)

    def mean_loss(self, trainable: Any, examples: Sequence[Example], batch_size: int) -> float:
        """The mean loss over the learned tokens of examples, in nats per token."""
        batch_loss = partial(_batch_loss, trainable, self.frozen, config=self.config, settings=self.settings)
        return mean_loss(batch_loss, examples, batch_size, self.settings.mesh)


def make_trainer(model: Model, training: Training, longest: int) -> Trainer:
    """A trainer on the devices of the model's mesh, for chats of up to `longest` tokens.

    Raises:
        UserError: the batch cannot be split over the devices.
    """
    check_batch(training.batch_size, model.mesh)
    settings = Settings(
        mesh=model.mesh,
        dtype=model.dtype,
        lora_scale=training.alpha / training.rank if training.method == "lora" else None,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        remat=training.remat,
        kernel=kernels.matches_reference(model.mesh),
    )
    frozen = jax.device_put(model.params, model.shardings) if training.method == "lora" else {}
    return Trainer(model.config.for_length(longest), settings, frozen)


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raise a `UserError` if the batch cannot be split over the devices along `points`."""
    if batch_size % (devices := mesh_shape_of(mesh).points):
        raise UserError(
            f"The batch size {batch_size} is not a multiple of the {devices} devices that share a batch: choose "
            f"another batch size or another --mesh."
        )


def state_shardings(shapes: State, config: ModelConfig, settings: Settings) -> State:
    """The sharding of each array of a state with these shapes.

    Weights that are trained in full, and their moments, are sharded as the model's parameters are; everything else is
    replicated.
    """
    everywhere = replicated(settings.mesh)
    if settings.lora_scale is not None:
        return jax.tree.map(lambda _: everywhere, shapes)
    weights = parameter_shardings(config, settings.mesh)
    moments = optax.tree.map_params(
        optimizer(settings),
        lambda _, sharding: sharding,
        shapes.optimizer,
        weights,
        transform_non_params=lambda _: everywhere,
    )
    return State(weights, moments)


def initial_trainable(model: Model, training: Training) -> Params | Factors:
    """The numbers to train, in float32: the factors of a new adapter for LoRA, else a copy of the model's weights."""
    if training.method == "lora":
        key = jax.random.key(training.seed, impl="threefry2x32")
        return init_factors(model.params, training.targets, training.rank, key)
    # A copy even of float32 weights: the training steps reuse its buffers, and the model's must stay as they are.
    return jax.tree.map(lambda weight: jnp.array(weight, jnp.float32, copy=True), model.params)


@platform_jit(static_argnames=("config", "settings"), donate_argnames="state")
def train_step(
    state: State,
    frozen: Params,
    batch: Batch,
    learning_rate: Float[Array, ""] | np.float32,
    *,
    config: ModelConfig,
    settings: Settings,
) -> tuple[State, dict[str, Float[Array, ""]]]:
    """One step of AdamW on the mean loss over the learned tokens of all accumulated batches.

    Gradients and the optimiser are float32; the model computes in `settings.dtype`. The step is compiled once for each
    width of a batch.

    Arguments:
        state: its buffers are donated.
        frozen: the weights that are not trained, see `Trainer`.
        batch: [accumulation, batch, time].

    Returns:
        The new state, and float32 metrics: `loss`, the mean loss before the step, and `grad_norm`, the norm of its
        gradient before clipping.
    """

    def accumulate(carry: tuple[Any, Array], rows: Batch) -> tuple[tuple[Any, Array], None]:
        def loss_of(trainable: Any) -> Float[Array, ""]:
            return _summed_loss(trainable, frozen, rows, config, settings)

        loss, gradient = jax.value_and_grad(loss_of)(state.trainable)
        return (jax.tree.map(jnp.add, carry[0], gradient), carry[1] + loss), None

    with on_mesh(settings.mesh):
        # 1. The gradient of the mean loss: summed over one batch after another, then divided by the learned tokens.
        count = jnp.maximum(batch.learned[..., 1:].sum(), 1)
        zeros = (jax.tree.map(jnp.zeros_like, state.trainable), jnp.float32(0))
        (gradient, loss), _ = jax.lax.scan(accumulate, zeros, batch)
        gradient = jax.tree.map(lambda g: g / count, gradient)

        # 2. The update of AdamW.
        updates, moments = optimizer(settings).update(gradient, state.optimizer, state.trainable)
        trainable = jax.tree.map(lambda w, u: w - learning_rate * u, state.trainable, updates)
        metrics = {"loss": loss / count, "grad_norm": optax.tree.norm(gradient)}
    state = State(trainable, moments)
    return jax.lax.with_sharding_constraint(state, state_shardings(state, config, settings)), metrics


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) without its learning rate, which is an argument of the step."""
    clip = [optax.clip_by_global_norm(settings.max_grad_norm)] if settings.max_grad_norm else []
    is_decayed = partial(jax.tree.map, lambda weight: weight.ndim > 1)
    return optax.chain(*clip, optax.scale_by_adam(), optax.add_decayed_weights(settings.weight_decay, is_decayed))


def _summed_loss(
    trainable: Any, frozen: Params, rows: Batch, config: ModelConfig, settings: Settings
) -> Float[Array, ""]:
    """The cross-entropy in nats, summed over the learned tokens of a [batch, time] batch."""
    params = _decoder_params(trainable, frozen, settings)
    return summed_loss(
        config, params, rows.tokens, rows.lengths, rows.learned, remat=settings.remat, kernel=settings.kernel
    )


def _decoder_params(trainable: Any, frozen: Params, settings: Settings) -> Params:
    """The parameters that the decoder computes with: the base model with the adapter, or the trained weights in
    `settings.dtype`."""
    if settings.lora_scale is not None:
        return attach(frozen, trainable, settings.lora_scale)
    return jax.tree.map(lambda weight: weight.astype(settings.dtype), trainable)


@platform_jit(static_argnames=("config", "settings"))
def _batch_loss(
    trainable: Any, frozen: Params, rows: Batch, *, config: ModelConfig, settings: Settings
) -> Float[Array, ""]:
    with on_mesh(settings.mesh):
        return _summed_loss(trainable, frozen, rows, config, settings)
