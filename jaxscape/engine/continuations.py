"""Log-likelihoods of the first tokens of answers to prompts that are computed once.

An engine that asks about unfinished answers asks often, about the same prompts. So their keys and values stay on the
devices, and a question costs a forward pass of the few tokens alone.
"""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int

from jaxscape.engine.batching import common_prefix, padded_length
from jaxscape.engine.platforms import platform_of
from jaxscape.engine.prefill import prefix_cache
from jaxscape.models.cache import CPU_ORDER, Context, KVCache, empty_cache
from jaxscape.models.checkpoint import Params
from jaxscape.models.config import ModelConfig
from jaxscape.models.decoder import head, hidden_states
from jaxscape.models.model import Model
from jaxscape.runtime.hardware import platform_jit
from jaxscape.runtime.sharding import constrain, on_mesh, replicated

ROWS = 16  # answers of a call of the program; fewer are filled up


class Continuations:
    """Computes how likely a model finds the first tokens of answers to given prompts."""

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], num_tokens: int) -> None:
        """Compute the keys and values of the prompts.

        Arguments:
            prompts: token ids; none is empty.
            num_tokens: the largest number of tokens of an answer.
        """
        self._model, self._prompts, self._num_tokens = model, prompts, num_tokens
        self._config = model.config.for_length(max(map(len, prompts)) + num_tokens)
        shared = common_prefix(prompts)
        own = [prompt[shared:-1] for prompt in prompts]  # the hidden state of the last token predicts the answer
        width = _width(prompts)
        tokens, positions = np.zeros((len(own), width), np.int32), np.full((len(own), width), -1, np.int32)
        for row, ids in enumerate(own):
            tokens[row, : len(ids)], positions[row, : len(ids)] = ids, shared + np.arange(len(ids))
        params, config, mesh = model.params, self._config, model.mesh
        self._prefix = prefix_cache(params, prompts[0][:shared], config, mesh) if shared else None
        arrays = self._put(tokens, positions)
        self._cache = _prompt_caches(
            params, self._prefix, *arrays, config=config, mesh=mesh, room=num_tokens, dtype=model.dtype
        )

    def log_likelihoods(
        self, numbers: Sequence[int], answers: Sequence[Sequence[int]]
    ) -> list[Float32[np.ndarray, " tokens"]]:
        """The log-likelihood in nats of each token of each answer, given its prompt and the tokens before it.

        Arguments:
            numbers: for each answer, the number of its prompt.
            answers: token ids, at most as many as were announced for each answer.

        Returns:
            float32[tokens] for each answer; NaN where the model computes no finite logits.
        """
        model, given, padded = self._model, [], -(-len(answers) // ROWS) * ROWS
        rows = np.resize(np.asarray(numbers, np.int32), padded)
        inputs, targets = (np.zeros((padded, self._num_tokens), np.int32) for _ in range(2))
        positions = np.full((padded, self._num_tokens), -1, np.int32)
        for row, (number, answer) in enumerate(zip(numbers, answers, strict=True)):
            size, last = len(answer), len(self._prompts[number]) - 1
            inputs[row, :size], targets[row, :size] = [self._prompts[number][-1], *answer[:-1]][:size], answer
            positions[row, :size] = last + np.arange(size)
        for start in range(0, padded, ROWS):
            part = slice(start, start + ROWS)
            arrays = self._put(rows[part], inputs[part], positions[part], targets[part])
            caches = (self._prefix, self._cache)
            given.append(_continue(model.params, *caches, *arrays, config=self._config, mesh=model.mesh))
        found = np.concatenate(jax.device_get(given))
        return [found[row, : len(answer)] for row, answer in enumerate(answers)]

    def _put(self, *arrays: np.ndarray) -> tuple[Array, ...]:
        return jax.device_put(arrays, replicated(self._model.mesh))


def cache_bytes(model: Model, prompts: Sequence[Sequence[int]], num_tokens: int) -> int:
    """The bytes that the keys and values of prompts take, on all devices together; the arguments are those of
    `Continuations`."""
    slots = _width(prompts) + num_tokens
    cache = jax.eval_shape(partial(empty_cache, model.config, model.dtype, len(prompts), slots, CPU_ORDER))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def _width(prompts: Sequence[Sequence[int]]) -> int:
    """Number of cache slots for the tokens of a prompt after the common prefix."""
    return padded_length(max(map(len, prompts)) - common_prefix(prompts))


@platform_jit(static_argnames=("room", "dtype", "config", "mesh"))
def _prompt_caches(
    params: Params,
    prefix: KVCache | None,
    tokens: Int[Array, "prompts time"],
    positions: Int[Array, "prompts time"],
    *,
    room: int,
    dtype: str,
    config: ModelConfig,
    mesh: Mesh,
) -> KVCache:
    """The keys and values of the prompts after their prefix, with room for further tokens behind them."""
    with on_mesh(mesh):
        order = platform_of(mesh).order_without_kernel
        empty = empty_cache(config, dtype, len(tokens), tokens.shape[1] + room, order)
        return hidden_states(config, params, tokens, positions, Context(cache=empty, prefix=prefix), order)[1]


@platform_jit(static_argnames=("config", "mesh"))
def _continue(
    params: Params,
    prefix: KVCache | None,
    cache: KVCache,
    rows: Int[Array, " rows"],
    tokens: Int[Array, "rows time"],
    positions: Int[Array, "rows time"],
    targets: Int[Array, "rows time"],
    *,
    config: ModelConfig,
    mesh: Mesh,
) -> Float[Array, "rows time"]:
    """The log-likelihood of each target as the token after the one in its place.

    Arguments:
        rows: for each row of tokens, the prompt that they follow.
    """
    with on_mesh(mesh):
        order = platform_of(mesh).order_without_kernel
        chosen = jax.tree.map(lambda x: x[rows], cache)  # rows come first in every order
        slot = cache.positions.shape[1] - tokens.shape[1]
        context = Context(cache=chosen, slot=slot, prefix=prefix)
        states, _ = hidden_states(config, params, tokens, positions, context, order)
        logits = head(config, params, states)
        return constrain(-optax.softmax_cross_entropy_with_integer_labels(logits, targets), None, None)
