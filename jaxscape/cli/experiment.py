"""What the programs in `experiments/` share: their options, and how their results are written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxscape.cli.options import EvaluatorOptions, Group, ModelOptions, RunOptions, check_texts
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.remote import url_of

if TYPE_CHECKING:
    from jaxscape.landscapes.landscape import Landscape
    from jaxscape.models.model import Model
    from jaxscape.report.canvas import Figure
    from jaxscape.report.curves import Panels


@dataclass(frozen=True)
class Experiment:
    """The options of an experiment with landscapes of one model."""

    model: Group[ModelOptions] = field(default_factory=ModelOptions)
    devices: Group[RunOptions] = field(default_factory=RunOptions)
    evaluators: Group[EvaluatorOptions] = field(default_factory=EvaluatorOptions)
    prompts: str = "harmful"
    """The harmful prompts: a set or a file, as for `jaxscape scan`. The paper's are the first 80 of advbench."""
    num_prompts: int = 40
    """Number of prompts, from the first one on."""
    num_directions: int = 1
    """Number of random directions; the paper has three."""
    direction_seed: int = 0
    """Seed of the first random direction; further ones have the seeds after it."""
    steps: int = 20
    """Number of intervals along each direction; an even number."""
    radius: float = 0.5
    """The axes run from -RADIUS to RADIUS."""
    max_new_tokens: int = 64
    """Maximum number of tokens generated for a prompt; the paper has 512."""
    out: Path = Path("runs/experiment")
    """Directory of all runs and results. Unfinished runs in it are resumed."""
    overwrite: bool = False
    """Start over where the directory holds runs."""

    def start(self, options: ModelOptions | None = None) -> "Model":
        """Select the devices, and load the model, or the one that `options` name."""
        options = options or self.model
        check_texts(options.model, self.prompts, self.out, *self.evaluators.names)
        if url_of(self.out) is not None:
            raise UserError(
                f"An experiment keeps its runs and results on a disk: give --out a directory, not {self.out}."
            )
        self.devices.start()
        return options.load(self.devices.mesh)

    def harmful_prompts(self) -> list[str]:
        """The harmful prompts.

        Raises:
            UserError: they cannot be read, or are fewer than `num_prompts`.
        """
        from jaxscape.prompts.sets import load_prompts

        return load_prompts(self.prompts, self.num_prompts)

    def random_directions(self, ndim: int = 1) -> list[Any]:
        """The random direction sets."""
        from jaxscape.landscapes.choice import choose_directions

        return list(choose_directions(ndim, seed=self.direction_seed, num_directions=self.num_directions))

    def scan(
        self,
        name: str,
        model: "Model",
        prompts: Sequence[str],
        ndim: int = 1,
        directions: Sequence[Any] | None = None,
        **changes: Any,
    ) -> "Landscape":
        """The landscape in OUT/name; an unfinished one is finished.

        Arguments:
            directions: the direction sets; None for the random ones of these options, of `ndim` dimensions.
            changes: further arguments of `jaxscape.scan` that differ from these options.
        """
        from jaxscape.landscapes.scan import scan

        if directions is None:
            directions = self.random_directions(ndim)
        settings: dict[str, Any] = {
            "steps": self.steps,
            "radius": self.radius,
            "max_new_tokens": self.max_new_tokens,
            "overwrite": self.overwrite,
            **({"evaluator": self.evaluators.names} if self.evaluators.names else {}),
        }
        return scan(model, directions, prompts=prompts, out=self.out / name, **(settings | changes))

    def write_results(self, make: Callable[[], tuple[str, "Figure"]]) -> None:
        """Print and write a table and a figure; see the function `write_results`."""
        write_results(self.out, make)

    def write_curves(self, x: Sequence[float], xlabel: str, make: Callable[[], "Panels"]) -> None:
        """Write several quantities along one axis as a table and as a figure; see `jaxscape.report.curves`.

        Arguments:
            make: gives the curves; see `write_results`.
        """
        from jaxscape.report.curves import curves_table, plot_curves

        def results() -> tuple[str, "Figure"]:
            panels = make()
            return curves_table(x, xlabel, panels), plot_curves(x, xlabel, panels)

        self.write_results(results)

    def compare(self, landscapes: Mapping[str, "Landscape"]) -> None:
        """Write the numbers of landscapes, their differences, and the figure of all.

        Arguments:
            landscapes: the landscapes by their names in OUT.
        """
        from jaxscape.landscapes.comparison import compare
        from jaxscape.report.comparison import plot_comparison
        from jaxscape.report.tables import difference_table, landscape_table

        def results() -> tuple[str, "Figure"]:
            comparison = compare([self.out / name for name in landscapes])
            tables = filter(None, [landscape_table(landscapes), difference_table(comparison)])
            return "\n\n".join(tables), plot_comparison(comparison)

        self.write_results(results)


def write_results(out: Path, make: Callable[[], tuple[str, "Figure"]]) -> None:
    """Print a table, and write it to OUT/table.md and a figure to OUT/figure.png.

    Arguments:
        out: a directory that holds a run already.
        make: gives the table and the figure. Only the first process calls it, so it may read the runs' files.
    """
    from jaxscape.report.canvas import png
    from jaxscape.runtime.files import write_whole
    from jaxscape.runtime.processes import from_first
    from jaxscape.runtime.streams import write_line

    def write() -> None:
        table, figure = make()
        write_whole(out / "table.md", f"{table}\n")
        write_whole(out / "figure.png", png(figure, dpi=150))
        write_line(table)

    from_first(write)
