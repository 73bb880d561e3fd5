"""Figures of landscapes: curves with intervals in 1D, contours and surfaces in 2D."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxscape.finetuning.trajectory import Trajectory
from jaxscape.landscapes.axes import Axis
from jaxscape.landscapes.landscape import Landscape
from jaxscape.landscapes.numbers import THRESHOLD
from jaxscape.report.canvas import Axes, Figure, MatplotlibFigure, patheffects, png, without_formulas
from jaxscape.report.markup import visible
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
# From the bottom up, so that the ASR, which counts whatever is not refused, lies on the border of two areas. In grey,
# complied is dark, refused light, and incoherent hatched.
SHARES: dict[str, dict[str, Any]] = {
    "complied": {"facecolor": "#D55E00", "label": "complied"},
    "incoherent": {"facecolor": "#D0D0D0", "edgecolor": "#8C8C8C", "hatch": "///", "label": "incoherent"},
    "refused": {"facecolor": "#D6EBF8", "label": "refused"},
}

Draw = Callable[[Landscape, Sequence[Trajectory]], MatplotlibFigure]
"""A function that draws a landscape, complete or not, with the trajectories of finetunings on it."""


def plot_landscape(landscape: Landscape, trajectories: Sequence[Trajectory] = ()) -> Figure:
    """A figure of a landscape, which may be unfinished. Its title gives VISAGE.

    1D: the ASR along each direction with its 95 % interval, over the stacked shares of answers that comply, make no
    sense and refuse, the mean over the directions. 2D: for each direction set filled contour plots of the ASR and of
    the shares that comply and make no sense. Of a landscape without shares, 1D shows the ASR alone, and 2D a filled
    contour plot of it and a surface. Trajectories are drawn on the contour plots; the legend gives the largest residual
    of each, the fraction of a checkpoint's distance from the start that is orthogonal to the plane.

    A list of points is drawn like 1D, over the distance from the model if that rises from each point to the next, and
    else over the number of the point. Of an adaptive scan, only evaluated points have a marker or a dot.
    """
    figure = _plot_2d(landscape, trajectories) if len(landscape.axes) == 2 else _plot_1d(landscape)
    return without_formulas(figure)


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
    if landscape.complete and landscape.points:
        title = f"{len(landscape.points)} points, {landscape.num_prompts} prompts"
        return "\n".join(filter(None, [title, landscape.abandoned_text]))
    if values is None:
        return f"unfinished: {np.isfinite(landscape.asr).sum()} of {landscape.asr.size} points"
    low, high = values["interval"]
    title = f"VISAGE {values['paper']:.1f} (95 % interval {low:.1f} to {high:.1f}), {landscape.num_prompts} prompts"
    lines = [title, landscape.abandoned_text]
    if landscape.filled is not None:
        lines.append(f"{landscape.num_evaluated} of {landscape.asr.size} points evaluated, the others interpolated")
    return "\n".join(filter(None, lines))


UNITS = {
    None: "distance along the direction",
    "tensors": "in norms of each tensor",
    "weights": "in norms of all weights",
    "raw": "in lengths of the direction",
    "own": "in lengths of each direction",
}
"""What the label of an axis says of its unit, see `Axis.unit`."""


def axis_label(axis: Axis) -> str:
    if is_interpolation(axis.name):
        return f"{axis.name} (0: the model, 1: the other)"
    return f"{GREEK.get(axis.name, axis.name)} ({UNITS[axis.unit]})"


def is_interpolation(name: str) -> bool:
    return name.startswith("interpolation")


def _plot_panels(landscape: Landscape) -> Figure:
    """A panel for each direction set, with its name, two in a row: a special direction and its control side by side."""
    num_sets = len(landscape.asr)
    rows = -(-num_sets // 2)
    figure = Figure(figsize=(11, 0.9 + 3.1 * rows), layout="constrained")
    plots = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).ravel()
    coords, xlabel = horizontal(landscape)
    for i, plot in enumerate(plots[:num_sets]):
        one = landscape.select(np.arange(num_sets) == i)
        _draw_shares(plot, one)
        _draw_curves(plot, one, ("k",))
        _draw_radii(plot, radius_marks(landscape)[i])
        if landscape.axes:
            mark_models(plot, landscape.axes[0])
        plot.set_title(visible(" and ".join(landscape.directions[i])[:70]), fontsize=9)
        plot.grid(alpha=0.3)
        if len(coords) > 1:
            plot.set_xlim(coords.min(), coords.max())
        plot.set(ylim=(-1, 101), ylabel="" if i % 2 else "share of the answers (%)")
    for plot in plots[num_sets:]:
        plot.set_axis_off()
    for plot in plots[max(0, num_sets - 2) : num_sets]:
        plot.set_xlabel(xlabel)
        plot.xaxis.set_tick_params(labelbottom=True)
    labelled = {
        label: handle for plot in plots for handle, label in zip(*plot.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labelled.values(), labelled.keys(), fontsize=8, loc="outside lower center", ncols=len(labelled))
    figure.suptitle(_title(landscape))
    return figure


def _plot_1d(landscape: Landscape) -> Figure:
    if landscape.shares and landscape.directions and len(landscape.asr) > 1:
        return _plot_panels(landscape)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    plot = figure.add_subplot()
    coords, xlabel = horizontal(landscape)
    if landscape.shares:
        figure.set_figheight(4.8)
        _draw_shares(plot, landscape)
        _draw_curves(plot, landscape, ("k",))
        _draw_radii(plot, list(itertools.chain(*radius_marks(landscape))))
    else:
        _draw_curves(plot, landscape, COLOURS)
    if landscape.axes:
        mark_models(plot, landscape.axes[0])
    label = "share of the answers (%)" if landscape.shares else ASR_LABEL
    plot.set(xlabel=xlabel, ylabel=label, ylim=(-3, 103), title=_title(landscape))
    plot.grid(alpha=0.3)
    if landscape.shares:
        if len(coords) > 1:
            plot.set_xlim(coords.min(), coords.max())
        plot.set_ylim(-1, 101)
        plot.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    elif len(landscape.asr) > 1:
        plot.legend()
    return figure


def horizontal(landscape: Landscape) -> tuple[Float[np.ndarray, " points"], str]:
    """The points on the horizontal axis of a figure of a line or of a list of points, and the label of that axis."""
    if landscape.axes:
        return np.array(landscape.axes[0].values, np.float64), axis_label(landscape.axes[0])
    distances = np.linalg.norm(landscape.points, axis=1)
    if (np.diff(distances) > 0).all():
        return distances, "distance from the model (norm of the coordinates)"
    return np.arange(len(distances), dtype=np.float64), "number of the point"


def _draw_shares(plot: Axes, landscape: Landscape) -> None:
    """The shares, stacked, as the mean over the directions. A point at which not all directions are judged is left
    out."""
    coords, _ = horizontal(landscape)
    bottom = np.zeros(len(coords))
    for kind, style in SHARES.items():
        top = bottom + landscape.shares[kind].mean(axis=0)
        plot.fill_between(coords, bottom, top, linewidth=0, **style)
        bottom = top


def by_set(landscape: Landscape, numbers: Sequence[Any], controls: Sequence[Any]) -> list[Any]:
    """What each direction set has, in the order of the sets; None for a set that has nothing.

    Arguments:
        numbers, controls: what the sets that are no controls have, and what the controls have, each in their order.
    """
    special, control = iter(numbers), iter(controls)
    return [next(control if is_control else special, None) for is_control in landscape.is_control]


def radius_marks(landscape: Landscape) -> list[list[float]]:
    """For each direction set of a line, the coordinates at which the ASR rises above 50 %, on either side of the
    model."""
    numbers = (landscape.numbers, landscape.control.get("numbers"))
    radii = [((of or {}).get("asr", {}).get("radius") or {}).get("directions", []) for of in numbers]
    signs = {"negative": -1.0, "positive": 1.0}
    return [
        [sign * entry[side]["value"] for side, sign in signs.items() if side in entry and not entry[side]["at_least"]]
        for entry in (found or {} for found in by_set(landscape, *radii))
    ]


def _draw_radii(plot: Axes, marks: Sequence[float]) -> None:
    """A mark at each coordinate at which the ASR of a direction rises above 50 %."""
    if marks:
        style: dict[str, Any] = {"marker": "d", "markersize": 9, "color": "w", "markeredgecolor": "k"}
        label = f"radius: ASR rises above {THRESHOLD:.0f} %"
        plot.plot(marks, [THRESHOLD] * len(marks), linestyle="", zorder=4, label=label, **style)


def _draw_curves(plot: Axes, landscape: Landscape, colours: Sequence[str]) -> None:
    """The ASR along each direction, and a band for its interval."""
    coords, _ = horizontal(landscape)
    names = [" and ".join(item) for item in landscape.directions] or [
        f"direction {i}" for i in range(len(landscape.asr))
    ]
    if landscape.shares:
        names = [f"ASR, {name}" for name in names] if len(names) > 1 else ["attack success rate (ASR), 95 % interval"]
    for i, (asr, low, high) in enumerate(zip(landscape.asr, landscape.asr_low, landscape.asr_high, strict=True)):
        colour = colours[i % len(colours)]
        alpha = 0.15 / len(names) if landscape.shares else 0.15
        plot.fill_between(coords, low, high, color=colour, alpha=alpha, linewidth=0)
        plot.plot(
            coords,
            asr,
            color=colour,
            linestyle=STYLES[i % len(STYLES)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            markevery=None if landscape.filled is None else np.flatnonzero(~landscape.filled[i]).tolist(),
            label=names[i],
        )


def mark_models(plot: Axes, axis: Axis) -> None:
    """A labelled vertical line at the model, and at the other model of an interpolation."""
    style: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "center", "fontsize": 8, "color": "0.35"}
    models = {0: "the model", 1: "the other model"} if is_interpolation(axis.name) else {0: "the model"}
    for coord, name in models.items():
        plot.axvline(coord, color="0.5", linewidth=0.8, linestyle=":")
        plot.text(coord, 0.5, f"{name} ", transform=plot.get_xaxis_transform(), **style)


def _plot_2d(landscape: Landscape, trajectories: Sequence[Trajectory]) -> Figure:
    num_sets = len(landscape.asr)
    figure = Figure(figsize=(11, 4.4 * num_sets), layout="constrained")
    figure.suptitle(_title(landscape))
    if landscape.shares:
        _draw_planes(figure, landscape, trajectories)
        return figure
    for i, asr in enumerate(landscape.asr):
        values = np.ma.masked_invalid(asr)
        contour = figure.add_subplot(num_sets, 2, 2 * i + 1)
        filled = _draw_contour(contour, landscape.axes, values)
        _mark_evaluated(contour, landscape, i)
        _draw_trajectories(contour, () if landscape.is_control[i] else trajectories)
        figure.colorbar(filled, ax=contour, label=ASR_LABEL)
        surface = figure.add_subplot(num_sets, 2, 2 * i + 2, projection="3d")
        _draw_surface(surface, landscape.axes, values)
        if num_sets > 1:
            contour.set_title(f"direction set {i}", fontsize=10)
    return figure


def _draw_planes(figure: Figure, landscape: Landscape, trajectories: Sequence[Trajectory]) -> None:
    """For each direction set, the ASR, the share that complies and the share that makes no sense, side by side."""
    num_sets = len(landscape.asr)
    figure.set_size_inches(14, 4.4 * num_sets)
    rates = {
        ASR_LABEL: landscape.asr,
        "complied (%)": landscape.shares["complied"],
        "incoherent (%)": landscape.shares["incoherent"],
    }
    for i in range(num_sets):
        plots = [figure.add_subplot(num_sets, 3, 3 * i + column) for column in (1, 2, 3)]
        for plot, (label, values) in zip(plots, rates.items(), strict=True):
            filled = _draw_contour(plot, landscape.axes, np.ma.masked_invalid(values[i]))
            _mark_evaluated(plot, landscape, i)
            _draw_trajectories(plot, () if landscape.is_control[i] else trajectories)
            plot.set_title(f"{label}, direction set {i}" if num_sets > 1 else label, fontsize=10)
        figure.colorbar(filled, ax=plots, label="share of the answers (%)")


def _draw_contour(plot: Axes, axes: Sequence[Axis], values: np.ma.MaskedArray) -> Any:
    """A filled contour plot of a rate in percent, with a cross at the model. Returns what a colour bar is made from."""
    first, second = axes
    x, y = np.meshgrid(first.values, second.values, indexing="ij")
    filled = plot.contourf(x, y, values, levels=np.arange(0, 101, 10), cmap=COLOUR_MAP)
    lines = plot.contour(x, y, values, levels=[10, 50, 90], colors="k", linewidths=0.7)
    plot.clabel(lines, fmt="%d %%", fontsize=8)
    plot.plot(0, 0, marker="+", color="w", markersize=10, markeredgewidth=2)
    aspect: Any = "auto" if is_interpolation(first.name) else "equal"
    plot.set(xlabel=axis_label(first), ylabel=axis_label(second), aspect=aspect)
    return filled


def _mark_evaluated(plot: Axes, landscape: Landscape, index: int) -> None:
    """A dot at each point that an adaptive scan evaluated, in the direction set of this index."""
    if landscape.filled is not None:
        first, second = (np.array(axis.values) for axis in landscape.axes)
        rows, columns = np.nonzero(~landscape.filled[index])
        plot.plot(first[rows], second[columns], ".", color="w", markeredgecolor="k", markersize=3, markeredgewidth=0.3)


def _draw_trajectories(plot: Axes, trajectories: Sequence[Trajectory]) -> None:
    """The trajectories on a contour plot, outlined so that they stand out from any colour, and a legend below it."""
    outline = [patheffects.withStroke(linewidth=3.5, foreground="k")]
    for i, trajectory in enumerate(trajectories):
        style: dict[str, Any] = {
            "color": TRAJECTORY_COLOURS[i % len(TRAJECTORY_COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
        }
        label = f"{visible(trajectory.name)} (residual up to {100 * trajectory.residual.max():.0f} %)"
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
