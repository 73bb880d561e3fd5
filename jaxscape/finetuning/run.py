"""Supervised finetuning of a chat model: the run, its log and checkpoints, and its result."""

import json
import math
import time
from collections.abc import Mapping, Sequence
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
from jaxscape.finetuning.batches import Batch, assemble, epoch_batches, hold_out, learning_rates
from jaxscape.finetuning.chats import Chat, Example, Examples, tokenize
from jaxscape.finetuning.options import Training
from jaxscape.finetuning.training import State, Trainer, initial_trainable, make_trainer
from jaxscape.models import builtin
from jaxscape.models.checkpoint import fingerprint, named_leaves, tree_of
from jaxscape.models.lora import Adapter, Factors, module_name, save_adapter, with_factors
from jaxscape.models.model import Model, check_saveable, save_model
from jaxscape.runtime import remote, rundir
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import checksum, cut_after, whole_lines
from jaxscape.runtime.processes import from_first, is_visible_to_all
from jaxscape.runtime.progress import progress_display
from jaxscape.runtime.reporting import Reporter, check_target, open_reporter


@dataclass(frozen=True, eq=False)
class Finetuned:
    """The result of a finetuning.

    Attributes:
        model: the finetuned model; an adapter is merged into its weights.
        adapter: the adapter of a LoRA finetuning; None after full finetuning.
        log: the records of `log.jsonl`: one for each step, and one for each validation.
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
    thinking: str = "default",
    report_to: str = "none",
) -> Finetuned:
    """Finetune a chat model on the assistant's turns of chats, on the devices of the model's mesh.

    Arguments:
        chats: see `jaxscape.load_chats`.
        training: the options; by default `Training()`, which trains an adapter.
        start: an adapter of this model that is trained further, instead of a new one. Its rank, alpha and targets must
            be those of `training`.
        out: the run's directory, for the log, a checkpoint of each epoch, and the result (`adapter/` or `model/`). An
            unfinished finetuning there is resumed after its last finished epoch, and ends with the same weights as an
            uninterrupted one. (On a GPU this needs `XLA_FLAGS=--xla_gpu_deterministic_ops=true`, because the order of
            its sums varies otherwise.) None keeps nothing on disk.
        overwrite: start over if the directory holds a run.
        describe: further entries of the run's `config.json`: anything that JSON can hold.
        progress: whether to report progress on the standard error stream.
        thinking: `on` or `off` switches thinking in the chats, see `jaxscape.prompts.chat_format.render`.
        report_to: the program to which the records of the log are reported, `wandb` or `tensorboard`, see
            `jaxscape.runtime.reporting`; it needs `out`.

    Raises:
        UserError: an argument cannot be used, or the loss or its gradient is no longer finite. In the latter case the
            checkpoints of the finished epochs stay.
    """
    training = training or Training()
    training.check()
    directory = None if out is None else remote.run_directory(out)
    check_target(report_to, directory)
    if directory is not None:
        _check_out(directory, model, training)
    data = tokenize(model, chats, training.max_length, thinking)
    schedule = make_schedule(data.examples, training)
    trainer = make_trainer(model, training, max(len(example.tokens) for example in data.examples))
    state = trainer.initial_state(_trainable(model, training, start))
    config = _config(model, data, training, start) | dict(describe or {})
    config |= {"thinking": thinking} if thinking != "default" else {}
    with (
        rundir.open_run_directory(directory, config, FINETUNING, overwrite) as file,
        open_reporter(report_to, directory, config) as reporter,
        progress_display(progress) as bar,
    ):
        checkpoints, done = None if directory is None else _open_checkpoints(directory), 0
        if checkpoints is not None:
            state, done = checkpoints.restore(state, training.epochs)
        log = TrainingLog(file, done * schedule.steps_per_epoch, reporter)
        if done:
            bar.print(f"resuming after epoch {done} of {training.epochs}")
        if data.num_cut:
            bar.print(f"{data.num_cut} of {len(chats)} chats were cut to {training.max_length} tokens")
        for epoch in range(done, training.epochs):
            state = _train_epoch(trainer, state, schedule, epoch, log, bar)
            _finish_epoch(trainer, state, schedule, epoch, log, bar)
            if checkpoints is not None:
                checkpoints.save(epoch + 1, state, last=epoch + 1 == training.epochs)
                remote.push(checkpoints.directory)
        result = _result(model, training, state.trainable, log.records)
        if directory is not None:
            _write_result(result, directory)
    return result


def _check_out(out: Path, model: Model, training: Training) -> None:
    """Raise a `UserError` if the result could not be written to the directory, or would replace the model itself."""
    if training.method == "full":
        check_saveable(model)
    if _lies_in(model.name, out):
        raise UserError(
            f"The model {model.name} lies in {remote.shown(str(out))}, the directory that its finetuning would be "
            f"written to: choose another --out."
        )


def _lies_in(name: str, out: Path) -> bool:
    """Whether the model of this name lies in the directory of a run. Either both have a URL, or none."""
    if (url := remote.url_of(name)) is not None:
        return Path(url).is_relative_to(remote.shown(str(out)))
    return Path(name).resolve().is_relative_to(out.resolve())


def _config(model: Model, data: Examples, training: Training, start: Adapter | None) -> dict[str, Any]:
    """The run's `config.json`: all that determines its result."""
    return {
        **model.described(),
        "chats": checksum([(tokens.tolist(), learned.tolist()) for tokens, learned in data.examples]),
        "num_chats": len(data.examples),
        "num_cut": data.num_cut,
        **asdict(training),
        "learning_rate": training.rate,
        "start": None if start is None else fingerprint(start.factors),
    }


