"""Preempt a scan in shards at random moments, and compare its result with that of an unbroken run.

    python benchmarks/preemption.py --out runs/preemption         # 20 preemptions

One unbroken process scans first. Then the shards of the same scan run, one process at a time. Each process is ended at
a random moment, by SIGTERM or by SIGKILL, and another one goes on with a shard that is not finished. After the last
preemption all shards are finished and merged. Counted are points that were on disk or reported and are gone (lost),
points that were decoded or judged twice (repeated), and files of the merged run that differ from those of the unbroken
one. The exit code is 1 if there are any, or if SIGTERM led to another exit code than 75. (A point that is being decoded
when SIGKILL comes is neither on disk nor reported, and is begun again.)
"""

import random
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jaxscape as js
from jaxscape.cli.main import run_program
from jaxscape.landscapes.runs import find_runs
from jaxscape.landscapes.store import GENERATIONS
from jaxscape.runtime import preemption
from jaxscape.runtime.streams import write_line

PROGRAM = (sys.executable, "-c", "from jaxscape.cli.main import main; main()")
REPORTED = re.compile(r"^ *(\d+)/\d+  (?:(\w+): )?direction ", re.MULTILINE)
"""The line about a point that is decoded, or that an evaluator has judged: the point's number, and the evaluator."""


@dataclass(frozen=True)
class PreemptionBenchmark:
    """Preempt a scan in shards at random moments, and compare its result with that of an unbroken run."""

    out: Path
    """An empty directory for the runs."""
    model: str = "smollm2-135m-safe"
    """A model, as in `jaxscape scan`."""
    num_prompts: int = 40
    """Number of prompts."""
    steps: int = 20
    """Intervals along the axis."""
    max_new_tokens: int = 64
    """Maximum number of tokens generated for a prompt."""
    num_directions: int = 1
    """Number of random directions."""
    shards: int = 4
    """Number of shards."""
    preemptions: int = 20
    """Number of preemptions."""
    longest: float = 60.0
    """A process is ended at a random moment of its first so many seconds. One that ends before does not count."""
    seed: int = 0
    """Seed of the moments."""

    def run(self) -> None:
        if self.out.exists() and any(self.out.iterdir()):
            raise js.UserError(f"{self.out} is not empty: choose another --out.")
        self.out.mkdir(parents=True, exist_ok=True)
        single, merged = self.out / "single", self.out / "merged"
        subprocess.run([*self._scan, "--out", str(single)], check=True)
        shards = [_Shard(self.out, i, self.shards, self._scan, self.num_prompts) for i in range(1, self.shards + 1)]
        ends = self._preempt(shards)
        for shard in shards:
            shard.live()
        directories = [str(shard.directory) for shard in shards]
        subprocess.run([*PROGRAM, "merge", *directories, "--out", str(merged)], check=True)
        self._tell(ends, shards, _differing(single, merged))

    def _preempt(self, shards: Sequence["_Shard"]) -> Counter[str]:
        """Preempt processes. Return how many ended with each signal and exit code."""
        chance, ends = random.Random(self.seed), Counter[str]()
        while ends.total() < self.preemptions and (left := [shard for shard in shards if not shard.is_finished]):
            number = chance.choice([signal.SIGTERM, signal.SIGKILL])
            if code := chance.choice(left).live(chance.uniform(0, self.longest), number):
                ends[f"{number.name}, exit code {code}"] += 1
        return ends

    def _tell(self, ends: Counter[str], shards: Sequence["_Shard"], differing: Sequence[str]) -> None:
        """Print the counts. The exit code is 1 if a point was lost or repeated, a file differs, or a process ended with
        an unusual code."""
        lost, repeated = sum(shard.lost for shard in shards), sum(shard.repeated for shard in shards)
        for end, count in sorted(ends.items()):
            write_line(f"{end}: {count}")
        write_line(f"preemptions: {ends.total()}; points lost: {lost}; points repeated: {repeated}")
        write_line(f"files that differ: {', '.join(differing) or 'none'}")
        usual = {f"SIGTERM, exit code {preemption.EXIT_CODE}", f"SIGKILL, exit code {-signal.SIGKILL}"}
        if lost or repeated or differing or ends.keys() - usual:
            sys.exit(1)

    @property
    def _scan(self) -> tuple[str, ...]:
        """The command of the whole scan."""
        options = ("model", "num_prompts", "steps", "max_new_tokens", "num_directions")
        given = [(f"--{name.replace('_', '-')}", str(getattr(self, name))) for name in options]
        return (*PROGRAM, "scan", "--form", "materialised", *(text for pair in given for text in pair))


class _Shard:
    """A shard, and what has become of its points.

    Attributes:
        lost: how many points were on disk, or reported, and are gone.
        repeated: how many points were decoded, or judged by an evaluator with a model, more than once.
    """

    def __init__(self, out: Path, number: int, count: int, scan: Sequence[str], num_prompts: int) -> None:
        self.directory, self.lost, self.repeated = out / f"shard-{number}", 0, 0
        self._command = [*scan, "--shard", f"{number}/{count}", "--out", str(self.directory)]
        self._num_prompts, self._log = num_prompts, out / f"shard-{number}.log"
        self._kept = b""
        self._reported = set[tuple[str, str]]()

    @property
    def is_finished(self) -> bool:
        return self.directory.exists() and [run.state for run in find_runs(self.directory)] == ["finished"]

    def live(self, seconds: float | None = None, number: int = signal.SIGTERM) -> int:
        """Run the command until it ends, or is ended by a signal after some seconds. Return its exit code."""
        with self._log.open("w") as log:
            process = subprocess.Popen(self._command, stdout=log, stderr=log)
            try:
                code = _end(process, seconds, number)
            finally:
                process.kill()  # if this program itself is ended
        self._compare()
        return code

    def _compare(self) -> None:
        """Compare what is on disk with what was there before, and with what was reported."""
        reported = set(REPORTED.findall(self._log.read_text()))
        self.repeated += len(reported & self._reported)
        self._reported |= reported
        state = self.directory / GENERATIONS
        lines, size = state.read_bytes().split(b"\n")[:-1] if state.exists() else [], self._num_prompts
        whole = b"".join(line + b"\n" for line in lines[: len(lines) // size * size])
        before = self._kept.count(b"\n") // size
        expected = max([before, *(int(number) for number, evaluator in self._reported if not evaluator)])
        self.lost += max(0, expected - len(lines) // size) if whole.startswith(self._kept) else before
        self._kept = whole


def _end(process: subprocess.Popen[bytes], seconds: float | None, number: int) -> int:
    """Wait until a process ends, and send it a signal after some seconds. Return its exit code."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        return process.wait()


def _differing(single: Path, merged: Path) -> list[str]:
    """The names of the files that two runs do not both have with the same bytes."""
    contents = [{path.name: path.read_bytes() for path in run.iterdir()} for run in (single, merged)]
    return sorted({name for name, _ in contents[0].items() ^ contents[1].items()})


if __name__ == "__main__":
    run_program(PreemptionBenchmark)
