"""What the decoder's modules are given: the residual stream at each layer, and the inputs of linear layers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxscape.models.cache import CPU_ORDER, Context
from jaxscape.models.checkpoint import Params
from jaxscape.models.config import ModelConfig
from jaxscape.models.decoder import Layer, Linear, head, hidden_states
from jaxscape.models.model import Model
from jaxscape.runtime.hardware import platform_jit
from jaxscape.runtime.sharding import on_mesh, sharding

BATCH_ROWS = 16  # texts in a batch
WIDTH_MULTIPLE = 32  # texts are padded to a multiple of this, so that programs are compiled for few widths


class Rows(NamedTuple):
    """A batch of B texts, right-padded to T tokens.

    Attributes:
        tokens: int32[B, T].
        lengths: int32[B], the number of tokens of each text; 0 for a row without a text.
        counted: bool[B, T], the tokens that a sum over tokens counts.
    """

    tokens: Int[np.ndarray | Array, "batch time"]
    lengths: Int[np.ndarray | Array, " batch"]
    counted: Bool[np.ndarray | Array, "batch time"]


def batches(
    model: Model, texts: Sequence[Sequence[int]], begins: Sequence[int] | None = None, rows: int = BATCH_ROWS
) -> Iterator[Rows]:
    """Batches of one shape that hold the texts in their order, on the devices of the model's mesh.

    Arguments:
        texts: the token ids of each text.
        begins: for each text, the number of its tokens that are not counted, from its beginning; by default 0.
        rows: number of texts in a batch.
    """
    width = -(-max(map(len, texts)) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    begins = [0] * len(texts) if begins is None else begins
    for start in range(0, len(texts), rows):
        tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
        counted = np.zeros((rows, width), bool)
        for row, (text, begin) in enumerate(
            zip(texts[start : start + rows], begins[start : start + rows], strict=True)
        ):
            tokens[row, : len(text)], lengths[row] = text, len(text)
            counted[row, begin : len(text)] = True
        batch = Rows(tokens, lengths, counted)
        axes = [("rows", None), ("rows",), ("rows", None)]
        yield Rows(*(jax.device_put(x, sharding(model.mesh, a, x.shape)) for x, a in zip(batch, axes, strict=True)))


def inputs_of(
    kind: type[nn.Module], config: ModelConfig, params: Params, rows: Rows
) -> dict[str, Float[Array, "batch time in"]]:
    """The input of every module of a class, by the module's path joined with dots.

    This is a function for jitted programs. A linear layer's path is its weight's name without `.weight`.
    """
    inputs: dict[str, Array] = {}

    def record(
        call: Callable[..., Any], args: tuple[Any, ...], kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        if isinstance(context.module, kind) and context.method_name == "__call__":
            inputs[".".join(context.module.path)] = args[0]
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        _final_states(config, params, rows, shares_trace=False)
    return inputs


def _final_states(
    config: ModelConfig, params: Params, rows: Rows, *, shares_trace: bool = True
) -> Float[Array, "batch time dim"]:
    """The final hidden states; see `hidden_states`."""
    time = jnp.arange(rows.tokens.shape[1])
    positions = jnp.where(time < rows.lengths[:, None], time, -1)
    tokens = jnp.asarray(rows.tokens)
    return hidden_states(config, params, tokens, positions, Context(), CPU_ORDER, shares_trace=shares_trace)[0]


def residual_stream(
    model: Model, texts: Sequence[Sequence[int]], num_positions: int = 1
) -> Float[np.ndarray, "texts layers positions dim"]:
    """The residual stream before each layer at the last tokens of each text, float32[texts, layers, positions, dim].

    In transformers' numbering it is `hidden_states[layer]`, for layers from 0. The last position is that of the text's
    last token.
    """
    params = jax.device_put(model.params, model.shardings)
    config = model.config.for_length(max(map(len, texts)))
    streams = [
        _residual_stream(params, rows, config=config, mesh=model.mesh, num_positions=num_positions)
        for rows in batches(model, texts)
    ]
    return np.concatenate(jax.device_get(streams))[: len(texts)]


@platform_jit(static_argnames=("config", "mesh", "num_positions"))
def _residual_stream(
    params: Params, rows: Rows, *, config: ModelConfig, mesh: jax.sharding.Mesh, num_positions: int
) -> Float[Array, "batch layers positions dim"]:
    with on_mesh(mesh):
        inputs = inputs_of(Layer, config, params, rows)
        last = jnp.maximum(rows.lengths[:, None] - num_positions + jnp.arange(num_positions), 0)
        streams = [inputs[f"model.layers.{layer}"] for layer in range(config.num_layers)]
        taken = [jnp.take_along_axis(x, last[..., None], axis=1).astype(jnp.float32) for x in streams]
        return jnp.stack(taken, axis=1)


def input_moments(
    model: Model, texts: Sequence[Sequence[int]], begins: Sequence[int], *, is_full: bool = False
) -> dict[str, Float[Array, "in *in"]]:
    """Sums of squares of the inputs of each linear layer of the decoder's layers, by the layer's path.

    Arguments:
        begins: for each text, the number of its tokens, from its beginning, that are not counted.
        is_full: whether to sum the matrices x xᵀ instead of the squares of each feature.

    Returns:
        float32[in], or float32[in, in]; summed over the counted tokens of all texts.
    """
    params = jax.device_put(model.params, model.shardings)
    config = model.config.for_length(max(map(len, texts)))
    total: dict[str, Array] = {}
    for rows in batches(model, texts, begins):
        moments = _input_moments(params, rows, config=config, mesh=model.mesh, is_full=is_full)
        total = jax.tree.map(jnp.add, total, moments) if total else moments
    return total


@platform_jit(static_argnames=("config", "mesh", "is_full"))
def _input_moments(
    params: Params, rows: Rows, *, config: ModelConfig, mesh: jax.sharding.Mesh, is_full: bool
) -> dict[str, Float[Array, "in *in"]]:
    equation = "bti,btj->ij" if is_full else "bti,bti->i"
    with on_mesh(mesh):
        inputs = inputs_of(Linear, config, params, rows)
        moments = {}
        for path, x in inputs.items():
            x = jnp.where(rows.counted[..., None], x, 0).astype(jnp.float32)
            moments[path] = jnp.einsum(equation, x, x, precision=jax.lax.Precision.HIGHEST)
        return moments


def next_token_logits(
    model: Model, texts: Sequence[Sequence[int]], params: Params | None = None
) -> Float[np.ndarray, "texts vocab"]:
    """The logits after each text, float32[texts, vocab].

    For many texts `jaxscape.engine.prefill.next_token_logits` is faster. Directions cannot use it, because the engine
    is built on them.

    Arguments:
        params: parameters to use instead of the model's; a leaf is an array or a `SummedWeight`.
    """
    params = jax.device_put(model.params, model.shardings) if params is None else params
    config = model.config.for_length(max(map(len, texts)))
    logits = [_next_token_logits(params, rows, config=config, mesh=model.mesh) for rows in batches(model, texts)]
    return np.concatenate(jax.device_get(logits))[: len(texts)]


@platform_jit(static_argnames=("config", "mesh"))
def _next_token_logits(
    params: Params, rows: Rows, *, config: ModelConfig, mesh: jax.sharding.Mesh
) -> Float[Array, "batch vocab"]:
    with on_mesh(mesh):
        states = _final_states(config, params, rows)
        last = jnp.maximum(rows.lengths - 1, 0)
        return head(config, params, jnp.take_along_axis(states, last[:, None, None], axis=1))[:, 0]
