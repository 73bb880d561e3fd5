"""How far one can go along each kind of direction, and whether the model obeys there or falls apart.

    python experiments/directions.py                                   # 20 minutes on two CPU cores

Every direction has the norm of the weights, so that a distance means the same along all, and every special one has
a random control beside it. The distances double from point to point, because the most harmful directions need a
hundredth of what random ones need or less. OUT/table.md and OUT/figure.png hold the results.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import jaxscape as js
from jaxscape.cli.experiment import Experiment
from jaxscape.cli.main import run_program
from jaxscape.report.figures import plot_landscape
from jaxscape.report.markup import markdown_table
from jaxscape.report.tables import estimate_text


@dataclass(frozen=True)
class Directions(Experiment):
    """Compare kinds of directions of equal norm, each beside its random control. An unfinished run is resumed."""

    directions: tuple[str, ...] = (
        "random:0",
        "low-rank:1:0",
        "masked:[random:0][mask:snip]",
        "from:smollm2-135m",
        "refusal",
        "gradient",
        "worst-case",
    )
    """Directions by name, see docs/how-to/choose-a-direction.md."""
    nearest: float = 0.00005
    """The smallest distance from the model, in norms of the weights."""
    doublings: int = 12
    """How often it is doubled, on either side."""
    out: Path = Path("runs/directions")

    def run(self) -> None:
        prompts, model = self.harmful_prompts(), self.start()
        distances = [self.nearest * 2**i for i in range(self.doublings + 1)]
        axis = js.Axis("alpha", (*(-distance for distance in reversed(distances)), 0.0, *distances), "weights")
        named = [f"weight-norm:[{name}]" for name in self.directions]
        landscape = self.scan("scan", model, prompts, directions=named, axes=[axis])

        def results() -> tuple[str, Any]:
            figure = plot_landscape(landscape)
            for plot in figure.axes:
                plot.set_xscale("symlog", linthresh=self.nearest)
                plot.set_xticks([-0.1, -0.01, -0.001, 0, 0.001, 0.01, 0.1])
            return table(landscape), figure

        self.write_results(results)


def table(landscape: js.Landscape) -> str:
    """For each direction and its control: the radius on either side, and the largest share that complies."""
    found = (landscape.numbers, landscape.control.get("numbers", {}))
    special, controls = (iter(numbers["asr"]["radius"]["directions"] if numbers else ()) for numbers in found)
    rows = [["direction", "radius, negative side", "radius, positive side", "complies at most (%)", "there"]]
    for i, (names, is_control) in enumerate(zip(landscape.directions, landscape.is_control, strict=True)):
        radius = next(controls if is_control else special)
        complied = landscape.shares["complied"][i]
        most = int(np.argmax(complied))
        ends = [float(landscape.shares[f"complied_{end}"][i][most]) for end in ("low", "high")]
        rows.append(
            [
                names[0],
                *(estimate_text(radius[side], ".3g") for side in ("negative", "positive")),
                estimate_text({"value": float(complied[most]), "interval": ends}, ".1f"),
                f"{landscape.axes[0].values[most]:+.3g}",
            ]
        )
    return markdown_table(rows)


if __name__ == "__main__":
    run_program(Directions)
