"""The parts of Matplotlib that figures are drawn with: no pyplot, and no backend, so that none has to be there.

Figures import Matplotlib from here, because `import matplotlib` fails where MPLBACKEND names a backend that is not
installed. The programs that a notebook starts inherit such a name, but not the notebook's packages.
"""

import io
import os
import sys
from contextlib import suppress

if "matplotlib" not in sys.modules and "MPLBACKEND" in os.environ:
    _backend = os.environ.pop("MPLBACKEND")
    import matplotlib

    os.environ["MPLBACKEND"] = _backend
    with suppress(ValueError):  # there is no such backend
        matplotlib.rcParams["backend"] = _backend  # as Matplotlib does when it is imported

from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.lines import Line2D

__all__ = ["Axes", "Figure", "Line2D", "MatplotlibFigure", "patheffects", "png", "without_formulas"]


class Figure(MatplotlibFigure):
    """Matplotlib's figure, which a notebook shows whether or not it has chosen a backend."""

    def _repr_png_(self) -> bytes:
        return png(self)


def without_formulas(figure: Figure) -> Figure:
    """The figure, in which Matplotlib draws titles, labels and legends as plain text. Names of files, models and
    directions may contain dollar signs, and it would read a formula between two of them."""
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for plot in figure.axes:
        legend = plot.get_legend()
        texts += [plot.title, plot.xaxis.label, plot.yaxis.label, *plot.texts, *(legend.get_texts() if legend else ())]
    for text in texts:
        text.set_parse_math(False)
    return figure


def png(figure: MatplotlibFigure, dpi: int | None = None) -> bytes:
    """The figure as the content of a PNG file. The same figure always gives the same bytes.

    Arguments:
        dpi: pixels per inch; None for the figure's own.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi or "figure", metadata={"Software": None})
    return content.getvalue()
