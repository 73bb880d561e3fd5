"""What the readers of kept runs say of one whose `config.json` or `landscape.json` someone has damaged."""

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import with_shares, write_scan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.landscapes.axes import symmetric_axes
from jaxscape.landscapes.landscape import FILE_NAME
from jaxscape.runtime.rundir import CONFIG

READERS = ("runs", "report RUN", "compare RUN RUN", "plot RUN", "export RUN --to csv", "export RUN --to landscaper")
READERS += ("export RUN --to inspect", "export RUN --to hub")

ODD = st.sampled_from(
    [None, True, -1, 0, 2**70, 1e300, "", "x", "control:[", [], [None], [[]], [["x"]], [3], {}, {"x": None}, {"x": {}}]
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished scan along a special direction and its control, with shares and an evaluator."""
    axes, prompts = symmetric_axes(1, 2, 0.5), ["Why?", "How?"]
    names = [["gradient"], ["control:[gradient]"]]
    directory = write_scan(
        tmp_path_factory.mktemp("damaged") / "runs" / "run",
        axes,
        lambda index, coords, prompt: "I cannot" if index else "Sure",
        prompts,
        judges={"wei": lambda text: "refused"},
        num_sets=2,
        direction_names=names,
        seed=0,
        temperature=0.0,
        prompt_source="mine.csv",
        evaluator="keywords",
    )
    refused = np.broadcast_to(np.array([False, True])[:, None, None], (2, 3, 2))
    land = js.Landscape.from_outcomes(
        axes, refused, np.zeros((2, 3), int), np.ones((2, 3), bool), directions=names, complied=~refused
    )
    with_shares(land).save(directory)
    return directory


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], odd: Any) -> Any:
    """A JSON value with another value at a path; with nothing there if `odd` is `...`."""
    if not path:
        return odd
    copy = value.copy()
    if len(path) == 1 and odd is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = replaced(value[path[0]], path[1:], odd)
    return copy


def damaged(run: Path, file: str, path: tuple[Any, ...], odd: Any) -> Path:
    """A copy of the run with another value at a path in a file."""
    copy = run.parent.parent / "copy" / "run"
    shutil.rmtree(copy.parent, ignore_errors=True)
    shutil.copytree(run, copy)
    (copy / file).write_text(json.dumps(replaced(json.loads((run / file).read_text()), path, odd)))
    return copy


def told(reader: str, run: Path) -> tuple[int, str]:
    """The exit code of a command, and what it writes on the error stream."""
    words = [str(run) if word == "RUN" else word for word in reader.split()]
    error, code = io.StringIO(), 0
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            main([*words, *([str(run.parent)] if reader == "runs" else [])])
        except SystemExit as end:
            code = int(end.code or 0)
    return code, error.getvalue()


@pytest.mark.parametrize("file", [CONFIG, FILE_NAME])
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_damaged_run_is_read_or_is_one_sentence(file: str, data: st.DataObject, run: Path) -> None:
    """Never a traceback, whatever stands in the place of a value."""
    path = data.draw(st.sampled_from(sorted(places(json.loads((run / file).read_text())), key=str)))
    copy = damaged(run, file, path, data.draw(ODD | st.just(...)))
    code, error = told(data.draw(st.sampled_from(READERS)), copy)
    assert code in (0, 2)
    assert code == 0 or error.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "path", "odd", "message"),
    [
        (CONFIG, ("direction_names",), 3, "direction_names in config.json is 3"),
        (CONFIG, ("direction_names", 0), None, "direction_names in config.json has None"),
        (CONFIG, ("direction_names", 0), ..., "direction_names in config.json are of 1 direction sets, and not of 2"),
        (CONFIG, ("seed",), "x", "seed in config.json is 'x'"),
        (FILE_NAME, ("control", "numbers"), ..., "is not a landscape file (KeyError: 'numbers')"),
        (FILE_NAME, ("control", "visage", "paper"), None, "is no number with an interval"),
        (FILE_NAME, ("numbers", "asr", "volume", "value"), True, "is no number with an interval"),
        (FILE_NAME, ("numbers", "asr", "radius", "directions", 0, "positive", "at_least"), ..., "KeyError: 'at_least'"),
        (FILE_NAME, ("directions",), [["gradient"]], "names of 1 direction sets"),
        (FILE_NAME, ("axes", 0), {"name": "a", "values": [-0.5, 0, 0.5], "unit": "parsec"}, "unknown unit 'parsec'"),
        (FILE_NAME, ("shares", "complied_low"), ..., "a share lacks an end of its interval"),
        (FILE_NAME, ("numbers", "asr", "radius", "directions"), [], "numbers of 0 directions, and not of 1"),
    ],
)
@pytest.mark.parametrize("reader", ["report RUN", "export RUN --to csv"])
def test_what_is_damaged_is_said(
    file: str, path: tuple[Any, ...], odd: Any, message: str, reader: str, run: Path
) -> None:
    code, error = told(reader, damaged(run, file, path, odd))
    assert code == 2
    assert message in error
