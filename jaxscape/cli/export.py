"""`jaxscape export`: write a finished scan in the format of another tool."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxscape.cli.options import check_texts
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.help import shown
from jaxscape.runtime.streams import write_line

Format = Literal["reference", "inspect", "csv", "parquet", "landscaper", "hub"]


@dataclass(frozen=True)
class Export:
    """Write a finished scan in the format of another tool.

    Examples:
      # Two tables for a spreadsheet or a data frame
      jaxscape export runs/smollm2-135m-safe-1d --to csv
      # A log for inspect view
      jaxscape export runs/smollm2-135m-safe-1d --to inspect
      # What a data set on the Hugging Face hub would hold
      jaxscape export runs/paper-2d --to hub --repo USER/NAME --dry-run
    """

    directory: Annotated[Path, tyro.conf.Positional, shown(metavar="RUN")]
    """The run's directory."""
    to: Format = "reference"
    """The format: reference (output.jsonl, as the paper's code has it), inspect (a log for inspect view), csv or
    parquet (tables of the points and of the answers), landscaper (a grid for Landscaper), or hub (a data set for the
    Hugging Face hub)."""
    out: Annotated[Path | None, shown("the run's directory; its folder hub with --to hub", "DIRECTORY")] = None
    """The directory to write to."""
    repo: Annotated[str | None, shown("none", "USER/NAME")] = None
    """With --to hub: the data set to upload to. It is made, and private, if it is missing."""
    public: bool = False
    """With --to hub: everyone may see a new data set. The texts in it are harmful."""
    dry_run: bool = False
    """With --to hub: write the folder, list what would be uploaded, and upload nothing."""

    def run(self) -> None:
        check_texts(self.directory, self.out or "", self.repo or "")
        self._check()

        from jaxscape.report.exports.registry import export_run

        paths = export_run(self.directory, self.to, self.out)
        if self.to == "hub":
            self._upload(paths)
        else:
            write_line("\n".join(map(str, paths)))

    def _check(self) -> None:
        """Raise a `UserError` if options do not belong together."""
        if self.to != "hub":
            given = [name for name in ("repo", "public", "dry_run") if getattr(self, name)]
            if given:
                raise UserError(f"--{given[0].replace('_', '-')} is for --to hub: leave it out, or give --to hub.")
        elif self.repo is None and not self.dry_run:
            raise UserError("--to hub needs the data set to upload to: give --repo USER/NAME, or --dry-run.")

    def _upload(self, paths: list[Path]) -> None:
        """Upload the files of a data set, or say what would be uploaded."""
        from jaxscape.report.exports.hub import upload

        folder = paths[0].parent  # the card is the first
        if self.dry_run:
            target = f"the {'public' if self.public else 'private'} data set {self.repo or 'USER/NAME'}"
            files = [f"{path.stat().st_size:>12,} bytes  {path.relative_to(folder)}" for path in paths]
            write_line("\n".join([f"{folder} would be uploaded to {target}:", *files]))
        elif self.repo is not None:
            write_line(upload(paths, folder, self.repo, self.public))
