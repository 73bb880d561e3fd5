"""Figures of landscapes."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.figure import Figure

from jaxscape.finetuning.trajectory import Trajectory
from jaxscape.landscapes.landscape import Landscape
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.files import write_whole

# Okabe and Ito's colours, which colour-blind readers can tell apart; styles and markers do it in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")
PATH_COLOURS = ("#FFFFFF", "#E69F00", "#56B4E9")
COLOUR_MAP = "cividis"  # its lightness rises evenly, so it reads the same in grey
GREEK = {"alpha": "\N{GREEK SMALL LETTER ALPHA}", "beta": "\N{GREEK SMALL LETTER BETA}"}

Draw = Callable[[Landscape, Sequence[Trajectory]], Figure]
"""A function that draws a landscape, complete or not, with the trajectories of finetunings on it."""


def plot_landscape(landscape: Landscape, trajectories: Sequence[Trajectory] = ()) -> Figure:
    """Draw a landscape, be it complete or not.

    1D: the ASR along each direction with its 95 % interval. 2D: a filled contour and a surface for each direction set,
    and on the contour the trajectories, with the largest part of their length that the plane leaves out. VISAGE stands
    in the title.
    """
    return _plot_1d(landscape) if len(landscape.axes) == 1 else _plot_2d(landscape, trajectories)


def save_figure(
    landscape: Landscape,
    path: str | Path,
    dpi: int = 150,
    trajectories: Sequence[Trajectory] = (),
    draw: Draw = plot_landscape,
) -> None:
    """Write the figure that `draw` makes as a PNG file; the same landscape gives the same bytes."""
    content = io.BytesIO()
    draw(landscape, trajectories).savefig(content, format="png", dpi=dpi, metadata={"Software": None})
    try:
        write_whole(Path(path), content.getvalue())
    except OSError as error:
        raise UserError(f"The figure cannot be written to {path} ({error}).") from error


def _title(landscape: Landscape) -> str:
    values = landscape.visage_values
    if values is None:
        return f"unfinished: {np.isfinite(landscape.asr).sum()} of {landscape.asr.size} points"
    low, high = values["interval"]
    return f"VISAGE {values['paper']:.1f} (95 % interval {low:.1f} to {high:.1f}), {landscape.num_prompts} prompts"


def _axis_label(name: str) -> str:
    if _is_interpolation(name):
        return f"{name} (0: the model, 1: the other)"
    return f"{GREEK.get(name, name)} (distance along the direction)"


def _is_interpolation(name: str) -> bool:
    return name.startswith("interpolation")


def _plot_1d(landscape: Landscape) -> Figure:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    (axis,) = landscape.axes
    for i, (asr, low, high) in enumerate(zip(landscape.asr, landscape.asr_low, landscape.asr_high, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        axes.fill_between(axis.values, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            axis.values,
            asr,
            color=colour,
            linestyle=STYLES[i % len(STYLES)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            label=f"direction {i}",
        )
    label: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "center", "fontsize": 8, "color": "0.35"}
    for place, name in [(0, "the model"), (1, "the other model")][: 2 if _is_interpolation(axis.name) else 1]:
        axes.axvline(place, color="0.5", linewidth=0.8, linestyle=":")
        axes.text(place, 0.5, f"{name} ", transform=axes.get_xaxis_transform(), **label)
    axes.set(xlabel=_axis_label(axis.name), ylabel="attack success rate (%)", ylim=(-3, 103), title=_title(landscape))
    axes.grid(alpha=0.3)
    if len(landscape.asr) > 1:
        axes.legend()
    return figure


def _plot_2d(landscape: Landscape, trajectories: Sequence[Trajectory]) -> Figure:
    rows = len(landscape.asr)
    figure = Figure(figsize=(11, 4.4 * rows), layout="constrained")
    figure.suptitle(_title(landscape))
    first, second = landscape.axes
    x, y = np.meshgrid(first.values, second.values, indexing="ij")
    labels = {"xlabel": _axis_label(first.name), "ylabel": _axis_label(second.name)}
    for i, asr in enumerate(landscape.asr):
        values = np.ma.masked_invalid(asr)
        flat = figure.add_subplot(rows, 2, 2 * i + 1)
        filled = flat.contourf(x, y, values, levels=np.arange(0, 101, 10), cmap=COLOUR_MAP)
        lines = flat.contour(x, y, values, levels=[10, 50, 90], colors="k", linewidths=0.7)
        flat.clabel(lines, fmt="%d %%", fontsize=8)
        flat.plot(0, 0, marker="+", color="w", markersize=10, markeredgewidth=2)
        for number, path in enumerate(trajectories):
            style: dict[str, Any] = {"color": PATH_COLOURS[number % 3], "marker": MARKERS[number % len(MARKERS)]}
            label = f"{path.name} (residual up to {100 * path.residual.max():.0f} %)"
            outline = [patheffects.withStroke(linewidth=3.5, foreground="k")]
            flat.plot(*path.coords.T, **style, markersize=5, path_effects=outline, label=label, clip_on=False)
        if trajectories:
            flat.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        flat.set(**labels, aspect="auto" if _is_interpolation(first.name) else "equal")
        figure.colorbar(filled, ax=flat, label="attack success rate (%)")
        surface: Any = figure.add_subplot(rows, 2, 2 * i + 2, projection="3d")
        surface.plot_surface(x, y, values, cmap=COLOUR_MAP, vmin=0, vmax=100, rcount=60, ccount=60)
        surface.set(
            xlabel=GREEK.get(first.name, first.name),
            ylabel=GREEK.get(second.name, second.name),
            zlabel="ASR (%)",
            zlim=(0, 100),
        )
        if rows > 1:
            flat.set_title(f"direction set {i}", fontsize=10)
    return figure
