"""Preempt a scan in shards at random moments, and compare what it ends with with an unbroken run.

    python benchmarks/preemption.py --out runs/preemption         # 20 preemptions; 20 minutes on two CPU cores

One unbroken process scans first. Then the shards of the same scan run, one process at a time. Each process is ended at a
random moment, by SIGTERM or by SIGKILL, and another one goes on with a shard that is not finished. After the last
preemption all shards are finished and merged. Counted are points that were on disk or reported and are gone (lost),
points that were decoded or judged twice (repeated), and files of the merged run that differ from those of the unbroken
one. Exit code 1 if there are any, or if SIGTERM led to another exit code than 75. (A point that is being decoded when
SIGKILL comes is neither on disk nor reported, and is begun again.)
"""

import random
import re
import signal
import subprocess
import sys
from collections import Counter
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
    """Preempt a scan in shards at random moments, and compare what it ends with with an unbroken run."""

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
    """A process is ended at a random moment of its first so many seconds. One that is finished before does not count."""
    seed: int = 0
    """Seed of the moments."""

    def run(self) -> None:
        if self.out.exists() and any(self.out.iterdir()):
            raise js.UserError(f"{self.out} is not empty: choose another --out.")
        self.out.mkdir(parents=True, exist_ok=True)
        chance = random.Random(self.seed)
        subprocess.run([*self._scan, "--out", str(self.out / "single")], check=True)
        shards = [
            _Shard(self.out / f"{i}", (*self._scan, "--shard", f"{i}/{self.shards}"), self.num_prompts)
            for i in range(1, self.shards + 1)
        ]
        ends = Counter[str]()
        while sum(ends.values()) < self.preemptions and (left := [shard for shard in shards if not shard.is_finished]):
            number = chance.choice([signal.SIGTERM, signal.SIGKILL])
            code = chance.choice(left).live(chance.uniform(0, self.longest), number)
            if code != 0:
                ends[f"{number.name}, exit code {code}"] += 1
        for shard in shards:
            if not shard.is_finished:
                shard.live(None, signal.SIGTERM)
        merged = self.out / "merged"
        subprocess.run(
            [*PROGRAM, "merge", *(str(shard.directory) for shard in shards), "--out", str(merged)], check=True
        )
        names = sorted({path.name for run in (merged, self.out / "single") for path in run.iterdir()})
        differing = [name for name in names if not _are_equal(merged / name, self.out / "single" / name)]
        lost, repeated = (sum(getattr(shard, name) for shard in shards) for name in ("lost", "repeated"))
        for end, count in sorted(ends.items()):
            write_line(f"{end}: {count}")
        write_line(f"preemptions: {sum(ends.values())}; points lost: {lost}; points repeated: {repeated}")
        write_line(f"files: {len(names)}, of which differ: {', '.join(differing) or 'none'}")
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

    def __init__(self, directory: Path, command: tuple[str, ...], num_prompts: int) -> None:
        self.directory, self.lost, self.repeated = directory, 0, 0
        self._command, self._num_prompts = command, num_prompts
        self._log = directory.with_name(f"{directory.name}.log")
        self._kept = b""
        self._reported = set[tuple[str, str]]()

    @property
    def is_finished(self) -> bool:
        return any(
            run.directory == self.directory and run.state == "finished" for run in find_runs(self.directory.parent)
        )

    def live(self, seconds: float | None, number: signal.Signals) -> int:
        """Run the command until it ends, or is ended by a signal after some seconds. Return its exit code."""
        with self._log.open("w") as log:
            process = subprocess.Popen([*self._command, "--out", str(self.directory)], stdout=log, stderr=log)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(number)
            code = process.wait()
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


def _are_equal(first: Path, second: Path) -> bool:
    return first.exists() and second.exists() and first.read_bytes() == second.read_bytes()


if __name__ == "__main__":
    run_program(PreemptionBenchmark)
