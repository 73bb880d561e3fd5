"""Take the screenshots of reports that the documentation shows.

    python benchmarks/report_screenshots.py --line RUN --plane RUN --beside RUN

It writes `line.png` (a line with its shares), `plane.png` (contours and the surface), `point.png` (a point that is
opened, with its answers filtered) and `runs.png` (two runs, and a point of each beside the other).
"""

import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from chromium import open_chromium, open_report
from PIL import Image
from playwright.sync_api import Browser, Page

from jaxscape.cli.main import run_program
from jaxscape.landscapes.landscape import Landscape
from jaxscape.landscapes.numbers import THRESHOLD
from jaxscape.report.page.document import save_report
from jaxscape.runtime.files import write_whole
from jaxscape.runtime.streams import write_line

WIDTH = 1280
COLOURS = 128  # of a screenshot, which makes it small


@dataclass(frozen=True)
class Screenshots:
    """Take the screenshots of reports that the documentation shows."""

    line: Path = Path("runs/smollm2-135m-safe-1d")
    """A scan of a line, with shares."""
    plane: Path = Path("runs/plane")
    """A scan of a plane."""
    beside: Path = Path("runs/safety")
    """Another scan of a line with the same points, which is shown beside the first."""
    out: Path = Path("docs/report")
    """The directory to write."""

    def run(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        rim = steps_to_rim(Landscape.load(self.line))
        with open_chromium() as browser:
            self._take(browser, "line", [self.line], lambda page: None, "main")
            self._take(browser, "plane", [self.plane], lambda page: page.locator("canvas").first.wait_for(), "main")
            self._take(browser, "point", [self.line], lambda page: read(page, rim), "#answers")
            self._take(browser, "runs", [self.line, self.beside], lambda page: read_both(page, rim), "#answers")

    def _take(self, browser: Browser, name: str, runs: Sequence[Path], act: Callable[[Page], None], last: str) -> None:
        """Write the screenshot of a report on the runs, after something was done with it, down to the end of the
        element that `last` selects."""
        with tempfile.TemporaryDirectory() as directory:
            report = save_report(runs, Path(directory) / "report.html")
            with open_report(browser, report) as page:
                act(page)
                page.mouse.move(0, 0)
                page.wait_for_timeout(1000)  # until surfaces are drawn and scrolling has ended
                page.evaluate("scrollTo(0, 0)")
                box = page.locator(last).bounding_box()
                assert box is not None, "every report has these elements"
                area: Any = {"x": 0, "y": 0, "width": WIDTH, "height": box["y"] + box["height"] + 16}
                content = page.screenshot(full_page=True, clip=area)
        image = io.BytesIO()
        Image.open(io.BytesIO(content)).convert("RGB").quantize(COLOURS).save(image, "PNG", optimize=True)
        write_whole(self.out / f"{name}.png", image.getvalue())
        write_line(f"{self.out / name}.png  {len(image.getvalue()) / 1000:.0f} kB")


def steps_to_rim(land: Landscape) -> int:
    """How many points to the right of the model the ASR first exceeds 50 %; 0 if it never does."""
    assert land.origin is not None, "the axis of a scan contains the model"
    return int(np.argmax(land.asr[0, land.origin[0] :] > THRESHOLD))


def open_point(page: Page, figure: int, steps: int) -> None:
    """Open the point that lies some steps to the right of the model."""
    page.locator(".frame").nth(figure).focus()
    for key in ("Home", *["ArrowRight"] * steps, "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector("#answers-title:focus")


def read(page: Page, steps: int) -> None:
    """Open a point, filter the answers that comply, and unfold the first."""
    open_point(page, 0, steps)
    page.locator(".filters button", has_text="complied").click()
    page.locator("#rows summary").first.click()


def read_both(page: Page, steps: int) -> None:
    """Open a point of each of two runs, filter the answers that differ, and unfold the first."""
    open_point(page, 0, steps)
    page.get_by_role("button", name="Compare").click()
    open_point(page, 1, steps)
    page.locator(".filters button", has_text="A and B differ").click()
    page.locator("#rows summary").first.click()


if __name__ == "__main__":
    run_program(Screenshots, name="python benchmarks/report_screenshots.py")
