"""The figures that can be chosen by name."""

from pathlib import Path

from jaxscape.finetuning.trajectory import load_trajectories
from jaxscape.landscapes.landscape import FIGURE, Landscape
from jaxscape.report.figures import Draw, plot_landscape, save_figure
from jaxscape.runtime.errors import UserError

DEFAULT_FIGURE = "landscape"
FIGURES: dict[str, Draw] = {
    DEFAULT_FIGURE: plot_landscape,
    # A new figure is one more line here.
}


def find_figure(name: str) -> Draw:
    """The function that draws the figure of a name.

    Raises:
        UserError: there is no figure of this name.
    """
    if name not in FIGURES:
        raise UserError(f"Unknown figure {name!r}: choose {', '.join(FIGURES)}.")
    return FIGURES[name]


def draw_run(directory: Path, name: str = DEFAULT_FIGURE) -> Path:
    """Draw a figure of the run in a directory, finished or not.

    Returns:
        The file written: `landscape.png` for the default figure, else `landscape-NAME.png`.

    Raises:
        UserError: there is no figure of this name, the directory holds no run, or the file cannot be written.
    """
    draw = find_figure(name)
    path = directory / (FIGURE if name == DEFAULT_FIGURE else f"{Path(FIGURE).stem}-{name}.png")
    save_figure(Landscape.load(directory), path, trajectories=load_trajectories(directory), draw=draw)
    return path
