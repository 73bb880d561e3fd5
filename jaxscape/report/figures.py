"""Figures of landscapes: curves with intervals in 1D, contours and surfaces in 2D."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxscape.finetuning.trajectory import Trajectory
from jaxscape.landscapes.axes import Axis
from jaxscape.landscapes.landscape import Landscape
from jaxscape.report.canvas import Axes, Figure, MatplotlibFigure, patheffects, png
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import write_whole

# The palette of Okabe and Ito, which colour-blind readers can tell apart. Line styles and markers differ too, for
# readers in black and white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")
TRAJECTORY_COLOURS = ("#FFFFFF", "#E69F00", "#56B4E9")
COLOUR_MAP = "cividis"  # its lightness rises evenly, so that it reads the same in grey
GREEK = {"alpha": "\N{GREEK SMALL LETTER ALPHA}", "beta": "\N{GREEK SMALL LETTER BETA}"}
ASR_LABEL = "attack success rate (%)"

Draw = Callable[[Landscape, Sequence[Trajectory]], MatplotlibFigure]
"""A function that draws a landscape, complete or not, with the trajectories of finetunings on it."""


def plot_landscape(landscape: Landscape, trajectories: Sequence[Trajectory] = ()) -> Figure:
    """A figure of a landscape, which may be unfinished. Its title gives VISAGE.

    1D: the ASR along each direction with its 95 % interval. 2D: for each direction set a filled contour plot and a
    surface. Trajectories are drawn on the contour plot; the legend gives the largest residual of each, the fraction
    of a checkpoint's distance from the start that is orthogonal to the plane.
    """
    return _plot_1d(landscape) if len(landscape.axes) == 1 else _plot_2d(landscape, trajectories)


def save_figure(
    landscape: Landscape,
    path: str | Path,
    dpi: int = 150,
    trajectories: Sequence[Trajectory] = (),
    draw: Draw = plot_landscape,
) -> None:
    """Write the figure that `draw` makes as a PNG file. The same landscape always gives the same bytes.

    Raises:
        UserError: the file cannot be written.
    """
    content = png(draw(landscape, trajectories), dpi)
    try:
        write_whole(Path(path), content)
    except OSError as error:
        raise UserError(f"The figure cannot be written to {path} ({reason(error)}): choose another file.") from error


def _title(landscape: Landscape) -> str:
    values = landscape.visage_values
    if values is None:
        return f"unfinished: {np.isfinite(landscape.asr).sum()} of {landscape.asr.size} points"
    low, high = values["interval"]
    return f"VISAGE {values['paper']:.1f} (95 % interval {low:.1f} to {high:.1f}), {landscape.num_prompts} prompts"


def axis_label(name: str) -> str:
    if _is_interpolation(name):
        return f"{name} (0: the model, 1: the other)"
    return f"{GREEK.get(name, name)} (distance along the direction)"


def _is_interpolation(name: str) -> bool:
    return name.startswith("interpolation")


def _plot_1d(landscape: Landscape) -> Figure:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    plot = figure.add_subplot()
    (axis,) = landscape.axes
    _draw_curves(plot, landscape)
    mark_models(plot, axis)
    plot.set(xlabel=axis_label(axis.name), ylabel=ASR_LABEL, ylim=(-3, 103), title=_title(landscape))
    plot.grid(alpha=0.3)
    if len(landscape.asr) > 1:
        plot.legend()
    return figure


def _draw_curves(plot: Axes, landscape: Landscape) -> None:
    """The ASR along each direction, and a band for its interval."""
    coords = landscape.axes[0].values
    for i, (asr, low, high) in enumerate(zip(landscape.asr, landscape.asr_low, landscape.asr_high, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        plot.fill_between(coords, low, high, color=colour, alpha=0.15, linewidth=0)
        plot.plot(
            coords,
            asr,
            color=colour,
            linestyle=STYLES[i % len(STYLES)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            label=f"direction {i}",
        )


def mark_models(plot: Axes, axis: Axis) -> None:
    """A labelled vertical line at the model, and at the other model of an interpolation."""
    style: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "center", "fontsize": 8, "color": "0.35"}
    models = {0: "the model", 1: "the other model"} if _is_interpolation(axis.name) else {0: "the model"}
    for coord, name in models.items():
        plot.axvline(coord, color="0.5", linewidth=0.8, linestyle=":")
        plot.text(coord, 0.5, f"{name} ", transform=plot.get_xaxis_transform(), **style)


def _plot_2d(landscape: Landscape, trajectories: Sequence[Trajectory]) -> Figure:
    num_sets = len(landscape.asr)
    figure = Figure(figsize=(11, 4.4 * num_sets), layout="constrained")
    figure.suptitle(_title(landscape))
    for i, asr in enumerate(landscape.asr):
        values = np.ma.masked_invalid(asr)
        contour = figure.add_subplot(num_sets, 2, 2 * i + 1)
        filled = _draw_contour(contour, landscape.axes, values)
        _draw_trajectories(contour, trajectories)
        figure.colorbar(filled, ax=contour, label=ASR_LABEL)
        surface = figure.add_subplot(num_sets, 2, 2 * i + 2, projection="3d")
        _draw_surface(surface, landscape.axes, values)
        if num_sets > 1:
            contour.set_title(f"direction set {i}", fontsize=10)
    return figure


def _draw_contour(plot: Axes, axes: Sequence[Axis], values: np.ma.MaskedArray) -> Any:
    """A filled contour plot of ASR values, with a cross at the model. Returns what a colour bar is made from."""
    first, second = axes
    x, y = np.meshgrid(first.values, second.values, indexing="ij")
    filled = plot.contourf(x, y, values, levels=np.arange(0, 101, 10), cmap=COLOUR_MAP)
    lines = plot.contour(x, y, values, levels=[10, 50, 90], colors="k", linewidths=0.7)
    plot.clabel(lines, fmt="%d %%", fontsize=8)
    plot.plot(0, 0, marker="+", color="w", markersize=10, markeredgewidth=2)
    aspect: Any = "auto" if _is_interpolation(first.name) else "equal"
    plot.set(xlabel=axis_label(first.name), ylabel=axis_label(second.name), aspect=aspect)
    return filled


def _draw_trajectories(plot: Axes, trajectories: Sequence[Trajectory]) -> None:
    """The trajectories on a contour plot, outlined so that they stand out from any colour, and a legend below it."""
    outline = [patheffects.withStroke(linewidth=3.5, foreground="k")]
    for i, trajectory in enumerate(trajectories):
        style: dict[str, Any] = {
            "color": TRAJECTORY_COLOURS[i % len(TRAJECTORY_COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
        }
        label = f"{trajectory.name} (residual up to {100 * trajectory.residual.max():.0f} %)"
        plot.plot(*trajectory.coords.T, **style, markersize=5, path_effects=outline, label=label, clip_on=False)
    if trajectories:
        plot.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _draw_surface(plot: Any, axes: Sequence[Axis], values: np.ma.MaskedArray) -> None:
    """ASR values as a surface over the plane."""
    first, second = axes
    x, y = np.meshgrid(first.values, second.values, indexing="ij")
    plot.plot_surface(x, y, values, cmap=COLOUR_MAP, vmin=0, vmax=100, rcount=60, ccount=60)
    plot.set(
        xlabel=GREEK.get(first.name, first.name),
        ylabel=GREEK.get(second.name, second.name),
        zlabel="ASR (%)",
        zlim=(0, 100),
    )
