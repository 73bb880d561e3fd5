"""The residual of quantisation: what rounding the weights to few bits changes."""

import re
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxscape.directions.base import needs_option
from jaxscape.directions.storage import Direction
from jaxscape.models.checkpoint import named_leaves, tree_of
from jaxscape.models.model import Model
from jaxscape.models.weights import is_layer_matrix
from jaxscape.runtime.errors import UserError

BITS = {"int8": 8, "int4": 4}
DEFAULT_GROUPS = {"int8": None, "int4": 32}
"""How many neighbouring weights of a row share a scale; None for all of them."""


@dataclass(frozen=True)
class Quantisation:
    """`quantisation:int8` or `quantisation:int4[:GROUP]`: Q(θ) − θ, so that the quantised model lies at coordinate 1.

    The matrices of the layers are rounded to the nearest of the integers from −127 to 127 (int8) or −7 to 7 (int4),
    times a scale: the largest absolute weight of a group, divided by 127 or 7 (Dettmers et al., arXiv 2208.07339;
    symmetric, without a zero point). A group is GROUP neighbouring weights of a row, which are inputs of one output
    channel; by default 32 for int4, and for int8 the whole row. Embedding, output head, norms and biases are not
    quantised, as in most deployments. Scales are float32.
    """

    format: str
    group: int | None = None

    kind: ClassVar[str] = "quantisation"
    usage: ClassVar[str] = "quantisation:int8|int4[:GROUP]"
    is_interpolation: ClassVar[bool] = False
    has_control: ClassVar[bool] = True
    axis_radius: ClassVar[float] = 1.0
    is_drawn: ClassVar[bool] = True
    count: ClassVar[int] = 1

    @classmethod
    def parse(cls, option: str) -> "Quantisation":
        match = re.fullmatch(r"(int8|int4)(?::(\d+))?", needs_option(cls, option))
        if match is None or match[2] == "0":
            raise UserError(
                f"Cannot read the quantisation {option!r}: write int8 or int4, and after a colon, if at all, how many "
                f"weights share a scale, for example quantisation:int4:128."
            )
        return cls(match[1], DEFAULT_GROUPS[match[1]] if match[2] is None else int(match[2]))

    def __str__(self) -> str:
        return f"{self.kind}:{self.format}" + ("" if self.group == DEFAULT_GROUPS[self.format] else f":{self.group}")

    def make(self, model: Model) -> list[Direction]:
        shardings = named_leaves(model.shardings)
        direction = {}
        for name, weight in named_leaves(model.params).items():
            weight = jax.device_put(weight, shardings[name])
            if not is_layer_matrix(name, weight.shape):
                direction[name] = jnp.zeros(weight.shape, weight.dtype, device=shardings[name])
                continue
            group = weight.shape[1] if self.group is None else self.group
            if weight.shape[1] % group:
                raise UserError(
                    f"Groups of {group} weights do not divide the {weight.shape[1]} inputs of {name}: choose a group "
                    f"size that does."
                )
            direction[name] = residual(weight, BITS[self.format], group)
        return [tree_of(direction)]


@partial(jax.jit, static_argnums=(1, 2))
def residual(weight: Float[Array, "out in"], bits: int, group: int) -> Float[Array, "out in"]:
    """The weight, quantised to `bits` bits in groups of neighbouring weights of a row, minus the weight; float32."""
    exact = weight.astype(jnp.float32).reshape(weight.shape[0], -1, group)
    largest = 2 ** (bits - 1) - 1
    scale = jnp.abs(exact).max(-1, keepdims=True) / largest
    levels = jnp.round(exact / jnp.where(scale > 0, scale, 1.0))
    return (levels * scale - exact).reshape(weight.shape)
