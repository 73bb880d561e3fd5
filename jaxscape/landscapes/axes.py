"""The axes of a landscape: symmetric around the model, or from the model to another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxscape.runtime.errors import UserError
from jaxscape.runtime.texts import printable

UNITS = ("tensors", "weights", "raw", "own")
"""The units of axes, see `Axis.unit`."""


@dataclass(frozen=True)
class Axis:
    """One axis of a landscape.

    Attributes:
        values: the coordinates of the grid along this axis, as multiples of the direction.
        unit: what a coordinate of 1 is: `tensors`, the norm of each tensor; `weights`, the norm of all weights that
            random directions perturb; `raw`, the direction as it is made; `own`, several of these, because the
            direction sets differ. None stands for what the axis's name says: the direction of a set of random
            directions, or the other model of an interpolation.
    """

    name: str
    values: tuple[float, ...]
    unit: str | None = None

    @classmethod
    def read(cls, entry: Any) -> "Axis":
        """The axis that an entry of a run's file describes. Raises one of several exceptions if it describes none."""
        unit = entry.get("unit")
        if unit not in (None, *UNITS):
            raise ValueError(f"unknown unit {unit!r:.40}")
        return cls(str(entry["name"]), tuple(map(float, entry["values"])), unit)

    def described(self) -> dict[str, Any]:
        """The axis in the files of a run, which leave out a unit of None."""
        return {"name": self.name, "values": list(self.values), **({} if self.unit is None else {"unit": self.unit})}


def point_text(axes: Sequence[Axis], coords: Sequence[float]) -> str:
    """A point's coordinates for lines of progress, such as `alpha +0.1, beta -0.2`, or `(+0.1, -0.2)` without axes."""
    if not axes:
        return f"({', '.join(f'{c:+.4g}' for c in coords)})"
    return ", ".join(f"{printable(axis.name)} {c:+.4g}" for axis, c in zip(axes, coords, strict=True))


def symmetric_axes(ndim: int, steps: int, radius: float) -> tuple[Axis, ...]:
    """`ndim` axes with `steps + 1` equidistant values each, from −radius to radius; the middle one is exactly 0.

    Raises:
        UserError: `steps` is odd, so that no value would be 0, or an argument is out of range.
    """
    if ndim not in (1, 2):
        raise UserError(f"A landscape has 1 or 2 dimensions, not {ndim}.")
    if steps < 2 or steps % 2:
        raise UserError(
            f"The number of steps must be even and at least 2, so that the model itself is a point; it is {steps}."
        )
    if not (0 < radius < math.inf):
        raise UserError(f"The radius must be a positive number, not {radius}.")
    # In this order of operations the middle is exactly 0, the ends are exactly ±radius, and the axis is symmetric.
    values = tuple(radius * ((2 * i - steps) / steps) for i in range(steps + 1))
    return tuple(Axis(name, values) for name in ("alpha", "beta")[:ndim])


def interpolation_axis(steps: int, extra_steps: int = 0, name: str = "interpolation") -> Axis:
    """An axis from one model, at 0, to another, at 1, in `steps` equal intervals, with `extra_steps` further intervals
    of the same width beyond each end.

    Raises:
        UserError: `steps` is less than 1, or `extra_steps` is negative.
    """
    if steps < 1:
        raise UserError(f"The number of steps must be at least 1, not {steps}.")
    if extra_steps < 0:
        raise UserError(f"The number of extra steps must be 0 or more, not {extra_steps}.")
    return Axis(name, tuple(i / steps for i in range(-extra_steps, steps + extra_steps + 1)))
