"""Training: options, batches of chats, the loss, and the jitted step that lowers it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from jaxscape.finetuning.chats import Example
from jaxscape.finetuning.options import STEP_DECAY, Training
from jaxscape.runtime.errors import UserError


class Batch(NamedTuple):
    """Right-padded chats, by accumulated batch and row; `learned` marks the tokens that count in the loss."""

    tokens: Int[np.ndarray | Array, "accumulation batch time"]
    lengths: Int[np.ndarray | Array, "accumulation batch"]
    learned: Float[np.ndarray | Array, "accumulation batch time"]


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
