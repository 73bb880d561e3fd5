"""Training: options, batches of chats, the loss, and the jitted step that lowers it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxscape.chats import Chat, Example, tokenize
from jaxscape.errors import UserError, check_seed
from jaxscape.models import Model, kernels
from jaxscape.models.checkpoint import Params, parameter_shardings
from jaxscape.models.config import ModelConfig
from jaxscape.models.decoder import forward
from jaxscape.models.lora import TARGETS, Factors, attach, init_factors
from jaxscape.sharding import on, replicated, sharding, split_of

STEP_DECAY = 0.85  # a factor for each epoch: the paper's code, after llama-recipes
LEARNING_RATES = {"lora": 2e-4, "full": 5e-5}
SCHEDULES = ("cosine", "step", "constant")


@dataclass(frozen=True)
class Training:
    """How a model is finetuned.

    Attributes:
        method: `lora` trains an adapter, `full` every weight.
        epochs: how often each chat is learned.
        learning_rate: of AdamW, after the warm-up; by default 2e-4 with LoRA and 5e-5 in full, as in the paper.
        schedule: `cosine` falls to 0 at the end, `step` falls by 0.85 with each epoch as in the paper's code,
            `constant` stays.
        warmup: the part of all steps in which the learning rate rises from 0.
        batch_size: chats computed together, a multiple of the devices along `points`.
        accumulation: batches whose gradients are summed up for one step of the optimiser.
        weight_decay: decoupled (AdamW); of matrices, not of norms and biases.
        max_grad_norm: to which the gradient is clipped; 0 leaves it.
        rank: of the adapter, which adds alpha / rank · b a to a weight; b has as many columns.
        alpha: how strongly the adapter is added.
        targets: the linear layers that the adapter changes, by the last part of their names.
        max_length: tokens to which a chat is cut.
        validation: the part of the chats that is kept from training and evaluated after each epoch.
        remat: recompute activations in the backward pass: less memory, more time.
        seed: of the order of the chats, and of the adapter's start.
    """

    method: Literal["lora", "full"] = "lora"
    epochs: int = 5
    learning_rate: float | None = None
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup: float = 0.0
    batch_size: int = 8
    accumulation: int = 1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS
    max_length: int = 512
    validation: float = 0.0
    remat: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raise a `UserError` if an option is out of range."""
        for name, allowed in {"method": LEARNING_RATES, "schedule": SCHEDULES}.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"The {name} {getattr(self, name)!r} is unknown; choose {', '.join(allowed)}.")
        for name in ("epochs", "batch_size", "accumulation", "max_length", "rank"):
            if getattr(self, name) < 1:
                raise UserError(f"The option {name} must be at least 1, not {getattr(self, name)}.")
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"The option {name} must be a number from 0 up, not {getattr(self, name)}.")
        for name in ("warmup", "validation"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"The option {name} must be a part from 0 to below 1, not {getattr(self, name)}.")
        if not (0 < self.rate < math.inf and 0 < self.alpha < math.inf):
            raise UserError(f"The learning rate and alpha must be positive numbers, not {self.rate} and {self.alpha}.")
        if self.method == "lora" and not self.targets:
            raise UserError("Name at least one of the model's linear layers as a target.")
        check_seed(self.seed)

    @property
    def rate(self) -> float:
        """The learning rate, given or by default."""
        return LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate


class Batch(NamedTuple):
    """Right-padded chats, by accumulated batch and row; `learned` marks the tokens that count in the loss."""

    tokens: Int[np.ndarray | Array, "accumulation batch time"]
    lengths: Int[np.ndarray | Array, "accumulation batch"]
    learned: Float[np.ndarray | Array, "accumulation batch time"]


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
        kernel=kernels.usable(model.mesh),
    )
    frozen = jax.device_put(model.params, model.shardings) if training.method == "lora" else {}
    return Trainer(model.config.for_length(longest), settings, frozen)


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raise a `UserError` if a batch cannot be split over the devices of the mesh that share one."""
    if batch_size % (points := split_of(mesh).points):
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


def split(examples: Sequence[Example], part: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Those to learn from, and those held out; the order of both is that of the chats."""
    count = round(part * len(examples))
    if part and not 0 < count < len(examples):
        raise UserError(f"A part {part} of {len(examples)} chats cannot be held out for validation.")
    held_out = set(np.random.default_rng([seed, 0]).permutation(len(examples))[:count].tolist())
    groups: tuple[list[Example], list[Example]] = ([], [])
    for i, example in enumerate(examples):
        groups[i in held_out].append(example)
    return groups


