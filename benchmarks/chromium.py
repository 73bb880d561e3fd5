"""Headless Chromium for the scripts of this folder: the system's own, through Playwright."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from jaxscape.runtime.errors import UserError


@contextmanager
def open_chromium() -> Iterator[Browser]:
    """A context with a browser.

    Raises:
        UserError: no Chromium is installed.
    """
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        raise UserError("No Chromium is installed: install the package chromium of your distribution.")
    # Surfaces are drawn by the CPU where there is no GPU. Root cannot have Chromium's sandbox.
    arguments = ["--enable-unsafe-swiftshader", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@contextmanager
def open_report(browser: Browser, path: Path, width: int = 1280, height: int = 860) -> Iterator[Page]:
    """A context with the page of a report whose figures are drawn."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.goto(path.resolve().as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached", timeout=120_000)
    yield page
    page.close()
