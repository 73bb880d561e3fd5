"""Training: options, batches of chats, the loss, and the jitted step that lowers it."""

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

from jaxscape.finetuning.batches import Batch, assemble
from jaxscape.finetuning.chats import Example
from jaxscape.finetuning.options import Training
from jaxscape.models import kernels
from jaxscape.models.checkpoint import Params, parameter_shardings
from jaxscape.models.config import ModelConfig
from jaxscape.models.decoder import forward
from jaxscape.models.lora import Factors, attach, init_factors
from jaxscape.models.model import Model
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.sharding import mesh_shape_of, on_mesh, replicated, sharding


class State(NamedTuple):
    """What training changes: weights or adapter factors in float32, and the optimiser's moments of them."""

    trainable: Any
    optimizer: Any


@dataclass(frozen=True)
class Settings:
    """What a step's program depends on, besides the model's configuration; hashable, a static argument.

    Attributes:
        mesh: the rows of a batch are split over `points`, weights that are trained in full and their moments over
            `model`; an adapter is on every device.
        kernel: compute attention by a kernel where it helps, see `jaxscape.models.kernels`.
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
    """What stays the same over the steps of a training.

    Attributes:
        frozen: the weights that are not trained: the base of an adapter, or nothing.
    """

    config: ModelConfig
    settings: Settings
    frozen: Params

    def start(self, trainable: Any) -> State:
        """The state before the first step; the buffers of `trainable` are used up."""
        shapes = jax.eval_shape(lambda: State(trainable, optimizer(self.settings).init(trainable)))
        where = state_shardings(shapes, self.config, self.settings)
        trainable = jax.device_put(trainable, where.trainable)
        moments = jax.jit(optimizer(self.settings).init, out_shardings=where.optimizer)(trainable)
        return State(trainable, moments)

    def step(self, state: State, batch: Batch, learning_rate: float) -> tuple[State, dict[str, Float[Array, ""]]]:
        """See `train_step`; dispatched, not waited for."""
        rate = np.float32(learning_rate)
        return train_step(state, self.frozen, self._put(batch), rate, config=self.config, settings=self.settings)

    def mean_loss(self, trainable: Any, examples: Sequence[Example], batch_size: int) -> float:
        """The mean loss over the learned tokens of examples, in nats."""
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
        parts = []
        for i in range(0, len(order), batch_size):
            batch = assemble([examples[j] for j in order[i : i + batch_size]], 1, batch_size)
            rows = jax.tree.map(lambda x: x[0], self._put(batch))
            parts.append(_loss_and_count(trainable, self.frozen, rows, config=self.config, settings=self.settings))
        losses, counts = zip(*jax.device_get(parts), strict=True)
        return float(sum(losses) / sum(counts))

    def _put(self, batch: Batch) -> Batch:
        def put(x: np.ndarray) -> Array:
            axes = (None, "rows", None)[: x.ndim]
            # `device_put` would compare what several processes hold, and wait for them.
            return jax.make_array_from_callback(x.shape, sharding(self.settings.mesh, axes, x.shape), x.__getitem__)

        return jax.tree.map(put, batch)


def make_trainer(model: Model, training: Training, longest: int) -> Trainer:
    """A trainer on the devices of the model's mesh, for texts of up to `longest` tokens.

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
    """Raise a `UserError` if a batch cannot be split over the devices of the mesh that share one."""
    if batch_size % (points := mesh_shape_of(mesh).points):
        raise UserError(f"The batch size {batch_size} is not a multiple of the {points} devices that share a batch.")


def state_shardings(shapes: State, config: ModelConfig, settings: Settings) -> State:
    """How a state of these shapes is split over the mesh."""
    everywhere = replicated(settings.mesh)
    if settings.lora_scale is not None:
        return jax.tree.map(lambda _: everywhere, shapes)
    where = parameter_shardings(config, settings.mesh)
    moments = optax.tree.map_params(
        optimizer(settings),
        lambda _, there: there,
        shapes.optimizer,
        where,
        transform_non_params=lambda _: everywhere,
    )
    return State(where, moments)


