"""`jaxscape export`: write the answers of a finished run in the format of the paper's code (output.jsonl)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxscape.runtime.streams import write_line


@dataclass(frozen=True)
class Export:
    """Write the answers of a finished run in the format of the paper's code (output.jsonl).

    Examples:
      # A line
      jaxscape export runs/smollm2-135m-safe-1d
      # A plane
      jaxscape export runs/paper-2d
      # Several direction sets, each of which gets a file
      jaxscape export runs/three-directions
    """

    directory: Annotated[Path, tyro.conf.Positional]
    """The run's directory."""

    def run(self) -> None:
        from jaxscape.report.reference import export_reference

        for path in export_reference(self.directory):
            write_line(f"{path}")
