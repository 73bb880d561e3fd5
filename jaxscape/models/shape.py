"""A model's shapes and shardings without its weights, for plans and for programs that are compiled but not run."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxscape.models.checkpoint import Params, abstract_params
from jaxscape.models.config import ModelConfig


@dataclass(frozen=True, eq=False)
class ModelShape:
    """A model without weights: the attributes of `jaxscape.models.model.Model` that plans and programs need.

    Attributes:
        params: a tree of `jax.ShapeDtypeStruct`s with shardings.
        dtype: the dtype of parameters and activations.
    """

    config: ModelConfig
    params: Params
    mesh: Mesh
    dtype: str
    eos_token_ids: tuple[int, ...] = (0,)


def model_shape(config: ModelConfig, mesh: Mesh, dtype: str) -> ModelShape:
    """The shape of a model with this configuration, sharded over a mesh."""
    return ModelShape(config, abstract_params(config, jnp.dtype(dtype), mesh), mesh, dtype)
