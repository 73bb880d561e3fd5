"""Training: options, batches of chats, the loss, and the jitted step that lowers it."""

import math
from collections.abc import Sequence

import numpy as np

from jaxscape.finetuning.chats import Chat, Example, tokenize
from jaxscape.finetuning.training import Settings, Trainer
from jaxscape.models import kernels
from jaxscape.models.model import Model
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.sharding import mesh_shape_of


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
    settings = Settings(
        model.mesh, model.dtype, None, 0.0, 0.0, remat=False, kernel=kernels.matches_reference(model.mesh)
    )
    points = mesh_shape_of(model.mesh).points
    whole = -(-batch_size // points) * points
    config = model.config.for_length(max(len(example.tokens) for example in examples))
    return math.exp(Trainer(config, settings, {}).mean_loss(model.params, examples, whole))
