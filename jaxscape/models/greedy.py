"""The greedy continuation of a few texts, for directions that depend on what the model says.

The engine is made for many points and prompts, and lies above `directions/`. Here all texts are one batch.
"""

from collections.abc import Sequence
from itertools import takewhile

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from jaxscape.models.cache import CPU_ORDER, Context, KVCache, empty_cache
from jaxscape.models.checkpoint import Params
from jaxscape.models.config import ModelConfig
from jaxscape.models.decoder import head, hidden_states
from jaxscape.models.model import Model
from jaxscape.runtime.hardware import platform_jit
from jaxscape.runtime.sharding import on_mesh, replicated


def greedy_tokens(model: Model, texts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The token ids with which the model continues each text, choosing the likeliest token each time.

    Arguments:
        texts: token ids. The model's context must have room for each text and its continuation.
        count: the largest number of tokens in a continuation, at least 1. It ends before an end token of the model.
    """
    tokens, lengths = right_padded(texts)
    config = model.config.for_length(tokens.shape[1] + count)
    params = jax.device_put(model.params, model.shardings)
    arrays = jax.device_put((tokens, lengths), replicated(model.mesh))
    chosen = np.asarray(_continuations(params, *arrays, count=count, config=config, mesh=model.mesh))
    return [list(takewhile(lambda token: token not in model.eos_token_ids, row)) for row in chosen.tolist()]


def right_padded(texts: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, "texts time"], Int[np.ndarray, " texts"]]:
    """The texts as one array of token ids, padded on the right to a multiple of 16 tokens, and their lengths."""
    lengths = np.array([len(text) for text in texts], np.int32)
    tokens = np.zeros((len(texts), -(-int(lengths.max()) // 16) * 16), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return tokens, lengths


@platform_jit(static_argnames=("count", "config", "mesh"))
def _continuations(
    params: Params,
    tokens: Int[Array, "batch time"],
    lengths: Int[Array, " batch"],
    *,
    count: int,
    config: ModelConfig,
    mesh: Mesh,
) -> Int[Array, "batch count"]:
    batch, width = tokens.shape

    def next_token(
        cache: KVCache, slot: Int[Array, ""] | int, tokens: Array, positions: Array, last: Array
    ) -> tuple[Int[Array, " batch"], KVCache]:
        context = Context(cache, slot)
        states, cache = hidden_states(config, params, tokens, positions, context, CPU_ORDER)
        state = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
        return head(config, params, state).argmax(-1).astype(jnp.int32), cache

    def step(carry: tuple[Array, KVCache], number: Int[Array, ""]) -> tuple[tuple[Array, KVCache], Array]:
        token, cache = carry
        positions = (lengths + number)[:, None]
        chosen, cache = next_token(cache, width + number, token[:, None], positions, jnp.zeros_like(token))
        return (chosen, cache), chosen

    with on_mesh(mesh):
        cache = empty_cache(config, str(jax.tree.leaves(params)[0].dtype), batch, width + count, CPU_ORDER)
        time = jnp.arange(width)
        positions = jnp.where(time < lengths[:, None], time, -1)
        first, cache = next_token(cache, 0, tokens, positions, lengths - 1)
        _, others = jax.lax.scan(step, (first, cache), jnp.arange(count - 1))
    return jnp.concatenate([first[:, None], others.T], axis=1)
