"""`jaxscape plot`: draw a figure of a run again, finished or not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxscape.runtime.help import shown
from jaxscape.runtime.streams import write_line


@dataclass(frozen=True)
class Plot:
    """Draw a figure of a run again, finished or not.

    Examples:
      # The landscape of a scan
      jaxscape plot runs/smollm2-135m-safe-1d
      # The radii of a search that is still going on
      jaxscape plot runs/smollm2-135m-safe-radius
      # A figure by its name
      jaxscape plot runs/paper-2d --figure landscape
    """

    directory: Annotated[Path, tyro.conf.Positional, shown(metavar="RUN")]
    """The run's directory."""
    figure: Annotated[str | None, shown("that of the run", "NAME")] = None
    """What to draw: landscape (the ASR at each point of a scan) or radius (the radii that jaxscape radius found)."""

    def run(self) -> None:
        from jaxscape.report.registry import draw_run

        write_line(f"{draw_run(self.directory, self.figure)}")
