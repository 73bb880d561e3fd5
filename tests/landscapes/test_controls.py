"""Special directions beside their random controls: in the files, in the numbers and in the figure."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxscape as js
from jaxscape.cli.scan import summary
from jaxscape.report.figures import plot_landscape

SPECIAL = "sum:[random:0][gaussian:1]"
OPTIONS: dict[str, Any] = {"prompts": ["Hi", "Why?"], "steps": 2, "max_new_tokens": 4, "progress": False}


@pytest.fixture(scope="module")
def run(tiny: js.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "special"
    js.scan(tiny, [SPECIAL], out=out, **OPTIONS)
    return out


def test_a_control_is_scanned_beside_a_special_direction(run: Path) -> None:
    content = json.loads((run / "landscape.json").read_text())
    assert content["directions"] == [[SPECIAL], [f"control:[{SPECIAL}]"]]
    assert np.array(content["asr"]).shape == (2, 3)
    assert content["axes"][0]["unit"] == "raw"
    config = json.loads((run / "config.json").read_text())
    assert config["directions"] == [[SPECIAL], [f"control:{SPECIAL}:0"]]
    assert config["direction_names"] == content["directions"]


def test_numbers_are_those_of_the_special_direction_alone(tiny: js.Model, run: Path) -> None:
    both, alone = js.Landscape.load(run), js.scan(tiny, [SPECIAL], control=False, **OPTIONS)
    control = js.scan(tiny, [f"control:[{SPECIAL}]"], **OPTIONS)
    assert (both.visage_values, both.numbers) == (alone.visage_values, alone.numbers)
    assert both.control == {"visage": control.visage_values, "numbers": control.numbers}
    assert both.visage() == alone.visage()
    assert both.is_control.tolist() == [False, True]
    assert control.is_control.tolist() == [False], "a control that is scanned alone is what the run is about"
    np.testing.assert_array_equal(both.without_controls().asr, alone.asr)
    text = summary(both, run / "landscape.png")
    assert text.count("Control: VISAGE") == 1


def test_a_run_with_a_control_is_loaded_as_it_was_saved(run: Path, tmp_path: Path) -> None:
    js.Landscape.load(run).save(tmp_path)
    assert (tmp_path / "landscape.json").read_text() == (run / "landscape.json").read_text()


def test_the_figure_has_a_panel_for_each(run: Path) -> None:
    figure = plot_landscape(js.Landscape.load(run))
    assert [axes.get_title() for axes in figure.axes] == [SPECIAL, f"control:[{SPECIAL}]"]
    assert figure.axes[0].get_xlabel() == "α (in lengths of the direction)"


def test_runs_are_compared_without_their_controls(tiny: js.Model, run: Path, tmp_path: Path) -> None:
    js.scan(tiny, [SPECIAL], control=False, out=tmp_path / "alone", **OPTIONS)
    comparison = js.compare([run, tmp_path / "alone"])
    assert [item.succeeded.shape for item in comparison.runs] == [(1, 3, 2), (1, 3, 2)]
    assert {item.value for item in comparison.differences} == {0.0}


def test_a_run_is_resumed_with_its_control(tiny: js.Model, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "resumed"
    out.mkdir()
    for name in ("config.json", "prompts.jsonl"):
        (out / name).write_bytes((run / name).read_bytes())
    lines = (run / "generations.jsonl").read_bytes().splitlines(keepends=True)
    (out / "generations.jsonl").write_bytes(b"".join(lines[:7]))
    js.scan(tiny, [SPECIAL], out=out, **OPTIONS)
    assert (out / "generations.jsonl").read_bytes() == b"".join(lines)
    assert (out / "landscape.json").read_bytes() == (run / "landscape.json").read_bytes()
