"""Supervised finetuning of a chat model: full, or a low-rank adapter."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from rich.progress import Progress

from jaxscape import rundir
from jaxscape.chats import Chat, Example, tokenize
from jaxscape.errors import UserError, check_seed
from jaxscape.models import Model, huggingface, save_model
from jaxscape.models.checkpoint import Params, fingerprint, named_leaves, tree_of
from jaxscape.models.config import ModelConfig
from jaxscape.models.decoder import forward
from jaxscape.models.lora import TARGETS, Adapter, Factors, attach, init_factors, merged, save_adapter
from jaxscape.progress import report_to

STEP_DECAY = 0.85  # a factor for each epoch: the paper's code, after llama-recipes
LEARNING_RATES = {"lora": 2e-4, "full": 5e-5}
ADAPTER, MODEL, CHECKPOINTS, OPTIMIZER = "adapter", "model", "checkpoints", "optimizer"
FINETUNING = rundir.Kind(
    "finetuning",
    state="log.jsonl",
    marks=frozenset({"weights", "chats", "learning_rate"}),
    computed=(ADAPTER, MODEL, CHECKPOINTS, OPTIMIZER),
)


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
        batch_size: chats computed together; over several devices, a multiple of their number.
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
        for name, allowed in {"method": LEARNING_RATES, "schedule": ("cosine", "step", "constant")}.items():
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
        check_seed(self.seed)

    @property
    def rate(self) -> float:
        """The learning rate, given or by default."""
        return LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate


@dataclass(frozen=True, eq=False)
class Finetuned:
    """What a finetuning gives.

    Attributes:
        model: the finetuned model; an adapter is merged into it.
        adapter: of a LoRA finetuning.
        log: what stands in `log.jsonl`: a record for each step, and one for each validation.
    """

    model: Model
    adapter: Adapter | None
    log: list[dict[str, Any]]


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
    """What a step's program depends on, besides the model's configuration; hashable, a static argument."""

    dtype: str
    lora_scale: float | None
    weight_decay: float
    max_grad_norm: float
    remat: bool


def finetune(
    model: Model,
    chats: Sequence[Chat],
    training: Training | None = None,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    describe: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Finetuned:
    """Finetune a chat model on the assistant's turns of chats, on every device that JAX has (data-parallel).

    Arguments:
        chats: see `jaxscape.load_chats`.
        training: how; by default an adapter in five epochs.
        out: a directory for the log, a checkpoint of each epoch, and the result (`adapter/` or `model/`). An unfinished
            finetuning there goes on after its last epoch, and ends with the weights of an unbroken one.
        describe: anything JSON can hold that should also stand in the configuration.
        progress: whether to report on the standard error stream.

    Raises:
        UserError: something that was given cannot be used; or the loss or its gradient stops being finite, in which
            case the checkpoints of the epochs before stay.
    """
    training = training or Training()
    training.check()
    data = tokenize(model, chats, training.max_length)
    learning, held_out = split(data.examples, training.validation, training.seed)
    plan = [
        batch
        for epoch in range(training.epochs)
        for batch in epoch_batches([len(example.tokens) for example in learning], training, epoch)
    ]
    steps_per_epoch = len(plan) // training.epochs
    rates = learning_rates(training, steps_per_epoch)
    devices = np.array(jax.devices())
    if training.batch_size % devices.size:
        raise UserError(
            f"The batch size {training.batch_size} is not a multiple of the {devices.size} devices that share a batch."
        )
    mesh = Mesh(devices, ("data",))
    dtype = str(jax.tree.leaves(model.params)[0].dtype)
    settings = Settings(
        dtype,
        training.alpha / training.rank if training.method == "lora" else None,
        training.weight_decay,
        training.max_grad_norm,
        training.remat,
    )
    state, frozen = _start(model, training, settings, mesh)
    config = {
        "model": model.name,
        "weights": fingerprint(model.params),
        "dtype": dtype,
        "chats": rundir.checksum([(e.tokens.tolist(), e.learned.tolist()) for e in data.examples]),
        "num_chats": len(chats),
        "num_cut": data.num_cut,
        **asdict(training),
        "learning_rate": training.rate,
        **(describe or {}),
    }
    with rundir.opened(out, config, FINETUNING, overwrite) as file, report_to(progress) as bar:
        keeper = None if out is None else _Keeper(Path(out).absolute())
        state, epoch = (state, 0) if keeper is None else keeper.restore(state, training.epochs)
        log = _Log(file, epoch * steps_per_epoch)
        if epoch:
            bar.print(f"going on after epoch {epoch} of {training.epochs}")
        if data.num_cut:
            bar.print(f"{data.num_cut} of {len(chats)} chats were cut to {training.max_length} tokens")
        while epoch < training.epochs:
            steps = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
            batches = (_assemble(learning, plan[step], training) for step in steps)
            state = _train_epoch(state, frozen, steps, batches, rates, model.config, settings, mesh, log, bar)
            epoch += 1
            record = {"epoch": epoch, "loss": log.mean_loss(steps)}
            if held_out:
                loss = evaluate_loss(state.trainable, frozen, held_out, training, model.config, settings, mesh)
                record["validation_loss"] = loss
                log.write({"step": steps[-1] + 1, "epoch": epoch, "validation_loss": loss})
            bar.print("  ".join(f"{key} {value:.4g}" for key, value in record.items()))
            if keeper is not None:
                keeper.save(epoch, state, last=epoch == training.epochs)
        result = _result(model, training, state.trainable, log.records)
        if out is not None:
            _write_result(result, Path(out))
    return result


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
    steps = steps_per_epoch * training.epochs
    warmup = round(training.warmup * steps)
    match training.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(training.rate, max(steps - warmup, 1))
        case "step":
            after = optax.exponential_decay(training.rate, steps_per_epoch, STEP_DECAY, staircase=True)
        case _:
            after = optax.constant_schedule(training.rate)
    # The first step is not at 0, where nothing would be learned. Step decay counts epochs from the start of the run.
    shift = 0 if training.schedule == "step" else warmup
    schedule = [training.rate * (i + 1) / (warmup + 1) if i < warmup else after(i - shift) for i in range(steps)]
    return np.array(schedule, np.float32)


@partial(jax.jit, static_argnames=("config", "settings"), donate_argnames="state")
def train_step(
    state: State,
    frozen: Params,
    batch: Batch,
    learning_rate: Float[Array, ""],
    *,
    config: ModelConfig,
    settings: Settings,
) -> tuple[State, dict[str, Float[Array, ""]]]:
    """One step of AdamW on the mean loss over all learned tokens of the accumulated batches.

    Compiled once for each width of a batch. Gradients and the optimiser are float32; the model computes in
    `settings.dtype`.
    """
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
    time = jnp.arange(rows.tokens.shape[1])
    positions = jnp.where(time < rows.lengths[:, None], time, -1)
    logits, _ = forward(config, params, jnp.asarray(rows.tokens), positions, remat=settings.remat)
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
    return total_loss(trainable, frozen, rows, config, settings), rows.learned[:, 1:].sum()


def evaluate_loss(
    trainable: Any,
    frozen: Params,
    examples: Sequence[Example],
    training: Training,
    config: ModelConfig,
    settings: Settings,
    mesh: Mesh,
) -> float:
    """The mean loss over the learned tokens of examples, in nats."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    single = replace(training, accumulation=1)
    parts = []
    for i in range(0, len(order), training.batch_size):
        batch = _assemble(examples, order[i : i + training.batch_size], single)
        rows = jax.tree.map(lambda x: x[0], _put(batch, mesh))
        parts.append(_loss_and_count(trainable, frozen, rows, config=config, settings=settings))
    losses, counts = zip(*jax.device_get(parts), strict=True)
    return float(sum(losses) / sum(counts))


