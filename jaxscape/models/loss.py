"""The loss of a language model: the cross-entropy of texts under the decoder, summed or for each token."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxscape.models import kernels
from jaxscape.models.checkpoint import Params
from jaxscape.models.config import ModelConfig
from jaxscape.models.decoder import forward


def token_losses(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array | np.ndarray, "batch time"],
    lengths: Int[Array | np.ndarray, " batch"],
    *,
    remat: bool = False,
    kernel: bool = False,
) -> Float[Array, "batch time-1"]:
    """The negative log-likelihood, in nats, of each token after the first, given the tokens before it.

    This is a pure function for jitted programs. On a mesh, it is traced inside `on_mesh`.

    Arguments:
        params: the decoder's parameters in the dtype of the activations; a leaf is an array or a `SummedWeight`.
        tokens: int32[B, T], right-padded.
        lengths: int32[B], the number of tokens of each row that are not padding.
        remat: recompute each layer's activations in the backward pass: less memory, more time.
        kernel: compute attention with JAX's splash attention kernel where that reduces memory traffic (see
            `kernels.saves_traffic`). Allowed only if `kernels.matches_reference` is true of the
            devices.

    Returns:
        float32[B, T - 1]: entry t is the loss of token t + 1. If that token is padding, the entry is meaningless.
    """
    batch, width = tokens.shape
    time = jnp.arange(width)
    positions = jnp.where(time < lengths[:, None], time, -1)
    uses_kernel = kernel and kernels.saves_traffic(config, _dtype(params), batch, width, _num_devices())
    logits, _ = forward(config, params, jnp.asarray(tokens), positions, remat=remat, kernel=uses_kernel)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])


def summed_loss(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array | np.ndarray, "batch time"],
    lengths: Int[Array | np.ndarray, " batch"],
    counted: Float[Array | np.ndarray, "batch time"] | Bool[Array | np.ndarray, "batch time"],
    *,
    remat: bool = False,
    kernel: bool = False,
) -> Float[Array, ""]:
    """The cross-entropy in nats, summed over the tokens that count; the other arguments are those of `token_losses`.

    Arguments:
        counted: [B, T], 1 for each token whose loss counts and 0 for the others. The first token of a row never counts,
            because nothing predicts it.
    """
    losses = token_losses(config, params, tokens, lengths, remat=remat, kernel=kernel)
    return (losses * counted[:, 1:]).sum()


def _dtype(params: Params) -> str:
    return str(jax.tree.leaves(params)[0].dtype)


def _num_devices() -> int:
    """The number of devices of the mesh that the program is traced for; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size
