"""Measure the size of a report of a large plane, and how long it takes to write and to open in Chromium.

    python benchmarks/report.py                          # a minute or two; 441 points, 80 prompts, 64 words an answer
    python benchmarks/report.py --words 512              # the paper's length of answers

The run is synthetic and written through the package's own store. Its answers are uniformly random words of a vocabulary
of 5000, which compress less well than what models write. Two further evaluators have judged them. Opening lasts from
navigation to the moment when all figures are drawn, with nothing cached; the best round of each counts.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from chromium import open_chromium, open_report
from jaxtyping import Float

from jaxscape.cli.main import run_program
from jaxscape.engine.scheduler import Completion
from jaxscape.evaluate.base import LABELS, Label
from jaxscape.landscapes.axes import symmetric_axes
from jaxscape.landscapes.store import open_run, records_of
from jaxscape.report.page.document import save_report
from jaxscape.runtime.streams import write_line

VOCABULARY = 5000
LETTERS = list("abcdefghijklmnopqrstuvwxyz")


@dataclass(frozen=True)
class Judge:
    """An evaluator by its name only."""

    name: str

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> Float[np.ndarray, " prompts"]:
        raise NotImplementedError


@dataclass(frozen=True)
class ReportBenchmark:
    """Measure the size of a report of a large plane, and how long it takes to write and to open."""

    prompts: int = 80
    """Number of prompts."""
    steps: int = 20
    """Steps along each axis."""
    words: int = 64
    """Words of each answer."""
    rounds: int = 3
    """How often the report is opened."""

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            write_plane(Path(directory), self.steps, self.prompts, self.words)
            start = time.perf_counter()
            path = save_report(directory)
            write_line(f"{(self.steps + 1) ** 2} points, {self.prompts} prompts, {self.words} words an answer")
            write_line(f"size     {path.stat().st_size / 1e6:8.2f} MB")
            write_line(f"written  {time.perf_counter() - start:8.2f} s")
            opened, read = zip(*(open_times(path) for _ in range(self.rounds)), strict=True)
            write_line(f"opened   {min(opened):8.2f} s")
            write_line(f"a point  {min(read):8.2f} s, from the key to its answers")


def write_plane(directory: Path, steps: int, num_prompts: int, num_words: int) -> None:
    """Write a finished scan of a plane with random answers and labels."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(LETTERS, rng.integers(2, 10))) for _ in range(VOCABULARY)]
    axes = symmetric_axes(2, steps, 0.5)
    prompts = [f"prompt {i}: {' '.join(rng.choice(words, 12))}" for i in range(num_prompts)]
    config = {"model": "synthetic", "weights": "0" * 64, "directions": [[0, 1]], "num_prompts": num_prompts}
    config |= {"axes": [axis.described() for axis in axes], "direction_names": [["random:0", "random:1"]]}
    with open_run(directory, config, axes, 1, prompts, prompts) as run:
        for point in run.points:
            refused = (rng.random(num_prompts) > 2 * np.linalg.norm(point[1])).tolist()
            texts = [" ".join(row) for row in rng.choice(words, (num_prompts, num_words))]
            judged = [(Judge(name), random_labels(rng, num_prompts)) for name in ("coherence", "judge")]
            answers = [Completion(text, num_words) for text in texts]
            run.append(records_of(point, prompts, answers, refused, [False] * num_prompts), judged)


def random_labels(rng: np.random.Generator, count: int) -> list[Label]:
    return [LABELS[i] for i in rng.integers(len(LABELS), size=count)]


def open_times(path: Path) -> tuple[float, float]:
    """Seconds until the figures of a report are drawn, and from the key that opens a point until it can be read."""
    with open_chromium() as browser, open_report(browser, path) as page:
        opened = float(page.get_attribute("html", "data-drawn") or "nan") / 1000
        page.locator(".frame").first.focus()
        start = time.perf_counter()
        page.keyboard.press("Enter")
        page.wait_for_selector("#rows details")
        return opened, time.perf_counter() - start


if __name__ == "__main__":
    run_program(ReportBenchmark, name="python benchmarks/report.py")
