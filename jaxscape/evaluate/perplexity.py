"""Perplexity: how well a model predicts given answers or texts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxscape.engine.prefill import log_likelihoods
from jaxscape.evaluate.measure import Subject
from jaxscape.evaluate.statistics import Interval, bootstrap_interval
from jaxscape.finetuning.batches import Batch, mean_loss
from jaxscape.finetuning.chats import Chat, Example, load_chats, tokenize
from jaxscape.models import kernels
from jaxscape.models.chat_defaults import adds_bos
from jaxscape.models.checkpoint import Params
from jaxscape.models.config import ModelConfig
from jaxscape.models.encoding import encode
from jaxscape.models.loss import summed_loss
from jaxscape.models.model import Model
from jaxscape.prompts.sets import PROMPT_SETS, load_prompts
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.hardware import platform_jit
from jaxscape.runtime.sharding import mesh_shape_of, on_mesh


def perplexity(
    model: Model,
    chats: Sequence[Chat],
    *,
    max_length: int = 2048,
    batch_size: int = 16,
    thinking: str = "default",
) -> float:
    """The perplexity of the assistant's turns in chats: exp of the mean loss over their tokens.

    The tokens that end a turn do not count, because an answer may have been cut before its end.

    Arguments:
        chats: see `jaxscape.load_chats`.
        max_length: chats are cut to this number of tokens.
        batch_size: number of chats in a batch. It is rounded up to a multiple of the devices along `points`.
        thinking: see `jaxscape.prompts.chat_format.render`.

    Raises:
        UserError: the batch size is not positive, or the chats cannot be tokenized, see
            `jaxscape.finetuning.chats.tokenize`.
    """
    examples = _answer_tokens(model, chats, max_length, thinking)
    if batch_size < 1:
        raise UserError(f"The batch size must be at least 1, not {batch_size}.")
    batch_loss = partial(
        _batch_loss,
        model.params,
        config=model.config.for_length(max(len(example.tokens) for example in examples)),
        mesh=model.mesh,
        kernel=kernels.matches_reference(model.mesh),
    )
    devices = mesh_shape_of(model.mesh).points
    rounded_size = -(-batch_size // devices) * devices
    return math.exp(mean_loss(batch_loss, examples, rounded_size, model.mesh))


@platform_jit(static_argnames=("config", "mesh", "kernel"))
def _batch_loss(params: Params, batch: Batch, *, config: ModelConfig, mesh: Mesh, kernel: bool) -> Float[Array, ""]:
    with on_mesh(mesh):
        return summed_loss(config, params, batch.tokens, batch.lengths, batch.learned, kernel=kernel)


def _answer_tokens(model: Model, chats: Sequence[Chat], max_length: int, thinking: str) -> list[Example]:
    """The tokens of chats, of which those of the assistant count, without those that end its turns."""
    end_tokens = np.array(model.eos_token_ids)
    return [
        Example(tokens, learned & ~np.isin(tokens, end_tokens))
        for tokens, learned in tokenize(model, chats, max_length, thinking).examples
    ]


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of fixed texts, or of the assistant's turns in fixed chats.

    It is exp of the mean loss over all tokens that count. Its interval is over texts or chats.

    Attributes:
        examples: the tokens of each text or chat, and which of them count.
    """

    model: Model
    name: str
    examples: list[Example]
    settings: Mapping[str, Any]
    label: str = "perplexity"

    @classmethod
    def make(cls, subject: Subject, option: str) -> "Perplexity":
        if not option:
            raise UserError("Name the texts or chats: perplexity:SET or perplexity:FILE.")
        model = subject.model
        if option in PROMPT_SETS or Path(option).suffix.lower() == ".txt":
            texts = load_prompts(option)
            # A tokenizer that puts a BOS token before every text did so in training. Nothing predicts the first token.
            before = [model.tokenizer.bos_token_id] if adds_bos(model.tokenizer) else []
            rows = [np.array([*before, *row], np.int32) for row in encode(model, texts, len(before))]
            examples = [Example(row, np.arange(len(row)) > 0) for row in rows]
        else:
            before = []
            examples = _answer_tokens(model, load_chats(option), model.config.max_positions, subject.thinking)
        count = int(sum(example.learned.sum() for example in examples))
        if not count:
            raise UserError(f"No token of {option} has tokens before it that predict it: give longer texts.")
        return cls(
            model,
            f"perplexity:{option}",
            examples,
            {"texts": len(examples), "tokens": count} | ({"bos": True} if before else {}),
        )

    def samples(self, params: Params) -> Float[np.ndarray, "texts 2"]:
        """The summed log-likelihood of each text's tokens that count, and their number."""
        first = [max(1, int(example.learned.argmax())) for example in self.examples]
        starts = [example.tokens[:start].tolist() for example, start in zip(self.examples, first, strict=True)]
        rests = [example.tokens[start:].tolist() for example, start in zip(self.examples, first, strict=True)]
        values = log_likelihoods(self.model, starts, rests, params)
        counted = [example.learned[start:] for example, start in zip(self.examples, first, strict=True)]
        return np.array(
            [(value[count].sum(dtype=np.float64), count.sum()) for value, count in zip(values, counted, strict=True)]
        )

    def summary(self, samples: Float[np.ndarray, "texts 2"]) -> Mapping[str, Interval]:
        return {"value": bootstrap_interval(samples, lambda means: np.exp(-means[..., 0] / means[..., 1]))}