def _trainable(model: Model, training: Training, start: Adapter | None) -> Any:
    """The numbers to train, in float32: a copy of the factors of the adapter `start`, or without one those of
    `initial_trainable`."""
    new = initial_trainable(model, training)
    if start is None:
        return new
    shapes = jax.tree.map(jnp.shape, start.factors)
    if training.method != "lora" or start.alpha != training.alpha or shapes != jax.tree.map(jnp.shape, new):
        raise UserError(
            "The adapter to start from cannot be trained further with these options: choose the method lora, and the "
            "rank, alpha and targets of the adapter."
        )
    scaled = sorted(name for name, scale in start.scales.items() if scale != start.scale)
    if extra := sorted({*scaled, *start.magnitudes, *start.replaced}):
        raise UserError(
            f"The adapter to start from changes {extra[0]} by more than the product of its factors times alpha / rank, "
            f"and only such products can be trained further: merge it into its base, and start from the result."
        )
    factors: Factors = jax.tree.map(lambda factor: jnp.array(factor, jnp.float32, copy=True), start.factors)
    return factors


@dataclass(frozen=True, eq=False)
class StepSchedule:
    """The chats and the learning rate of each step of a run. Steps and epochs count from 0.

    Attributes:
        training: the options of the run.
        examples: the examples to learn from.
        held_out: the examples for validation.
        indices: for each step, the indices of its examples.
        learning_rates: float32[steps].
        steps_per_epoch: the number of steps of each epoch.
    """

    training: Training
    examples: list[Example]
    held_out: list[Example]
    indices: list[list[int]]
    learning_rates: Float[np.ndarray, " steps"]
    steps_per_epoch: int

    def steps(self, epoch: int) -> range:
        """The steps of an epoch."""
        return range(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch)

    def batch(self, step: int) -> Batch:
        """The batch of a step, [accumulation, batch, time]."""
        examples = [self.examples[i] for i in self.indices[step]]
        return assemble(examples, self.training.accumulation, self.training.batch_size)


