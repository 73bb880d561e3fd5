"""Directions scaled to the norms of the weights, so that several kinds share one axis."""

from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxscape.directions.base import (
    DEFAULT_RADIUS,
    Recipe,
    check_no_option,
    check_parts,
    default_radius,
    has_control,
    is_drawn,
    units_of,
)
from jaxscape.directions.storage import Direction, dense, scaled
from jaxscape.directions.sums import tensor_norm
from jaxscape.models.checkpoint import named_leaves, tree_of
from jaxscape.models.model import Model
from jaxscape.models.weights import is_norm
from jaxscape.runtime.errors import UserError


@dataclass(frozen=True)
class _Scaled:
    """What the kinds in this file share."""

    of: Recipe

    kind: ClassVar[str]
    usage: ClassVar[str]
    is_interpolation: ClassVar[bool] = False

    @classmethod
    def compose(cls, parts: tuple[Recipe, ...], option: str) -> Any:
        check_parts(cls, parts, 1, 1)
        check_no_option(cls, option)
        return cls(parts[0])

    @property
    def count(self) -> int:
        return self.of.count

    @property
    def has_control(self) -> bool:
        return has_control(self.of)

    @property
    def is_drawn(self) -> bool:
        return is_drawn(self.of)

    def __str__(self) -> str:
        return f"{self.kind}:[{self.of}]"


@dataclass(frozen=True)
class WeightNorm(_Scaled):
    """`weight-norm:[A]`: direction A, scaled to the norm of all weights together.

    These are the weights that random directions perturb: all but the parameters whose name contains `norm`. So a
    coordinate is a multiple of their norm, as it is along a layer-normalised random direction.
    """

    kind: ClassVar[str] = "weight-norm"
    usage: ClassVar[str] = "weight-norm:[DIRECTION]"
    units: ClassVar[tuple[str, ...]] = ("weights",)

    @property
    def axis_radius(self) -> float:
        return default_radius(self.of) if "weights" in units_of(self.of) else DEFAULT_RADIUS

    def make(self, model: Model) -> list[Direction]:
        target = norm_of_weights(model)
        return [_scaled_to(direction, target, str(self.of)) for direction in self.of.make(model)]


@dataclass(frozen=True)
class TensorNorm(_Scaled):
    """`tensor-norm:[A]`: direction A with each of its tensors scaled to the norm of the tensor that it perturbs.

    So a coordinate is a multiple of each tensor's norm, as it is along a layer-normalised random direction. Tensors
    that are zero stay zero.
    """

    kind: ClassVar[str] = "tensor-norm"
    usage: ClassVar[str] = "tensor-norm:[DIRECTION]"
    units: ClassVar[tuple[str, ...]] = ("tensors",)

    def make(self, model: Model) -> list[Direction]:
        targets = weight_norms(model)
        return [
            tree_of(
                {
                    name: scaled(leaf, targets[name] / norm) if (norm := float(_norm(leaf))) > 0 else leaf
                    for name, leaf in named_leaves(direction).items()
                }
            )
            for direction in self.of.make(model)
        ]


def norm_of_weights(model: Model) -> float:
    """The norm of all weights that random directions perturb, those of parameters without `norm` in their name."""
    norms = weight_norms(model)
    return float(np.sqrt(sum(norm**2 for name, norm in norms.items() if not is_norm(name))))


def norm_of(direction: Direction) -> float:
    """The norm of a whole direction."""
    return float(np.sqrt(sum(norm**2 for norm in tensor_norms(direction).values())))


_known_norms: "WeakKeyDictionary[Model, dict[str, float]]" = WeakKeyDictionary()


def weight_norms(model: Model) -> dict[str, float]:
    """The norm of each of the model's tensors by its name, computed once for all directions."""
    if model not in _known_norms:
        _known_norms[model] = tensor_norms(model.params)
    return _known_norms[model]


def tensor_norms(direction: Direction) -> dict[str, float]:
    """The norm of each tensor by its name, the same on every mesh."""
    norms = {name: _norm(leaf) for name, leaf in named_leaves(direction).items()}
    return {name: float(norm) for name, norm in norms.items()}


def _scaled_to(direction: Direction, target: float, name: str) -> Direction:
    norm = norm_of(direction)
    if not 0 < norm < np.inf:
        raise UserError(f"The direction {name} has the norm {norm:g}, so it cannot be scaled to the weights' norm.")
    return tree_of({name: scaled(leaf, target / norm) for name, leaf in named_leaves(direction).items()})


@jax.jit
def _norm(tensor: Any) -> Float[Array, ""]:
    return tensor_norm(dense(tensor))
