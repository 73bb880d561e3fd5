"""Landscapes: axes, attack success rates on their grid, VISAGE, and the file that holds them."""

import math
from dataclasses import dataclass

from jaxscape.runtime.errors import UserError


@dataclass(frozen=True)
class Axis:
    """One coordinate of a landscape, in multiples of its direction."""

    name: str
    values: tuple[float, ...]


def symmetric_axes(ndim: int, steps: int, radius: float) -> tuple[Axis, ...]:
    """`ndim` axes of `steps + 1` equidistant values from −radius to radius, zero among them.

    Raises:
        UserError: `steps` is odd, so that the centre would be missed, or anything is out of range.
    """
    if ndim not in (1, 2):
        raise UserError(f"A landscape has 1 or 2 dimensions, not {ndim}.")
    if steps < 2 or steps % 2:
        raise UserError(f"The number of steps must be even and at least 2, so that the centre is a point; not {steps}.")
    if not (0 < radius < math.inf):
        raise UserError(f"The radius must be a positive number, not {radius}.")
    # This form gives exactly 0 in the middle, ±radius at the ends, and opposite values around the middle.
    values = tuple(radius * ((2 * i - steps) / steps) for i in range(steps + 1))
    return tuple(Axis(name, values) for name in ("alpha", "beta")[:ndim])


def interpolation_axis(steps: int, extra_steps: int = 0, name: str = "interpolation") -> Axis:
    """From one model, at 0, to another, at 1, in `steps` intervals, with `extra_steps` more beyond either end.

    Raises:
        UserError: there are fewer than 1 steps, or fewer than 0 extra ones.
    """
    if steps < 1:
        raise UserError(f"The number of steps must be at least 1, not {steps}.")
    if extra_steps < 0:
        raise UserError(f"The number of extra steps must be 0 or more, not {extra_steps}.")
    return Axis(name, tuple(i / steps for i in range(-extra_steps, steps + extra_steps + 1)))
