"""How important each weight of the layers is for some answers: SNIP and Wanda scores (Wei et al., arXiv 2402.05162)."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxscape.directions.examples import Answered
from jaxscape.models.activations import Rows, batches, input_moments
from jaxscape.models.checkpoint import named_leaves, tree_of
from jaxscape.models.config import ModelConfig
from jaxscape.models.loss import summed_loss
from jaxscape.models.model import Model
from jaxscape.models.weights import is_layer_matrix
from jaxscape.runtime.hardware import platform_jit
from jaxscape.runtime.sharding import on_mesh

Scores = dict[str, Float[Array, "out in"]]
"""A score for each weight of each matrix of the layers, float32, by the matrix's name."""


def wanda_scores(model: Model, answered: Answered) -> Scores:
    """Wanda's score (Sun et al., arXiv 2306.11695): |W| times the norm of each input over the tokens of all answers."""
    moments = input_moments(model, answered.texts, answered.begins)
    return {
        name: jnp.abs(weight.astype(jnp.float32)) * jnp.sqrt(moments[name.removesuffix(".weight")])
        for name, weight in layer_matrices(model).items()
    }


def snip_scores(model: Model, answered: Answered) -> Scores:
    """SNIP's score (Lee et al., arXiv 1810.02340) as Wei et al. take it: |W · ∂L/∂W|, averaged over the examples.

    L is the mean cross-entropy of an answer's tokens. The gradient of each example is computed by itself.
    """
    matrices = layer_matrices(model)
    leaves = named_leaves(jax.device_put(model.params, model.shardings))
    others = {name: leaf for name, leaf in leaves.items() if name not in matrices}
    total = {name: jnp.zeros_like(weight, jnp.float32) for name, weight in matrices.items()}
    config = model.config.for_length(max(map(len, answered.texts)))
    for rows in batches(model, answered.texts, answered.begins, rows=1):
        total = _with_gradient(total, matrices, others, rows, config=config, mesh=model.mesh)
    return {
        name: jnp.abs(weight.astype(jnp.float32)) * total[name] / len(answered.texts)
        for name, weight in matrices.items()
    }


def layer_matrices(model: Model) -> dict[str, Float[Array, "out in"]]:
    """The matrices of the layers on the devices, by name."""
    shardings = named_leaves(model.shardings)
    return {
        name: jax.device_put(leaf, shardings[name])
        for name, leaf in named_leaves(model.params).items()
        if is_layer_matrix(name, leaf.shape)
    }


@platform_jit(static_argnames=("config", "mesh"), donate_argnums=0)
def _with_gradient(
    total: Scores,
    matrices: dict[str, Array],
    others: dict[str, Array],
    rows: Rows,
    *,
    config: ModelConfig,
    mesh: Mesh,
) -> Scores:
    """The sum with the magnitudes of one example's gradient added."""

    def loss(matrices: dict[str, Array]) -> Float[Array, ""]:
        counted = rows.counted.astype(jnp.float32)
        return summed_loss(config, tree_of(matrices | others), rows.tokens, rows.lengths, counted) / counted.sum()

    with on_mesh(mesh):
        return jax.tree.map(lambda x, g: x + jnp.abs(g.astype(jnp.float32)), total, jax.grad(loss)(matrices))