def _train_epoch(
    state: State,
    frozen: Params,
    steps: range,
    batches: Iterator[Batch],
    rates: Float[np.ndarray, " steps"],
    config: ModelConfig,
    settings: Settings,
    mesh: Mesh,
    log: "_Log",
    bar: Progress,
) -> State:
    task = bar.add_task("finetune", total=len(rates), completed=steps.start)
    pending: tuple[dict[str, Any], Any] | None = None
    for step, batch in zip(steps, batches, strict=True):
        record = {"step": step + 1, "epoch": (step // len(steps)) + 1, "learning_rate": float(rates[step])}
        record["tokens"] = int(batch.lengths.sum())
        state, metrics = train_step(
            state, frozen, _put(batch, mesh), jnp.float32(rates[step]), config=config, settings=settings
        )
        # The last step's numbers are fetched when this one is on its way: the device does not wait for the host.
        if pending is not None:
            log.step(*pending)
        pending = (record, metrics)
        bar.update(task, completed=step + 1, description=f"loss {log.last_loss:.3f}")
    if pending is not None:
        log.step(*pending)
    bar.remove_task(task)
    return state


def _assemble(examples: Sequence[Example], chosen: Sequence[int], training: Training) -> Batch:
    shape = (training.accumulation, training.batch_size)
    width = bucket(max(len(examples[i].tokens) for i in chosen))
    tokens = np.zeros((math.prod(shape), width), np.int32)
    learned = np.zeros(tokens.shape, np.float32)
    lengths = np.zeros(len(tokens), np.int32)
    for row, i in enumerate(chosen):
        size = len(examples[i].tokens)
        tokens[row, :size], learned[row, :size], lengths[row] = examples[i].tokens, examples[i].learned, size
    return Batch(tokens.reshape(*shape, width), lengths.reshape(shape), learned.reshape(*shape, width))


def _put(batch: Batch, mesh: Mesh) -> Batch:
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(None, "data")))


