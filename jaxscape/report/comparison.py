"""The figure of a comparison of runs, and its files."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxscape.landscapes.comparison import ComparedRun, Comparison, share_units
from jaxscape.landscapes.numbers import THRESHOLD
from jaxscape.report.canvas import Axes, Figure, Line2D, png, without_formulas
from jaxscape.report.figures import ASR_LABEL, COLOURS, MARKERS, STYLES, axis_label, mark_models
from jaxscape.report.markup import visible
from jaxscape.report.tables import differences_to_csv, to_csv, to_latex, to_markdown
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import write_whole
from jaxscape.runtime.remote import run_directory

FIGURE = "comparison.png"


def plot_comparison(comparison: Comparison) -> Figure:
    """A figure of all runs of a comparison. Runs whose axes have other names or units get a panel of
    their own.

    A line is drawn as the mean ASR over its directions, with a band from the mean lower to the mean upper end of their
    95 % intervals; if there are several directions, each of them is a thin line too. A plane is drawn as the contour at
    which the mean ASR is 50 %. A run has the same colour, line style and marker everywhere.
    """
    panels: list[list[int]] = []
    for number, run in enumerate(comparison.runs):
        panel = next((panel for panel in panels if _fits(run, comparison.runs[panel[0]])), None)
        if panel is None:
            panels.append(panel := [])
        panel.append(number)
    figure = Figure(figsize=(7 * len(panels), 4.6), layout="constrained")
    for plot, numbers in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes = comparison.runs[numbers[0]].landscape.axes
        for number in numbers:
            draw = _draw_line if len(axes) == 1 else _draw_contour
            draw(plot, comparison.runs[number], number)
        plot.grid(alpha=0.3)
        plot.set_xlabel(axis_label(axes[0]))
        if len(axes) == 1:
            mark_models(plot, axes[0])
            plot.set(ylabel=ASR_LABEL, ylim=(-3, 103))
        else:
            plot.plot(0, 0, marker="+", color="k", markersize=10)
            plot.set(ylabel=axis_label(axes[1]), title=f"where the ASR is {THRESHOLD:.0f} %")
            plot.set_aspect("equal", adjustable="datalim")
        _add_legend(plot, {number: comparison.runs[number] for number in numbers})
    return without_formulas(figure)


def _fits(run: ComparedRun, other: ComparedRun) -> bool:
    """Whether two runs can be drawn on the same axes."""
    names = [[axis.name for axis in one.landscape.axes] for one in (run, other)]
    return names[0] == names[1] and share_units(run, other)


def save_comparison(comparison: Comparison, directory: str | Path) -> list[Path]:
    """Write `table.md`, `table.csv`, `differences.csv`, `table.tex` and `comparison.png` into a directory, which is
    created if it is missing. The same runs always give the same bytes.

    Returns:
        The files written.

    Raises:
        UserError: a file cannot be written.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name may have any character
        image = png(plot_comparison(comparison), dpi=150)
    contents: dict[str, str | bytes] = {
        "table.md": to_markdown(comparison),
        "table.csv": to_csv(comparison),
        "differences.csv": differences_to_csv(comparison),
        "table.tex": to_latex(comparison),
        FIGURE: image,
    }
    directory = run_directory(directory)
    paths = [directory / name for name in contents]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, contents.values(), strict=True):
            write_whole(path, content)
    except OSError as error:
        raise UserError(
            f"The comparison cannot be written to {directory} ({reason(error)}): choose another directory."
        ) from error
    return paths


def _style(number: int) -> dict[str, Any]:
    """Colour, line style and marker of a run; no two of the first twelve runs have the same."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": STYLES[number % len(STYLES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def _draw_line(plot: Axes, run: ComparedRun, number: int) -> None:
    land, style = run.landscape, _style(number)
    coords = np.array(land.axes[0].values)
    low, mean, high = (values.mean(axis=0) for values in (land.asr_low, land.asr, land.asr_high))
    plot.fill_between(coords, low, high, color=style["color"], alpha=0.15, linewidth=0)
    plot.plot(coords, mean, **style, markersize=4)
    for asr in land.asr if len(land.asr) > 1 else ():
        plot.plot(coords, asr, color=style["color"], linewidth=0.6, alpha=0.6)


def _draw_contour(plot: Axes, run: ComparedRun, number: int) -> None:
    mean, style = run.landscape.asr.mean(axis=0), _style(number)
    if np.nanmin(mean, initial=np.inf) < THRESHOLD < np.nanmax(mean, initial=-np.inf):
        first, second = (axis.values for axis in run.landscape.axes)
        plot.contour(
            first,
            second,
            np.ma.masked_invalid(mean.T),
            levels=[THRESHOLD],
            colors=style["color"],
            linestyles=style["linestyle"],
        )


def _add_legend(plot: Axes, runs: Mapping[int, ComparedRun]) -> None:
    """A legend of numbered runs below the axes."""
    handles = [Line2D([], [], **_style(number), markersize=4) for number in runs]
    labels = [f"run {number}" for number in runs]
    legend = plot.legend(handles, labels, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    for text, run in zip(legend.get_texts(), runs.values(), strict=True):
        name = visible(run.name)
        shown = name if len(name) <= 60 else f"…{name[-59:]}"
        text.set_text(shown if run.landscape.complete else f"{shown} (unfinished)")
