"""`jaxscape report`: show runs in one HTML file, in which a click on a point reads its answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxscape.cli.options import check_texts
from jaxscape.runtime.help import shown
from jaxscape.runtime.streams import write_line


@dataclass(frozen=True)
class Report:
    """Show runs in one HTML file, in which a click on a point reads its answers.

    The file needs no network. It holds the prompts and answers of the runs.

    Examples:
      # A scan, as report.html in its directory
      jaxscape report runs/smollm2-135m-safe-1d
      # Two scans side by side
      jaxscape report runs/default runs/safety --out safety.html
      # All scans of the current directory
      jaxscape report runs/* --out all.html
    """

    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN ...", help_behavior_hint="(at least one)"),
    ]
    """The runs' directories. Unfinished scans are shown as far as they are."""
    out: Annotated[
        Path | None, shown("report.html in the directory of a single run, or in the current one", "FILE")
    ] = None
    """The file to write."""

    def run(self) -> None:
        check_texts(*self.runs, self.out or "")

        from jaxscape.report.page.document import save_report

        write_line(f"{save_report(self.runs, self.out)}")
