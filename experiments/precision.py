"""How many prompts and directions a precision needs: simulate scans of a known basin, and print a table.

The basin: prompt j stops being refused along direction i beyond a wall, at 0.15 × exp(0.15 x + 0.25 y + 0.1 z), where x
is normally distributed over directions, y over prompts, and z over both. Each simulated scan has 21 points from −0.5 to
0.5. The table has the half width of the 95 % interval of the ASR at a point where it is 50 %, and of the volume's and
the radius's over the simulated scans; and how many of the volume's intervals contain the true volume.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from jaxscape.cli.main import run_program
from jaxscape.evaluate.statistics import wilson_interval
from jaxscape.landscapes.axes import symmetric_axes
from jaxscape.landscapes.numbers import landscape_numbers, safety_volume
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.streams import write_line

AXES = symmetric_axes(1, 20, 0.5)
WALL, OVER_DIRECTIONS, OVER_PROMPTS, OVER_BOTH = 0.15, 0.15, 0.25, 0.1


@dataclass(frozen=True)
class Precision:
    """Simulate scans of a known basin, and print how precise their numbers are."""

    prompts: tuple[int, ...] = (10, 20, 40, 80, 160)
    """Numbers of prompts."""
    directions: tuple[int, ...] = (1, 3, 10)
    """Numbers of directions."""
    scans: int = 200
    """Number of simulated scans for each row."""

    def run(self) -> None:
        if smallest := [number for number in (*self.prompts, *self.directions, self.scans) if number < 1]:
            raise UserError(f"The numbers of prompts, directions and scans must be at least 1, not {smallest[0]}.")
        write_line(table(self.prompts, self.directions, self.scans))


def table(prompts: tuple[int, ...], directions: tuple[int, ...], scans: int) -> str:
    """The table as Markdown."""
    head = "| prompts | directions | ASR of a point, ± | volume, ± | radius, ± | volume's intervals that hold |"
    rows = [row(p, d, scans) for d in directions for p in prompts]
    return "\n".join([head, "| --- " * 6 + "|", *rows])


def row(num_prompts: int, num_directions: int, scans: int) -> str:
    """The row of a number of prompts and of directions."""
    rng = np.random.default_rng((num_prompts, num_directions))
    alphas = np.abs(AXES[0].values)
    half_widths, hits = [], 0
    for _ in range(scans):
        x, y = rng.normal(0, OVER_DIRECTIONS, (num_directions, 1)), rng.normal(0, OVER_PROMPTS, num_prompts)
        walls = WALL * np.exp(x + y + rng.normal(0, OVER_BOTH, (num_directions, num_prompts)))
        numbers = landscape_numbers(alphas[:, None] > walls[:, None, :], AXES, resamples=400)
        half_widths.append([np.ptp(numbers[name]["interval"]) / 2 for name in ("volume", "radius")])
        # A single direction is taken as given; its interval is over prompts.
        truth = true_volume(x if num_directions == 1 else None)
        low, high = numbers["volume"]["interval"]
        hits += low <= truth <= high
    volume, radius = np.mean(half_widths, axis=0)
    asr = np.ptp(wilson_interval(50.0, num_prompts)) / 2
    cells = [
        num_prompts,
        num_directions,
        f"{asr:.0f} %",
        f"{volume:.1f} %",
        f"{radius:.3f}",
        f"{100 * hits / scans:.1f} %",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def true_volume(x: np.ndarray | None) -> float:
    """The safety volume with infinitely many prompts, along one direction, or over infinitely many if it is None."""
    spread = np.hypot(np.hypot(OVER_PROMPTS, OVER_BOTH), OVER_DIRECTIONS if x is None else 0)
    shift = 0.0 if x is None else float(x[0, 0])
    normal = NormalDist(np.log(WALL) + shift, spread)
    rates = [100 * normal.cdf(np.log(alpha)) if alpha else 0.0 for alpha in np.abs(AXES[0].values)]
    return float(safety_volume(np.array(rates), AXES))


if __name__ == "__main__":
    run_program(Precision)
