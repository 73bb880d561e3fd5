"""Supervised finetuning of a chat model: a run that is logged, kept and resumed, and its result."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Float
from rich.progress import Progress

from jaxscape.directions.path import ADAPTER, CHECKPOINTS, FINETUNING, MODEL, OPTIMIZER, checkpoint_manager
from jaxscape.finetuning.batches import Batch, assemble, epoch_batches, learning_rates, split
from jaxscape.finetuning.chats import Chat, tokenize
from jaxscape.finetuning.options import Training
from jaxscape.finetuning.training import State, Trainer, initial_trainable, make_trainer
from jaxscape.models import builtin
from jaxscape.models.checkpoint import fingerprint, named_leaves, tree_of
from jaxscape.models.lora import Adapter, Factors, module_name, save_adapter, with_factors
from jaxscape.models.model import Model, check_saveable, save_model
from jaxscape.runtime import rundir
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.files import checksum, cut_after, whole_lines
from jaxscape.runtime.processes import from_first, is_visible_to_all
from jaxscape.runtime.progress import progress_display


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


def finetune(
    model: Model,
    chats: Sequence[Chat],
    training: Training | None = None,
    *,
    start: Adapter | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    describe: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Finetuned:
    """Finetune a chat model on the assistant's turns of chats, on the devices of its mesh.

    Arguments:
        chats: see `jaxscape.load_chats`.
        training: how; by default an adapter in five epochs.
        start: an adapter of this model to go on training, instead of a new one; of the same rank, alpha and targets.
        out: a directory for the log, a checkpoint of each epoch, and the result (`adapter/` or `model/`). An unfinished
            finetuning there goes on after its last epoch, and ends with the weights of an unbroken one (on a GPU, with
            `XLA_FLAGS=--xla_gpu_deterministic_ops=true`: its sums are not ordered otherwise).
        describe: anything JSON can hold that should also stand in the configuration.
        progress: whether to report on the standard error stream.

    Raises:
        UserError: something that was given cannot be used; or the loss or its gradient stops being finite, in which
            case the checkpoints of the epochs before stay.
    """
    training = training or Training()
    training.check()
    if out is not None:
        if training.method == "full":
            check_saveable(model)
        if Path(model.name).resolve().is_relative_to(Path(out).resolve()):
            raise UserError(
                f"The model {model.name} lies in {out}, where its own finetuning would go; choose another --out."
            )
    data = tokenize(model, chats, training.max_length)
    learning, held_out = split(data.examples, training.validation, training.seed)
    lengths = [len(example.tokens) for example in learning]
    plan = [batch for epoch in range(training.epochs) for batch in epoch_batches(lengths, training, epoch)]
    steps_per_epoch = len(plan) // training.epochs
    rates = learning_rates(training, steps_per_epoch)
    trainer = make_trainer(model, training, max(len(example.tokens) for example in data.examples))
    trainable = initial_trainable(model, training)
    if start is not None:
        trainable = _factors_of(start, training, trainable)
    state = trainer.start(trainable)
    config = {
        "model": model.name,
        "weights": fingerprint(model.params),
        "dtype": model.dtype,
        "chats": checksum([(e.tokens.tolist(), e.learned.tolist()) for e in data.examples]),
        "num_chats": len(chats),
        "num_cut": data.num_cut,
        **asdict(training),
        "learning_rate": training.rate,
        "start": None if start is None else fingerprint(start.factors),
        **(describe or {}),
    }
    with rundir.open_run_directory(out, config, FINETUNING, overwrite) as file, progress_display(progress) as bar:
        if out is not None and not is_visible_to_all(Path(out) / rundir.CONFIG):
            raise UserError(f"Each process keeps its part of the checkpoints: all must see the same --out ({out}).")
        keeper = None if out is None else _Keeper(Path(out).absolute())
        state, epoch = (state, 0) if keeper is None else keeper.restore(state, training.epochs)
        log = _Log(file, epoch * steps_per_epoch)
        if epoch:
            bar.print(f"going on after epoch {epoch} of {training.epochs}")
        if data.num_cut:
            bar.print(f"{data.num_cut} of {len(chats)} chats were cut to {training.max_length} tokens")
        while epoch < training.epochs:
            steps = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
            batches = (
                assemble([learning[i] for i in plan[step]], training.accumulation, training.batch_size)
                for step in steps
            )
            state = _train_epoch(trainer, state, steps, batches, rates, log, bar)
            epoch += 1
            record = {"epoch": epoch, "loss": log.mean_loss(steps)}
            if held_out:
                loss = trainer.mean_loss(state.trainable, held_out, training.batch_size)
                record["validation_loss"] = loss
                log.write({"step": steps[-1] + 1, "epoch": epoch, "validation_loss": loss})
            bar.print("  ".join(f"{key} {value:.4g}" for key, value in record.items()))
            if keeper is not None:
                keeper.save(epoch, state, last=epoch == training.epochs)
        result = _result(model, training, state.trainable, log.records)
        if out is not None:
            _write_result(result, Path(out))
    return result


def _factors_of(adapter: Adapter, training: Training, new: Any) -> Factors:
    """A copy of an adapter's factors in float32, if they are such as the new ones are."""
    shapes = jax.tree.map(jnp.shape, adapter.factors)
    if training.method != "lora" or adapter.alpha != training.alpha or shapes != jax.tree.map(jnp.shape, new):
        raise UserError("Only a LoRA training of the same rank, alpha and targets can go on from an adapter.")
    return jax.tree.map(lambda factor: jnp.array(factor, jnp.float32, copy=True), adapter.factors)


