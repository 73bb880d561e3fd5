"""The figure of measures: a panel for each, below the landscape of a scan along the same directions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxscape.landscapes.axes import Axis
from jaxscape.landscapes.landscape import Landscape
from jaxscape.landscapes.measurement import Measurement
from jaxscape.report.canvas import Axes, Figure, png, without_formulas
from jaxscape.report.figures import ASR_LABEL, COLOUR_MAP, COLOURS, MARKERS, STYLES, axis_label, mark_models
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import write_whole


def plot_measures(measurement: Measurement, landscape: Landscape | None = None) -> Figure:
    """A figure of measures, which may be unfinished: a panel for each measure.

    1D: the value along each direction with its 95 % interval. 2D: a filled contour plot for each direction set.

    Arguments:
        landscape: a scan along the same directions and axes, whose ASR is drawn in the first panel.
    """
    panels: list[tuple[str, str, Mapping[str, Any]]] = [
        (name, measurement.labels[name], values) for name, values in measurement.measures.items()
    ]
    if landscape is not None:
        rates = {"value": landscape.asr, "low": landscape.asr_low, "high": landscape.asr_high}
        panels = [("ASR", ASR_LABEL, rates), *panels]
    draw = _plot_1d if len(measurement.axes) == 1 else _plot_2d
    return without_formulas(draw(measurement.axes, panels))


def save_measures_figure(measurement: Measurement, path: str | Path, landscape: Landscape | None = None) -> None:
    """Write the figure as a PNG file. The same measurement always gives the same bytes.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        write_whole(Path(path), png(plot_measures(measurement, landscape), 150))
    except OSError as error:
        raise UserError(f"The figure cannot be written to {path} ({reason(error)}): choose another file.") from error


def _plot_1d(axes: Sequence[Axis], panels: Sequence[tuple[str, str, Mapping[str, Any]]]) -> Figure:
    figure = Figure(figsize=(7, 2.6 * len(panels) + 0.6), layout="constrained")
    plots = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for plot, (name, label, values) in zip(plots, panels, strict=True):
        for i, (value, low, high) in enumerate(zip(values["value"], values["low"], values["high"], strict=True)):
            colour = COLOURS[i % len(COLOURS)]
            style: dict[str, Any] = {"linestyle": STYLES[i % len(STYLES)], "marker": MARKERS[i % len(MARKERS)]}
            plot.fill_between(axes[0].values, low, high, color=colour, alpha=0.15, linewidth=0)
            plot.plot(axes[0].values, value, color=colour, markersize=4, label=f"direction {i}", **style)
        mark_models(plot, axes[0])
        plot.set_title(name, fontsize=10)
        plot.set_ylabel(label, fontsize=7)
        plot.grid(alpha=0.3)
    plots[-1].set_xlabel(axis_label(axes[0]))
    if len(panels[0][2]["value"]) > 1:
        plots[0].legend(fontsize=8)
    return figure


def _plot_2d(axes: Sequence[Axis], panels: Sequence[tuple[str, str, Mapping[str, Any]]]) -> Figure:
    num_sets = len(panels[0][2]["value"])
    figure = Figure(figsize=(5.5 * num_sets, 4.4 * len(panels)), layout="constrained")
    plots = figure.subplots(len(panels), num_sets, squeeze=False)
    for row, (name, label, values) in zip(plots, panels, strict=True):
        for i, (plot, value) in enumerate(zip(row, values["value"], strict=True)):
            filled = _draw_contour(plot, axes, value)
            if filled is not None:
                figure.colorbar(filled, ax=plot, label=label)
            plot.set_title(name if num_sets == 1 else f"{name}, direction set {i}", fontsize=10)
    return figure


def _draw_contour(plot: Axes, axes: Sequence[Axis], value: Float[np.ndarray, "first second"]) -> Any:
    """A filled contour plot with a cross at the model; None if no point is evaluated."""
    first, second = axes
    x, y = np.meshgrid(first.values, second.values, indexing="ij")
    plot.plot(0, 0, marker="+", color="w", markersize=10, markeredgewidth=2)
    plot.set(xlabel=axis_label(first), ylabel=axis_label(second))
    if not np.isfinite(value).any():
        return None
    return plot.contourf(x, y, np.ma.masked_invalid(value), levels=12, cmap=COLOUR_MAP, zorder=0)
