"""The figures that can be chosen by name."""

from pathlib import Path

from jaxscape.finetuning.trajectory import load_trajectories
from jaxscape.landscapes import radii
from jaxscape.landscapes.landscape import FIGURE, Landscape
from jaxscape.report.figures import Draw, plot_landscape, save_figure
from jaxscape.report.radius import save_radii_figure
from jaxscape.runtime.errors import UserError, unknown_name
from jaxscape.runtime.remote import run_directory

DEFAULT_FIGURE, RADIUS = "landscape", "radius"
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
        raise unknown_name("figure", name, (*FIGURES, RADIUS))
    return FIGURES[name]


def draw_run(directory: Path, name: str | None = None) -> Path:
    """Draw a figure of the run in a directory, finished or not.

    Arguments:
        name: None for the figure that the run leaves: `radius` of a search for radii, `landscape` of a scan.

    Returns:
        The file written: `landscape.png` for that figure, `radius.png` for `radius`, else `landscape-NAME.png`.

    Raises:
        UserError: there is no figure of this name, the directory holds no run that has it, or the file cannot be
            written.
    """
    directory = run_directory(directory)
    if name is None:
        name = RADIUS if (directory / radii.RADII_FILE).exists() else DEFAULT_FIGURE
    if name == RADIUS:
        path = directory / radii.FIGURE
        save_radii_figure(radii.Radii.load(directory), path)
        return path
    draw = find_figure(name)
    if (directory / radii.CERTIFICATE_FILE).exists():
        raise UserError(f"{directory} holds a certificate of noise, which has no figure: `jaxscape radius` prints it.")
    path = directory / (FIGURE if name == DEFAULT_FIGURE else f"{Path(FIGURE).stem}-{name}.png")
    save_figure(Landscape.load(directory), path, trajectories=load_trajectories(directory), draw=draw)
    return path