def _train_epoch(
    trainer: Trainer,
    state: State,
    steps: range,
    batches: Iterator[Batch],
    rates: Float[np.ndarray, " steps"],
    log: "_Log",
    bar: Progress,
) -> State:
    log.start_clock()
    task = bar.add_task("finetune", total=len(rates), completed=steps.start)
    pending: tuple[dict[str, Any], Any] | None = None
    for step, batch in zip(steps, batches, strict=True):
        state, metrics = trainer.step(state, batch, float(rates[step]))
        # The last step's numbers are fetched when this one is on its way: the device does not wait for the host.
        if pending is not None:
            log.step(*pending)
        record = {"step": step + 1, "epoch": step // len(steps) + 1, "learning_rate": float(rates[step])}
        pending = (record | {"tokens": int(batch.lengths.sum())}, metrics)
        bar.update(task, completed=step + 1, description=f"loss {log.last_loss:.3f}")
    if pending is not None:
        log.step(*pending)
    bar.remove_task(task)
    return state


def _result(model: Model, training: Training, trainable: Any, log: list[dict[str, Any]]) -> Finetuned:
    if training.method == "full":
        params = jax.tree.map(lambda new, old: new.astype(old.dtype), trainable, model.params)
        return Finetuned(replace(model, params=params), None, log)
    is_path = model.name not in builtin.NAMES and Path(model.name).exists()
    base = str(Path(model.name).resolve()) if is_path else model.name  # also found from another working directory
    targets = tuple(sorted(set(map(module_name, trainable))))
    adapter = Adapter(base, training.rank, training.alpha, targets, jax.device_get(trainable))
    return Finetuned(with_adapter(model, adapter), adapter, log)


def with_adapter(model: Model, adapter: Adapter) -> Model:
    """The model with an adapter merged into its weights."""
    leaves = named_leaves(model.params)
    for name, pair in adapter.factors.items():
        leaves[name] = with_factors(leaves[name], pair, adapter.scale)
    return replace(model, params=tree_of(leaves))


def _write_result(result: Finetuned, out: Path) -> None:
    adapter = result.adapter
    if adapter is None:
        save_model(result.model, out / MODEL)
    else:
        from_first(lambda: save_adapter(adapter, out / ADAPTER))


class _Log:
    """`log.jsonl`: a line for each step. What a killed run wrote after its last checkpoint is cut off."""

    def __init__(self, file: BinaryIO | None, steps: int) -> None:
        self.file = file
        self.records: list[dict[str, Any]] = []
        self.last_loss = math.nan
        self.start_clock()
        if file is not None:
            lines = whole_lines(file)
            try:
                self.records = [json.loads(line) for line in lines]
                kept = sum(record["step"] <= steps for record in self.records)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f"{file.name} is damaged ({error}); start over with --overwrite.") from error
            self.records = self.records[:kept]
            cut_after(file, lines[:kept])

    def start_clock(self) -> None:
        """What has passed until now is not a step's time."""
        self._clock = time.monotonic()

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
        self.weights = checkpoint_manager(out / CHECKPOINTS, None)
        self.moments = checkpoint_manager(out / OPTIMIZER, 1)

    def restore(self, start: State, epochs: int) -> tuple[State, int]:
        """The state to go on from, and the number of its epoch: the start and 0 if there is none on disk."""
        finished = from_first(lambda: epochs in self.weights.all_steps())
        epoch = epochs if finished else from_first(self.moments.latest_step)
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
        try:
            if epoch in self.weights.all_steps():  # of a run that was killed between the two
                self.weights.delete(epoch)
            self.weights.save(epoch, args=ocp.args.StandardSave(state.trainable))
            if last:
                for step in self.moments.all_steps():
                    self.moments.delete(step)
            else:
                self.moments.save(epoch, args=ocp.args.StandardSave(state.optimizer))
        except Exception as error:  # Orbax and its storage raise many types for a full disk
            raise UserError(
                f"The checkpoint of epoch {epoch} cannot be written ({type(error).__name__}: {str(error)[:200]}); make "
                f"room, and give the same command again."
            ) from error
