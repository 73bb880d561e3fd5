"""Merge the shards of a scan into one run, and draw the figure of this run."""

from collections.abc import Sequence
from pathlib import Path

from jaxscape.finetuning.trajectory import load_trajectories
from jaxscape.landscapes.landscape import FIGURE, Landscape
from jaxscape.landscapes.merge import merging
from jaxscape.report.figures import save_figure


def merge_and_draw(directories: Sequence[str | Path], out: str | Path) -> Landscape:
    """Merge shards, and draw the figure of the run, if it has none yet.

    Arguments, returned value and errors are those of `jaxscape.merge`.
    """
    with merging(directories, out) as (landscape, place):
        if not (place / FIGURE).exists():
            save_figure(landscape, place / FIGURE, trajectories=load_trajectories(place))
    return landscape
