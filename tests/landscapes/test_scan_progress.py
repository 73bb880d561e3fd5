"""The progress of a scan counts answers: answers are finished before their points are."""

from pathlib import Path
from typing import Any

import pytest

import jaxscape as js
from jaxscape.landscapes.progress import ScanProgress

PROMPTS = js.load_prompts("harmful", 8)
OPTIONS: dict[str, Any] = {"prompts": PROMPTS, "steps": 4, "max_new_tokens": 6, "shares": False, "progress": False}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What the bar showed after each event: the event, the answers that are finished, and the answers in all."""
    events: list[tuple[str, int, int]] = []

    def recorded(name: str) -> None:
        method = getattr(ScanProgress, name)

        def call(self: ScanProgress, *arguments: int) -> None:
            method(self, *arguments)
            (task,) = self._bar.tasks
            assert task.total is not None
            events.append((name, int(task.completed), int(task.total)))

        monkeypatch.setattr(ScanProgress, name, call)

    recorded("answers")
    recorded("point")
    return events


@pytest.mark.parametrize("form", ["materialised", "factorised"])
def test_the_bar_counts_answers(form: Any, tiny: js.Model, shown: list[tuple[str, int, int]]) -> None:
    js.scan(tiny, [0], options=js.EngineOptions(form=form, full_text=True), **OPTIONS)
    names, done, totals = zip(*shown, strict=True)
    assert set(totals) == {5 * 8}
    assert list(done) == sorted(done)
    assert done[-1] == 5 * 8
    first = names.index("point")
    assert (done[first] > 8) == (form == "factorised"), "answers at later points are finished before the first point is"


def test_a_resumed_and_an_extended_scan_begin_where_they_are(
    tiny: js.Model, shown: list[tuple[str, int, int]], tmp_path: Path
) -> None:
    few = OPTIONS | {"prompts": PROMPTS[:6]}
    js.scan(tiny, [0], out=tmp_path / "run", **few)
    generations = tmp_path / "run" / "generations.jsonl"
    generations.write_text("".join(generations.read_text().splitlines(keepends=True)[: 2 * 6]))
    shown.clear()
    js.scan(tiny, [0], out=tmp_path / "run", **few)
    assert shown[0][1] > 2 * 6
    assert shown[-1][1:] == (5 * 6, 5 * 6)
    shown.clear()
    js.scan(tiny, [0], out=tmp_path / "run", extend=True, **OPTIONS)
    assert shown[0][1] > 5 * 6
    assert shown[-1][1:] == (5 * 8, 5 * 8)
