"""Batches of training chats: which chats each step learns from, their padding, and the mean loss over batches."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxscape.engine.batching import bucket
from jaxscape.finetuning.chats import Example
from jaxscape.finetuning.options import STEP_DECAY, Training
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.sharding import sharding

# An epoch's shuffled chats are divided into groups, each with the chats of this many steps, and sorted by length within
# each group.
SHUFFLED_STEPS = 8


class Batch(NamedTuple):
    """The tokens of several chats, right-padded to one width.

    A training step takes arrays of shape [accumulation, batch, time]; what only computes a loss takes [batch, time].

    Attributes:
        tokens: int32[..., batch, time].
        lengths: int32[..., batch], the number of tokens of each chat; 0 for a row without a chat.
        learned: float32[..., batch, time], 1 for the tokens that count in the loss and 0 for the others.
    """

    tokens: Int[np.ndarray | Array, "*accumulation batch time"]
    lengths: Int[np.ndarray | Array, "*accumulation batch"]
    learned: Float[np.ndarray | Array, "*accumulation batch time"]


def hold_out(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split examples into those to learn from and a random fraction held out for validation.

    Both lists keep the order of `examples`.

    Raises:
        UserError: the fraction is positive, but rounds to no example or to all of them.
    """
    count = round(fraction * len(examples))
    if fraction and not 0 < count < len(examples):
        raise UserError(
            f"A fraction of {fraction} of {len(examples)} chats cannot be held out for validation: change "
            f"--validation, or give more chats."
        )
    held_out = set(np.random.default_rng([seed, 0]).permutation(len(examples))[:count].tolist())
    training = [example for i, example in enumerate(examples) if i not in held_out]
    return training, [example for i, example in enumerate(examples) if i in held_out]


def epoch_batches(lengths: Sequence[int], training: Training, epoch: int) -> list[list[int]]:
    """For each step of an epoch, the indices of the examples that it learns from.

    Every example appears once, in a random order. The examples of a step have similar lengths, which saves padding. One
    step may have fewer examples than the others.

    Arguments:
        lengths: the number of tokens of each example.
    """
    size = training.batch_size * training.accumulation
    rng = np.random.default_rng([training.seed, 1, epoch])
    order = rng.permutation(len(lengths))
    window = SHUFFLED_STEPS * size  # sorting the whole epoch would form the same batches in every epoch
    order = np.concatenate(
        [sorted(part, key=lambda i: lengths[i]) for part in np.split(order, range(window, len(order), window))]
    ).astype(int)
    batches = np.split(order, range(size, len(order), size))
    return [batches[i].tolist() for i in rng.permutation(len(batches))]


def learning_rates(training: Training, steps_per_epoch: int) -> Float[np.ndarray, " steps"]:
    """The learning rate of each step of a run, float32."""
    steps = np.arange(steps_per_epoch * training.epochs)
    warmup = round(training.warmup * len(steps))
    factor: np.ndarray
    match training.schedule:
        case "cosine":
            factor = 0.5 * (1 + np.cos(np.pi * (steps - warmup) / max(len(steps) - warmup, 1)))
        case "step":
            factor = np.power(STEP_DECAY, steps // steps_per_epoch)
        case _:
            factor = np.ones(len(steps))
    rising = (steps + 1) / (warmup + 1)  # the first step has a positive rate, because it would learn nothing at 0
    return (training.rate * np.where(steps < warmup, rising, factor)).astype(np.float32)


def assemble(examples: Sequence[Example], accumulation: int, batch_size: int) -> Batch:
    """A batch of shape [accumulation, batch_size] with these examples in its first rows; the other rows are empty."""
    shape = (accumulation, batch_size)
    width = bucket(max(len(example.tokens) for example in examples))
    tokens = np.zeros((math.prod(shape), width), np.int32)
    learned = np.zeros(tokens.shape, np.float32)
    lengths = np.zeros(len(tokens), np.int32)
    for row, example in enumerate(examples):
        size = len(example.tokens)
        tokens[row, :size], learned[row, :size], lengths[row] = example.tokens, example.learned, size
    return Batch(tokens.reshape(*shape, width), lengths.reshape(shape), learned.reshape(*shape, width))


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """The batch on the devices of the mesh, its rows sharded over `points`."""
    axes = (*(None,) * (batch.lengths.ndim - 1), "rows", None)

    def put(x: np.ndarray) -> Array:
        # With several processes, `device_put` would compare their copies, and each would wait for the others.
        return jax.make_array_from_callback(x.shape, sharding(mesh, axes[: x.ndim], x.shape), x.__getitem__)

    return jax.tree.map(put, batch)


def mean_loss(
    batch_loss: Callable[[Batch], Float[Array, ""]], examples: Sequence[Example], batch_size: int, mesh: Mesh
) -> float:
    """The mean loss over the learned tokens of examples, in nats per token.

    Arguments:
        batch_loss: a function of a [batch, time] batch on the devices: the loss summed over its learned tokens.
        batch_size: number of examples in a batch, a multiple of the number of devices along `points`.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    losses, counts = [], []
    for start in range(0, len(order), batch_size):
        chosen = [examples[i] for i in order[start : start + batch_size]]
        batch: Batch = jax.tree.map(lambda x: x[0], assemble(chosen, 1, batch_size))
        losses.append(batch_loss(put_batch(batch, mesh)))
        counts.append(batch.learned[:, 1:].sum())
    return float(sum(jax.device_get(losses)) / sum(counts))
