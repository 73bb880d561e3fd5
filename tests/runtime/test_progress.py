"""Progress: lines that stay, in pipes, terminals of any width and notebooks, and a bar where there is room for it."""

import io
import os
import pty
import re
import sys
import threading

import pytest
from rich.cells import cell_len

from jaxscape.runtime.progress import progress_display

LINES = [
    "1/2  direction 0  alpha -0.5  ASR  60.0 %  0:17:47 left, and more words than forty columns can hold",
    "2/2  along restricted:[random:0]:*mlp*",
]
STYLE = re.compile(r"\x1b\[[\d;]*m")


def show() -> None:
    with progress_display(True) as bar:
        task = bar.add_task("coherence:[a model]", total=2)
        for done, line in enumerate(LINES, 1):
            bar.update(task, completed=done)
            bar.refresh()
            bar.print(line)


def on_terminal(monkeypatch: pytest.MonkeyPatch, **environment: str) -> list[str]:
    """What a terminal is sent, cut where the cursor leaves the row, without colours."""
    for name in ("COLUMNS", "LINES", "NO_COLOR", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm"} | environment).items():
        monkeypatch.setenv(name, value)
    ours, theirs = pty.openpty()
    received: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(ours, 4096):
                received.append(data)
        except OSError:  # Linux reports the end of a terminal so
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        show()
    reader.join()
    os.close(ours)
    return re.split(r"\r|\n|\x1b\[2K|\x1b\[\?25[hl]", STYLE.sub("", b"".join(received).decode()))


@pytest.mark.parametrize("columns", [30, 40, 100])
def test_a_bar_takes_one_row_of_a_narrow_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = on_terminal(monkeypatch, COLUMNS=str(columns))
    bars = [row for row in rows if row and row not in LINES]
    assert any("━" in row for row in bars)
    assert max(map(cell_len, bars)) <= columns
    assert [row for row in rows if row in LINES] == LINES


@pytest.mark.parametrize(
    "environment", [{"COLUMNS": "0"}, {"COLUMNS": "0", "LINES": "0"}, {"COLUMNS": "1"}, {"TERM": "dumb"}], ids=str
)
def test_no_line_is_lost_or_broken_by_an_odd_terminal(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = on_terminal(monkeypatch, **environment)
    assert [row for row in rows if row in LINES] == LINES
    if environment.get("COLUMNS") != "0":
        assert "".join(rows) == "".join(LINES), "there is no room for a bar"


@pytest.mark.parametrize("columns", ["0", "40", "x", None])
def test_a_pipe_gets_the_lines_alone(columns: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    show()
    assert sys.stderr.getvalue().splitlines() == LINES  # type: ignore[attr-defined]


def test_a_disabled_display_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_display(False) as bar:
        bar.print("a line")
    assert capfd.readouterr() == ("", "")