def _start(model: Model, training: Training, settings: Settings, mesh: Mesh) -> tuple[State, Params]:
    everywhere = NamedSharding(mesh, PartitionSpec())
    trainable = jax.device_put(_trainable(model, training), everywhere)
    frozen = jax.device_put(model.params, everywhere) if training.method == "lora" else {}
    return State(trainable, jax.device_put(optimizer(settings).init(trainable), everywhere)), frozen


def _trainable(model: Model, training: Training) -> Params | Factors:
    if training.method == "lora":
        key = jax.random.key(training.seed, impl="threefry2x32")
        return init_factors(model.params, training.targets, training.rank, key)
    # A copy: the steps reuse its buffers, and the model stays the caller's.
    return jax.tree.map(lambda weight: jnp.array(weight, jnp.float32, copy=True), model.params)


def _result(model: Model, training: Training, trainable: Any, log: list[dict[str, Any]]) -> Finetuned:
    trainable = jax.device_get(trainable)
    if training.method == "full":
        params = jax.tree.map(lambda new, old: jnp.asarray(new).astype(old.dtype), trainable, model.params)
        return Finetuned(replace(model, params=params), None, log)
    adapter = Adapter(model.name, training.rank, training.alpha, training.targets, trainable)
    return Finetuned(with_adapter(model, adapter), adapter, log)


def with_adapter(model: Model, adapter: Adapter) -> Model:
    """The model with an adapter merged into its weights."""
    leaves = named_leaves(model.params)
    for name, pair in adapter.factors.items():
        leaves[name] = jnp.asarray(merged(leaves[name], pair, adapter.scale)).astype(leaves[name].dtype)
    return replace(model, params=tree_of(leaves))


def _write_result(result: Finetuned, out: Path) -> None:
    if result.adapter is None:
        save_model(result.model, out / MODEL)
    else:
        save_adapter(result.adapter, out / ADAPTER)


class _Log:
    """`log.jsonl`: a line for each step. What a killed run wrote after its last checkpoint is cut off."""

    def __init__(self, file: BinaryIO | None, steps: int) -> None:
        self.file = file
        self.records: list[dict[str, Any]] = []
        self.last_loss = math.nan
        self._clock = time.monotonic()
        if file is not None:
            file.seek(0)
            lines = file.read().split(b"\n")[:-1]
            kept = [line for line in lines if json.loads(line)["step"] <= steps]
            self.records = [json.loads(line) for line in kept]
            file.truncate(sum(len(line) + 1 for line in kept))

    def step(self, record: dict[str, Any], metrics: Any) -> None:
        """Wait for a step's numbers, check them, and write them down."""
        numbers = {key: float(value) for key, value in jax.device_get(metrics).items()}
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise UserError(
                    f"At step {record['step']} the {name.replace('_', ' ')} is {value}: training stopped. The "
                    f"checkpoints of the epochs before stay; start over with a lower learning rate."
                )
        now = time.monotonic()
        speed = record["tokens"] / max(now - self._clock, 1e-9)
        self._clock, self.last_loss = now, numbers["loss"]
        self.write(record | numbers | {"tokens_per_second": round(speed, 1)})

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.file is not None:
            self.file.write(json.dumps(record).encode() + b"\n")
            self.file.flush()

    def mean_loss(self, steps: range) -> float:
        return float(np.mean([r["loss"] for r in self.records if "loss" in r and r["step"] - 1 in steps]))