def make_schedule(examples: Sequence[Example], training: Training) -> StepSchedule:
    """The steps of a run.

    Raises:
        UserError: the validation fraction holds out no example, or all of them, see `hold_out`.
    """
    learning, held_out = hold_out(examples, training.validation, training.seed)
    lengths = [len(example.tokens) for example in learning]
    indices = [chosen for epoch in range(training.epochs) for chosen in epoch_batches(lengths, training, epoch)]
    steps_per_epoch = len(indices) // training.epochs
    rates = learning_rates(training, steps_per_epoch)
    return StepSchedule(training, learning, held_out, indices, rates, steps_per_epoch)


def _train_epoch(
    trainer: Trainer, state: State, schedule: StepSchedule, epoch: int, log: "TrainingLog", bar: Progress
) -> State:
    """Take the steps of an epoch, and log each of them."""
    steps, rates = schedule.steps(epoch), schedule.learning_rates
    log.start_clock()
    task = bar.add_task("finetune", total=len(rates), completed=steps.start)
    pending: tuple[dict[str, Any], Any] | None = None
    for step in steps:
        batch, rate = schedule.batch(step), float(rates[step])
        state, metrics = trainer.step(state, batch, rate)
        # The previous step's metrics are fetched only now, so that the device does not wait for the host.
        if pending is not None:
            log.write_step(*pending)
        record = {"step": step + 1, "epoch": epoch + 1, "learning_rate": rate, "tokens": int(batch.lengths.sum())}
        pending = (record, metrics)
        bar.update(task, completed=step + 1, description=f"loss {log.last_loss:.3f}")
    if pending is not None:
        log.write_step(*pending)
    bar.remove_task(task)
    return state


def _finish_epoch(
    trainer: Trainer, state: State, schedule: StepSchedule, epoch: int, log: "TrainingLog", bar: Progress
) -> None:
    """Compute the validation loss, if chats are held out, and report the losses of the epoch."""
    steps = schedule.steps(epoch)
    losses = {"epoch": epoch + 1, "loss": log.mean_loss(steps)}
    if schedule.held_out:
        losses["validation_loss"] = trainer.mean_loss(state.trainable, schedule.held_out, schedule.training.batch_size)
        record = {"step": steps[-1] + 1, "epoch": epoch + 1, "validation_loss": losses["validation_loss"]}
        log.write(record)
    bar.print("  ".join(f"{name} {value:.4g}" for name, value in losses.items()))


def _result(model: Model, training: Training, trainable: Any, log: list[dict[str, Any]]) -> Finetuned:
    if training.method == "full":
        params = jax.tree.map(lambda new, old: new.astype(old.dtype), trainable, model.params)
        return Finetuned(replace(model, params=params), None, log)
    is_path = model.name not in builtin.NAMES and Path(model.name).exists()
    # An absolute path, so that the adapter finds its base model from every working directory.
    base = str(Path(model.name).resolve()) if is_path else model.name
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


