"""`jaxscape merge`: make the whole run of the shards of a scan."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxscape.cli.options import check_texts, select_platform
from jaxscape.cli.scan import summary
from jaxscape.runtime.help import shown
from jaxscape.runtime.streams import write_line


@dataclass(frozen=True)
class Merge:
    """Make the whole run of the shards of a scan: the run that one machine would have written.

    Nothing is generated, and no model is loaded. The shards stay as they are.

    Examples:
      # The run of a scan in two parts, which `jaxscape scan --shard 1/2` and `--shard 2/2` have made
      jaxscape merge runs/first runs/second --out runs/whole
      # The shards of a scan with the default names of their directories
      jaxscape merge runs/smollm2-135m-safe-1d-shard-1-of-2 runs/smollm2-135m-safe-1d-shard-2-of-2 --out runs/scan
      # Shards and a run in an object store
      jaxscape merge s3://bucket/first s3://bucket/second --out s3://bucket/whole
    """

    shards: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="DIRECTORY ...", help_behavior_hint="(all shards, in any order)"),
    ]
    """The shards' directories."""
    out: Annotated[Path, shown(metavar="RUN")]
    """The directory of the whole run. It is written whole or not at all."""

    def run(self) -> None:
        check_texts(*self.shards, self.out)

        from jaxscape.landscapes.landscape import FIGURE
        from jaxscape.report.merged import merge_and_draw

        select_platform(["cpu"])  # merging needs no accelerator, whose memory JAX would take
        write_line(summary(merge_and_draw(self.shards, self.out), self.out / FIGURE))
