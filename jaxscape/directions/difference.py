"""Directions from one model to another, and the alignment direction away from one."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxscape.directions.base import needs_option
from jaxscape.directions.storage import Direction
from jaxscape.models.checkpoint import Params, check_tensors, tensor_shapes
from jaxscape.models.model import Model, load_model
from jaxscape.runtime.sharding import mesh_shape_of


def difference(model: Model, other: Model) -> Params:
    """The direction from one model to another: the weights of `other` minus those of `model`.

    `other` lies at coordinate 1 along it. The direction is a float32 tree like `model.params`.

    Raises:
        UserError: the models do not have the same parameters; the message lists the differences.
    """
    check_tensors(tensor_shapes(model.params), tensor_shapes(other.params), other.name)
    return jax.tree.map(lambda a, b: b.astype(jnp.float32) - a.astype(jnp.float32), model.params, other.params)


@dataclass(frozen=True)
class To:
    """`to:MODEL`: the direction to another model, which lies at coordinate 1."""

    model: str

    kind: ClassVar[str] = "to"
    usage: ClassVar[str] = "to:MODEL"
    is_interpolation: ClassVar[bool] = True
    count: ClassVar[int] = 1

    @classmethod
    def parse(cls, option: str) -> "To":
        return cls(needs_option(cls, option))

    def __str__(self) -> str:
        return f"{self.kind}:{self.model}"

    def make(self, model: Model) -> list[Direction]:
        other = load_model(self.model, model.dtype, mesh_shape=mesh_shape_of(model.mesh))
        return [difference(model, other)]


@dataclass(frozen=True)
class From:
    """`from:BASE`: the alignment direction, this model minus the base that was aligned (AsFT, arXiv 2506.08473).

    The base lies at coordinate −1, and positive coordinates continue what the alignment did. Norms are moved too.
    """

    base: str

    kind: ClassVar[str] = "from"
    usage: ClassVar[str] = "from:BASE"
    is_interpolation: ClassVar[bool] = False
    has_control: ClassVar[bool] = True
    axis_radius: ClassVar[float] = 1.0
    count: ClassVar[int] = 1

    @classmethod
    def parse(cls, option: str) -> "From":
        return cls(needs_option(cls, option))

    def __str__(self) -> str:
        return f"{self.kind}:{self.base}"

    def make(self, model: Model) -> list[Direction]:
        base = load_model(self.base, model.dtype, mesh_shape=mesh_shape_of(model.mesh))
        return [jax.tree.map(jnp.negative, difference(model, base))]
