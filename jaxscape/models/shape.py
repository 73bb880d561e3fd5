"""The shapes of models that runs are often planned for, and of any configuration: what a plan needs."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxscape.models.checkpoint import Params, parameter_shardings
from jaxscape.models.config import ModelConfig
from jaxscape.models.decoder import parameter_shapes


@dataclass(frozen=True, eq=False)
class ModelShape:
    """A model without weights: what `jaxscape.models.Model` has, as far as plans and programs need it.

    Attributes:
        params: a tree of `jax.ShapeDtypeStruct`, each with its sharding.
    """

    config: ModelConfig
    params: Params
    mesh: Mesh
    dtype: str
    eos_token_ids: tuple[int, ...] = (0,)


def model_shape(config: ModelConfig, mesh: Mesh, dtype: str) -> ModelShape:
    where = parameter_shardings(config, mesh)
    shapes = jax.tree.map(
        lambda leaf, there: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=there),
        parameter_shapes(config),
        where,
    )
    return ModelShape(config, shapes, mesh, dtype)
