"""`jaxscape plot`: draw the figure of a run again, finished or not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxscape.cli.options import write_line


@dataclass(frozen=True)
class Plot:
    """Draw the figure of a run again, finished or not.

    Examples:
      jaxscape plot runs/smollm2-135m-safe-1d
      jaxscape plot runs/paper-2d
    """

    directory: Annotated[Path, tyro.conf.Positional]
    """The run's directory."""

    def run(self) -> None:
        from jaxscape.finetuning.trajectory import load_trajectories
        from jaxscape.landscapes.landscape import Landscape
        from jaxscape.landscapes.store import FIGURE
        from jaxscape.report.figures import save_figure

        landscape, trajectories = Landscape.load(self.directory), load_trajectories(self.directory)
        save_figure(landscape, self.directory / FIGURE, trajectories=trajectories)
        write_line(f"{self.directory / FIGURE}")
