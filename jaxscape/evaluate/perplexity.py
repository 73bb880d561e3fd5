"""Perplexity: how well a model predicts given answers."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxscape.finetuning.batches import Batch, mean_loss
from jaxscape.finetuning.chats import Chat, Example, tokenize
from jaxscape.models import kernels
from jaxscape.models.checkpoint import Params
from jaxscape.models.config import ModelConfig
from jaxscape.models.loss import summed_loss
from jaxscape.models.model import Model
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
    end_tokens = np.array(model.eos_token_ids)
    examples = [
        Example(tokens, learned & ~np.isin(tokens, end_tokens))
        for tokens, learned in tokenize(model, chats, max_length, thinking).examples
    ]
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