class TrainingLog:
    """The records of `log.jsonl`: a line for each step and for each validation.

    Attributes:
        records: all records so far.
        last_loss: the loss of the last step; NaN before the first.
    """

    def __init__(self, file: BinaryIO | None, num_steps: int, reporter: Reporter) -> None:
        """Read the records of the first `num_steps` steps from the file, and delete the later ones from it, which a
        killed run wrote after its last checkpoint. Without a file, the records are only in memory.

        Arguments:
            reporter: is given the numbers of each further record.

        Raises:
            UserError: the file is damaged.
        """
        self.file, self.reporter = file, reporter
        self.records: list[dict[str, Any]] = []
        self.last_loss = math.nan
        self.start_clock()
        if file is not None:
            lines = whole_lines(file)
            try:
                records = [json.loads(line) for line in lines]
                num_kept = sum(record["step"] <= num_steps for record in records)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f"{file.name} is damaged ({reason(error)}): start over with --overwrite.") from error
            self.records = records[:num_kept]
            cut_after(file, lines[:num_kept])

    def start_clock(self) -> None:
        """Start timing the next step now, so that what came before, such as a validation, does not lower its speed."""
        self._clock = time.monotonic()

    def write_step(self, record: dict[str, Any], metrics: Any) -> None:
        """Wait for the metrics of a step, and write its record with them and its speed in tokens per second.

        Raises:
            UserError: a metric is not finite.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise UserError(
                    f"At step {record['step']} the {name.replace('_', ' ')} is {value}: training stopped. The "
                    f"checkpoints of the finished epochs stay; start over with a lower learning rate."
                )
        now = time.monotonic()
        speed = record["tokens"] / max(now - self._clock, 1e-9)
        self._clock, self.last_loss = now, values["loss"]
        self.write(record | values | {"tokens_per_second": round(speed, 1)})

    def write(self, record: dict[str, Any]) -> None:
        """Append a record, flush the file, and report the record."""
        self.records.append(record)
        self.reporter.log(record["step"], {name: value for name, value in record.items() if name != "step"})
        if self.file is not None:
            self.file.write(json.dumps(record).encode() + b"\n")
            self.file.flush()

    def mean_loss(self, steps: range) -> float:
        """The mean of the logged losses of these steps, which count from 0."""
        return float(np.mean([r["loss"] for r in self.records if "loss" in r and r["step"] - 1 in steps]))


class Checkpoints:
    """The checkpoints of a run: the weights (or adapter factors) of every epoch, and the optimiser's state of the last.

    The weights of an epoch are written before its optimiser's state, so an epoch whose optimiser's state is on disk has
    both, and an unfinished run is resumed from it. A checkpoint's number is the number of epochs that are done.
    """

    def __init__(self, out: Path) -> None:
        self.directory = out
        self.weights = checkpoint_manager(out / CHECKPOINTS, None)
        self.moments = checkpoint_manager(out / OPTIMIZER, 1)

    def restore(self, start: State, num_epochs: int) -> tuple[State, int]:
        """The state to resume from, and the number of epochs that are done; `start` and 0 if there is no checkpoint.

        A finished run has no optimiser's state on disk; the returned state then has that of `start`.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        is_finished = from_first(lambda: num_epochs in self.weights.all_steps())
        epoch = num_epochs if is_finished else from_first(self.moments.latest_step)
        if epoch is None:
            return start, 0
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, start)
        try:
            weights = self.weights.restore(epoch, args=ocp.args.StandardRestore(shapes.trainable))
            if is_finished:
                return start._replace(trainable=weights), epoch
            return State(weights, self.moments.restore(epoch, args=ocp.args.StandardRestore(shapes.optimizer))), epoch
        except Exception as error:  # Orbax and its storage raise many types for what is missing or damaged
            raise UserError(
                f"The checkpoint of epoch {epoch} cannot be read ({type(error).__name__}): start over with --overwrite."
            ) from error

    def save(self, epoch: int, state: State, *, last: bool) -> None:
        """Write the checkpoint of an epoch. After the last epoch, delete the optimiser's state: it is not needed.

        Raises:
            UserError: the checkpoint cannot be written.
        """
        try:
            if epoch in self.weights.all_steps():  # from a run that was killed before it wrote the optimiser
                self.weights.delete(epoch)
            self.weights.save(epoch, args=ocp.args.StandardSave(state.trainable))
            if last:
                for step in self.moments.all_steps():
                    self.moments.delete(step)
            else:
                self.moments.save(epoch, args=ocp.args.StandardSave(state.optimizer))
        except Exception as error:  # Orbax and its storage raise many types for a full disk
            raise UserError(
                f"The checkpoint of epoch {epoch} cannot be written ({reason(error)}): free some disk space, and run "
                f"the same command again."
            ) from error


def _open_checkpoints(out: Path) -> Checkpoints:
    """The checkpoints in the directory of a run.

    Raises:
        UserError: not every process sees the directory.
    """
    if remote.is_remote(out) and jax.process_count() > 1:
        raise UserError(f"Several processes cannot write one finetuning to a URL ({out}): choose a directory.")
    if not is_visible_to_all(out / rundir.CONFIG):
        raise UserError(f"Each process writes its part of the checkpoints, so all must see the same --out ({out}).")
    return Checkpoints(out.absolute())