class _Keeper:
    """A checkpoint of the weights for each epoch, and one of the optimiser, for the last epoch on disk, from which an
    unfinished run goes on. The weights are written first, so that an epoch with an optimiser always has both."""

    def __init__(self, out: Path) -> None:
        self.weights = _manager(out / CHECKPOINTS, None)
        self.moments = _manager(out / OPTIMIZER, 1)

    def restore(self, start: State, epochs: int) -> tuple[State, int]:
        """The state to go on from, and the number of its epoch: the start and 0 if there is none on disk."""
        finished = epochs in self.weights.all_steps()
        epoch = epochs if finished else self.moments.latest_step()
        if epoch is None:
            return start, 0
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, start)
        try:
            weights = self.weights.restore(epoch, args=ocp.args.StandardRestore(like.trainable))
            if finished:
                return start._replace(trainable=weights), epoch
            return State(weights, self.moments.restore(epoch, args=ocp.args.StandardRestore(like.optimizer))), epoch
        except Exception as error:  # Orbax and its storage raise many types for what is missing or damaged
            raise UserError(
                f"The checkpoint of epoch {epoch} cannot be read ({type(error).__name__}); start over with --overwrite."
            ) from error

    def save(self, epoch: int, state: State, *, last: bool) -> None:
        if epoch in self.weights.all_steps():  # of a run that was killed between the two
            self.weights.delete(epoch)
        self.weights.save(epoch, args=ocp.args.StandardSave(state.trainable))
        if last:
            for step in self.moments.all_steps():
                self.moments.delete(step)
        else:
            self.moments.save(epoch, args=ocp.args.StandardSave(state.optimizer))


def load_path(directory: str | Path, model: Model) -> Iterator[Params]:
    """How far a finetuning moved the weights by the end of each epoch: float32 trees like `model.params`, one by one.

    Arguments:
        directory: where `finetune` kept the run.
        model: what the finetuning started from.

    Raises:
        UserError: there is no finetuning in the directory, it started from another model, or it is damaged.
    """
    directory = Path(directory)
    config = huggingface.read_json(directory / rundir.CONFIG)
    if not config.keys() >= FINETUNING.marks:
        raise UserError(f"{directory} holds no finetuning; give the directory that one was kept in.")
    if config["weights"] != fingerprint(model.params):
        raise UserError(f"The finetuning in {directory} started from other weights than {model.name} has.")
    try:
        options = {option.name: config[option.name] for option in fields(Training)}
        training = Training(**options | {"targets": tuple(options["targets"])})
    except (KeyError, TypeError) as error:
        raise UserError(f"{directory / rundir.CONFIG} is damaged ({type(error).__name__}: {error}).") from error
    weights = _manager((directory / CHECKPOINTS).absolute(), None)
    if not weights.all_steps():
        raise UserError(f"The finetuning in {directory} has not finished an epoch yet.")
    like = jax.eval_shape(lambda: _trainable(model, training))
    for epoch in sorted(weights.all_steps()):
        try:
            trainable = weights.restore(epoch, args=ocp.args.StandardRestore(like))
        except Exception as error:  # Orbax and its storage raise many types for what is missing or damaged
            raise UserError(
                f"The checkpoint of epoch {epoch} in {directory} cannot be read ({type(error).__name__})."
            ) from error
        if training.method == "full":
            yield jax.tree.map(lambda new, old: new - old.astype(jnp.float32), trainable, model.params)
        else:
            steps = {name: jnp.zeros(leaf.shape, jnp.float32) for name, leaf in named_leaves(model.params).items()}
            for name, pair in trainable.items():
                steps[name] = jnp.asarray(merged(steps[name], pair, training.alpha / training.rank))
            yield tree_of(steps)


def _manager(directory: Path, max_to_keep: int | None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, enable_async_checkpointing=False)
    return ocp.CheckpointManager(directory, options=options)


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
    training = Training(batch_size=batch_size)
    settings = Settings(str(jax.tree.leaves(model.params)[0].dtype), None, 0.0, 0.0, remat=False)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    return math.exp(evaluate_loss(model.params, {}, examples, training, model.config, settings, mesh))
