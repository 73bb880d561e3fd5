"""Figures of several quantities along one axis."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from jaxscape.report.canvas import Figure
from jaxscape.report.figures import COLOURS, MARKERS, STYLES

Curve = Float[np.ndarray, "3 points"] | Float[np.ndarray, " points"]
"""Values at each point; or the lower ends of their intervals, the values and the upper ends."""


def plot_curves(x: Sequence[float], xlabel: str, panels: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """A figure with a panel for each quantity, one above the other, that share the horizontal axis.

    Arguments:
        x: the points on the horizontal axis.
        panels: for each panel, by the label of its vertical axis, the curves by their names in the legend. An interval
            is drawn as a band. A label with "(%)" lets the axis run from 0 to 100.
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
        if "(%)" in ylabel:
            plot.set_ylim(-3, 103)
        plot.grid(alpha=0.3)
        plot.legend(fontsize=8)
    plots[-1].set_xlabel(xlabel)
    return figure
