"""Directions that are restricted to some of the parameters."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import jax.numpy as jnp

from jaxscape.directions.base import Recipe, check_parts, default_radius, has_control, is_drawn, needs_option
from jaxscape.directions.storage import Direction
from jaxscape.models.checkpoint import named_leaves, tree_of
from jaxscape.models.model import Model
from jaxscape.runtime.errors import UserError


@dataclass(frozen=True)
class Restricted:
    """`restricted:[A]:WHERE`: direction A in the parameters that WHERE names, and zero elsewhere.

    WHERE is a list of patterns, separated by commas: a pattern of parameter names, in which `*` stands for any text,
    such as `*mlp*`, or `layers=FIRST-LAST`, the layers with these numbers, from 0.
    """

    of: Recipe
    where: str

    kind: ClassVar[str] = "restricted"
    usage: ClassVar[str] = "restricted:[DIRECTION]:PATTERN[,PATTERN…]"
    is_interpolation: ClassVar[bool] = False
    count: ClassVar[int] = 1

    @classmethod
    def compose(cls, parts: tuple[Recipe, ...], option: str) -> "Restricted":
        check_parts(cls, parts, 1, 1)
        return cls(parts[0], needs_option(cls, option))

    @property
    def axis_radius(self) -> float:
        return default_radius(self.of)

    @property
    def has_control(self) -> bool:
        return has_control(self.of)

    @property
    def is_drawn(self) -> bool:
        return is_drawn(self.of)

    def __str__(self) -> str:
        return f"{self.kind}:[{self.of}]:{self.where}"

    def make(self, model: Model) -> list[Direction]:
        selected = selected_parameters(self.where, model)
        return [
            tree_of(
                {
                    name: leaf if name in selected else jnp.zeros_like(weight)
                    for (name, leaf), weight in zip(
                        named_leaves(direction).items(), named_leaves(model.params).values(), strict=True
                    )
                }
            )
            for direction in self.of.make(model)
        ]


def selected_parameters(where: str, model: Model) -> set[str]:
    """The names of the parameters that a list of patterns selects, see `Restricted`.

    Raises:
        UserError: a pattern selects no parameter.
    """
    names, selected = list(named_leaves(model.params)), set()
    for pattern in where.split(","):
        found = {name for name in names if _matches(pattern, name)}
        if not found:
            raise UserError(
                f"The pattern {pattern!r} selects no parameter of {model.name}: its names are such as {names[0]} and "
                f"{names[-1]}, and its layers have the numbers 0 to {model.config.num_layers - 1}."
            )
        selected |= found
    return selected


def _matches(pattern: str, name: str) -> bool:
    if layers := re.fullmatch(r"layers=(\d+)-(\d+)", pattern):
        layer = re.search(r"\.layers\.(\d+)\.", name)
        return layer is not None and int(layers[1]) <= int(layer[1]) <= int(layers[2])
    return fnmatchcase(name, pattern)