def initial_trainable(model: Model, training: Training) -> Params | Factors:
    """What is trained, in float32: a new adapter's factors, or a copy of the model's weights."""
    if training.method == "lora":
        key = jax.random.key(training.seed, impl="threefry2x32")
        return init_factors(model.params, training.targets, training.rank, key)
    # Copied also where it is float32 already: the steps reuse the buffers, and the model stays the caller's.
    return jax.tree.map(lambda weight: jnp.array(weight, jnp.float32, copy=True), model.params)


@partial(jax.jit, static_argnames=("config", "settings"), donate_argnames="state")
def train_step(
    state: State,
    frozen: Params,
    batch: Batch,
    learning_rate: Float[Array, ""] | np.float32,
    *,
    config: ModelConfig,
    settings: Settings,
) -> tuple[State, dict[str, Float[Array, ""]]]:
    """One step of AdamW on the mean loss over all learned tokens of the accumulated batches.

    Compiled once for each width of a batch. Gradients and the optimiser are float32; the model computes in
    `settings.dtype`.
    """
    with on_mesh(settings.mesh):
        state, metrics = _stepped(state, frozen, batch, learning_rate, config, settings)
    return jax.lax.with_sharding_constraint(state, state_shardings(state, config, settings)), metrics


def _stepped(
    state: State,
    frozen: Params,
    batch: Batch,
    learning_rate: Float[Array, ""] | np.float32,
    config: ModelConfig,
    settings: Settings,
) -> tuple[State, dict[str, Float[Array, ""]]]:
    count = jnp.maximum(batch.learned[..., 1:].sum(), 1)

    def accumulate(carry: tuple[Any, Array], rows: Batch) -> tuple[tuple[Any, Array], None]:
        loss, gradient = jax.value_and_grad(total_loss)(state.trainable, frozen, rows, config, settings)
        return (jax.tree.map(jnp.add, carry[0], gradient), carry[1] + loss), None

    nothing = (jax.tree.map(jnp.zeros_like, state.trainable), jnp.float32(0))
    (gradient, loss), _ = jax.lax.scan(accumulate, nothing, batch)
    gradient = jax.tree.map(lambda g: g / count, gradient)
    updates, moments = optimizer(settings).update(gradient, state.optimizer, state.trainable)
    trainable = jax.tree.map(lambda w, u: w - learning_rate * u, state.trainable, updates)
    return State(trainable, moments), {"loss": loss / count, "grad_norm": optax.tree.norm(gradient)}


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) without its learning rate, which is an argument of the step."""
    clip = [optax.clip_by_global_norm(settings.max_grad_norm)] if settings.max_grad_norm else []
    decayed = partial(jax.tree.map, lambda weight: weight.ndim > 1)
    return optax.chain(*clip, optax.scale_by_adam(), optax.add_decayed_weights(settings.weight_decay, decayed))


def total_loss(
    trainable: Any, frozen: Params, rows: Batch, config: ModelConfig, settings: Settings
) -> Float[Array, ""]:
    """The cross-entropy in nats, summed over the learned tokens of [batch, time] rows."""
    params = weights_of(trainable, frozen, settings)
    count, width = rows.tokens.shape
    time = jnp.arange(width)
    positions = jnp.where(time < rows.lengths[:, None], time, -1)
    devices = mesh_shape_of(settings.mesh).size
    kernel = settings.kernel and kernels.saves_traffic(config, settings.dtype, count, width, devices)
    logits, _ = forward(config, params, jnp.asarray(rows.tokens), positions, remat=settings.remat, kernel=kernel)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], rows.tokens[:, 1:])
    return (loss * rows.learned[:, 1:]).sum()


def weights_of(trainable: Any, frozen: Params, settings: Settings) -> Params:
    """The decoder's parameters in the dtype it computes in."""
    if settings.lora_scale is not None:
        return attach(frozen, trainable, settings.lora_scale)
    return jax.tree.map(lambda weight: weight.astype(settings.dtype), trainable)


@partial(jax.jit, static_argnames=("config", "settings"))
def _loss_and_count(
    trainable: Any, frozen: Params, rows: Batch, *, config: ModelConfig, settings: Settings
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    with on_mesh(settings.mesh):
        return total_loss(trainable, frozen, rows, config, settings), rows.learned[:, 1:].sum()