def epoch_batches(lengths: Sequence[int], training: Training, epoch: int) -> list[list[int]]:
    """The examples of each step of an epoch: shuffled, and those of a step of similar lengths, which spares padding.

    Every example appears once. One step may have fewer than the others.
    """
    size = training.batch_size * training.accumulation
    rng = np.random.default_rng([training.seed, 1, epoch])
    order = rng.permutation(len(lengths))
    window = 8 * size  # sorted within, not as a whole: an epoch's batches must differ from the last one's
    order = np.concatenate(
        [sorted(part, key=lambda i: lengths[i]) for part in np.split(order, range(window, len(order), window))]
    ).astype(int)
    batches = np.split(order, range(size, len(order), size))
    return [batches[i].tolist() for i in rng.permutation(len(batches))]


def bucket(length: int) -> int:
    """The width to which a batch is padded: the next of 32, 48, 64, 96, 128, 192, … (few to compile, little lost)."""
    power = 2 ** max(5, math.ceil(math.log2(length)))
    return power * 3 // 4 if power > 32 and length <= power * 3 // 4 else power


def learning_rates(training: Training, steps_per_epoch: int) -> Float[np.ndarray, " steps"]:
    """float32, the learning rate of each step of a whole run."""
    steps = np.arange(steps_per_epoch * training.epochs)
    warmup = round(training.warmup * len(steps))
    factor: np.ndarray
    match training.schedule:
        case "cosine":
            factor = 0.5 * (1 + np.cos(np.pi * (steps - warmup) / (len(steps) - warmup)))
        case "step":
            factor = np.power(STEP_DECAY, steps // steps_per_epoch)
        case _:
            factor = np.ones(len(steps))
    rising = (steps + 1) / (warmup + 1)  # the first step is not at 0, where nothing would be learned
    return (training.rate * np.where(steps < warmup, rising, factor)).astype(np.float32)


def assemble(examples: Sequence[Example], accumulation: int, batch_size: int) -> Batch:
    """Examples as a batch of a width that few others differ from; rows that are left over are empty."""
    shape = (accumulation, batch_size)
    width = bucket(max(len(example.tokens) for example in examples))
    tokens = np.zeros((math.prod(shape), width), np.int32)
    learned = np.zeros(tokens.shape, np.float32)
    lengths = np.zeros(len(tokens), np.int32)
    for row, example in enumerate(examples):
        size = len(example.tokens)
        tokens[row, :size], learned[row, :size], lengths[row] = example.tokens, example.learned, size
    return Batch(tokens.reshape(*shape, width), lengths.reshape(shape), learned.reshape(*shape, width))


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
    with on(settings.mesh):
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
    devices = split_of(settings.mesh).size
    kernel = settings.kernel and kernels.helps(config, settings.dtype, count, width, devices)
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
    with on(settings.mesh):
        return total_loss(trainable, frozen, rows, config, settings), rows.learned[:, 1:].sum()


def perplexity(model: Model, chats: Sequence[Chat], *, max_length: int = 2048, batch_size: int = 16) -> float:
    """exp of the mean loss over the assistant's tokens, the end of turns not among them: an answer may have been cut.

    Raises:
        UserError: see `jaxscape.chats.tokenize`.
    """
    ends = np.array(model.eos_token_ids)
    examples = [
        Example(tokens, learned & ~np.isin(tokens, ends))
        for tokens, learned in tokenize(model, chats, max_length).examples
    ]
    if batch_size < 1:
        raise UserError(f"The batch size must be at least 1, not {batch_size}.")
    settings = Settings(model.mesh, model.dtype, None, 0.0, 0.0, remat=False, kernel=kernels.usable(model.mesh))
    points = split_of(model.mesh).points
    whole = -(-batch_size // points) * points
    config = model.config.for_length(max(len(example.tokens) for example in examples))
    return math.exp(Trainer(config, settings, {}).mean_loss(model.params, examples, whole))
