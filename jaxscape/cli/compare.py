"""`jaxscape compare`: compare the landscapes of several runs, and say which differences exceed the noise."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxscape.cli.options import check_texts
from jaxscape.runtime.help import shown
from jaxscape.runtime.streams import write_line


@dataclass(frozen=True)
class Compare:
    """Compare the landscapes of several runs, and say which differences exceed the noise.

    Examples:
      # Two runs
      jaxscape compare runs/first runs/second
      # All runs of a name, which the shell fills in
      jaxscape compare runs/seed-*
      # Three runs, with their tables and figure as files
      jaxscape compare runs/first runs/second runs/third --out comparison
    """

    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN RUN ...", help_behavior_hint="(at least two)"),
    ]
    """The runs' directories."""
    out: Annotated[Path | None, shown("none", "DIRECTORY")] = None
    """Also write the tables (Markdown, CSV, LaTeX) and the figure into this directory."""

    def run(self) -> None:
        check_texts(*self.runs, self.out or "")

        from jaxscape.landscapes.comparison import compare
        from jaxscape.report.tables import to_markdown

        comparison = compare(self.runs)
        write_line(to_markdown(comparison).rstrip("\n"))
        if self.out is not None:
            from jaxscape.report.comparison import save_comparison

            for path in save_comparison(comparison, self.out):
                write_line(f"{path}")
