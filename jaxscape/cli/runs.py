"""`jaxscape runs`: list the runs in a directory, with their states and numbers, the newest first."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from jaxscape.cli.options import check_texts
from jaxscape.runtime import remote
from jaxscape.runtime.help import shown
from jaxscape.runtime.streams import write_line
from jaxscape.runtime.texts import aligned, printable

if TYPE_CHECKING:
    from jaxscape.landscapes.runs import FoundRun


@dataclass(frozen=True)
class Runs:
    """List the runs in a directory and below it, with their states and numbers, the newest first.

    A run is finished, running, stopped (its command goes on with it) or damaged.

    Examples:
      # The runs of this project
      jaxscape runs
      # Those of an experiment
      jaxscape runs runs/experiment
      # For a script
      jaxscape runs --json
    """

    directory: Annotated[Path, tyro.conf.Positional, shown(metavar="[DIRECTORY]")] = Path("runs")
    """The directory that is searched."""
    json: bool = False
    """Write JSON instead of a table."""

    def run(self) -> None:
        check_texts(self.directory)

        from jaxscape.landscapes.runs import find_runs

        runs = find_runs(self.directory)
        if self.json:
            write_line(json.dumps([asdict(run) | {"directory": remote.shown(str(run.directory))} for run in runs]))
        elif runs:
            write_line(_table(runs))
        else:
            write_line(f"There is no run in {printable(str(self.directory))}: jaxscape scan makes one.")


def _table(runs: "list[FoundRun]") -> str:
    head = ("run", "kind", "model", "state", "done", "result", "changed")
    rows = [
        (
            remote.shown(str(run.directory)),
            run.kind,
            run.model if len(run.model) <= 40 else f"…{run.model[-39:]}",
            run.state,
            run.progress,
            run.result,
            time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed)),
        )
        for run in runs
    ]
    return aligned([head, *rows])
