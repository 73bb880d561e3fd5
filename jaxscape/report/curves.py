"""Several quantities along one axis, as a figure and as a table."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from jaxscape.report.canvas import Figure
from jaxscape.report.figures import COLOURS, MARKERS, STYLES
from jaxscape.report.markup import markdown_table

Curve = Float[np.ndarray, "3 points"] | Float[np.ndarray, " points"]
"""Values at each point; or the lower ends of their intervals, the values and the upper ends."""

Panels = Mapping[str, Mapping[str, Curve]]
"""For each quantity, by its name and unit, its curves by their names."""


LOG_FROM = 100  # ratio of the largest value to the smallest from which an axis is logarithmic


def plot_curves(x: Sequence[float], xlabel: str, panels: Panels) -> Figure:
    """A figure with a panel for each quantity, one above the other, that share the horizontal axis.

    Arguments:
        x: the points on the horizontal axis.
        panels: what is drawn. An interval is a band. A unit "(%)" lets the vertical axis run from 0 to 100. Values of
            several orders of magnitude, all positive, have a logarithmic one.
    """
    figure = Figure(figsize=(7, 0.6 + 2.6 * len(panels)), layout="constrained")
    plots = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for plot, (ylabel, curves) in zip(plots, panels.items(), strict=True):
        for number, (name, curve) in enumerate(curves.items()):
            colour = COLOURS[number % len(COLOURS)]
            low, values, high = np.broadcast_to(curve, (3, len(x)))
            plot.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            style, marker = STYLES[number % len(STYLES)], MARKERS[number % len(MARKERS)]
            plot.plot(x, values, color=colour, linestyle=style, marker=marker, markersize=4, label=name)
        plot.set_ylabel(ylabel)
        drawn = np.concatenate([np.ravel(curve) for curve in curves.values()])
        if "(%)" in ylabel:
            plot.set_ylim(-3, 103)
        elif np.nanmin(drawn) > 0 and np.nanmax(drawn) > LOG_FROM * np.nanmin(drawn):
            plot.set_yscale("log")
        plot.grid(alpha=0.3)
        if len(curves) > 1:
            plot.legend(fontsize=8)
    plots[-1].set_xlabel(xlabel)
    return figure


def curves_table(x: Sequence[float], xlabel: str, panels: Panels) -> str:
    """The same as a Markdown table with a row for each point; the arguments are those of `plot_curves`."""
    rows = [[xlabel], *([f"{value:+.3g}" if min(x) < 0 else f"{value:.3g}"] for value in x)]
    for label, curves in panels.items():
        for name, curve in curves.items():
            rows[0].append(f"{label}: {name}" if len(curves) > 1 else label)
            for row, values in zip(rows[1:], np.atleast_2d(curve).T, strict=True):
                value, *ends = map(_number, (values[len(values) // 2], *values[::2]))
                row.append(f"{value} ({ends[0]} to {ends[1]})" if len(values) == 3 else value)
    return markdown_table(rows)


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
