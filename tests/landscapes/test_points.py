"""Scans of listed points: the files that list them, and what is measured there."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.directions.point import materialise
from jaxscape.landscapes.points import as_points, load_points
from jaxscape.landscapes.scan_settings import ScanSettings
from jaxscape.report.exports.hub import card
from jaxscape.report.exports.registry import export_run
from jaxscape.report.run import load_finished

PROMPTS = js.load_prompts("harmful", 3)
OPTIONS: dict[str, Any] = {"prompts": PROMPTS, "max_new_tokens": 6, "progress": False, "shares": False}
POINTS = [[0.0, 0.0, 0.0], [0.1, -0.2, 0.05], [0.3, 0.0, 0.0]]


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "0.5,-1\n0,2e-1\n"),
        ("a.csv", "alpha,beta\n0.5,-1\n\n0,0.2\n"),
        ("a.CSV", '\ufeffalpha,"second, beta"\r\n 0.5 ,-1\r\n-0.0,.2\r\n'),
        ("a.json", "[[0.5, -1], [0, 0.2]]"),
    ],
)
def test_points_are_read_from_tables_and_lists(tmp_path: Path, name: str, text: str) -> None:
    assert load_points(written(tmp_path / name, text)) == ((0.5, -1.0), (0.0, 0.2))


@settings(max_examples=20)
@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 4)), elements=st.floats(-9, 9), unique=True))
def test_arrays_lists_and_files_give_the_same_points(tmp_path_factory: Any, points: np.ndarray) -> None:
    directory = tmp_path_factory.mktemp("points")
    np.savetxt(directory / "a.csv", points, fmt="%.17g", delimiter=",")
    (directory / "a.json").write_text(json.dumps(points.tolist()))
    expected = tuple(map(tuple, points.tolist()))
    assert as_points(points) == as_points(points.tolist()) == expected
    assert load_points(directory / "a.csv") == load_points(directory / "a.json") == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "has no points"),
        ("a.csv", "alpha,beta\n", "has no points"),
        ("a.json", "[]", "has no points"),
        ("a.csv", "0.1,0.2\n\n0.1,x\n", r"a\.csv, line 3: 'x' is no coordinate"),
        ("a.csv", "0.1,beta\n0.1,0.2\n", r"a\.csv, line 1: 'beta' is no coordinate"),
        ("a.csv", "a,b\n0.1,nan\n", r"a\.csv, line 2: nan is no coordinate"),
        ("a.csv", "0.1,1e999\n", "line 1: inf is no coordinate"),
        ("a.csv", "0.1,\n", "line 1: '' is no coordinate"),
        ("a.csv", "1_0,2\n", "line 1: '1_0' is no coordinate"),
        ("a.csv", "0,1;0,2\n", "line 1: '1;0' is no coordinate"),
        ("a.csv", "0.1,0.2\n0.3\n", r"a\.csv, line 2: 1 coordinates, but .*a\.csv, line 1, has 2"),
        ("a.csv", "0.1,0.2\n0.3,0\n0.10,0.2\n", r"line 3: \[0\.1, 0\.2\] is there already \(.*line 1\)"),
        ("a.csv", "0.0\n-0\n", r"line 2: \[0\.0\] is there already"),
        ("a.csv", '0.1,"0.2\n', "line 1, is not CSV"),
        ("a.json", "[[0.1, NaN]]", "point 0: nan is no coordinate"),
        ("a.json", f"[[0.1, {10**400}]]", "point 0: 1000.* is no coordinate"),
        ("a.json", '[[0.1, "0.2"]]', "point 0: '0.2' is no coordinate"),
        ("a.json", "[[0.1], [true]]", "point 1: True is no coordinate"),
        ("a.json", "[[0.1], []]", r"point 1: \[\] is no list of coordinates"),
        ("a.json", "[0.1, 0.2]", "point 0: 0.1 is no list of coordinates"),
        ("a.json", '[{"alpha": 0.1}]', "point 0: .* is no list of coordinates"),
        ("a.json", "[[[0.1]]]", r"point 0: \[0\.1\] is no coordinate"),
        ("a.json", '{"points": [[0.1]]}', "holds no list"),
        ("a.json", "[[0.1", "is not JSON"),
        ("a.txt", "0.1\n", r"whose name ends with \.csv or \.json"),
    ],
)
def test_files_that_list_no_points(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        load_points(written(tmp_path / name, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(js.UserError, match="cannot be read"):
        load_points(tmp_path / "none.csv")
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(js.UserError, match="cannot be read"):
        load_points(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points": [[0.1, 0.2]]}, "have 2 coordinates, but there are 3 directions"),
        ({"points": []}, "The list has no points"),
        ({"points": [0.1, 0.2, 0.3]}, "point 0: 0.1 is no list"),
        ({"points": "a.csv"}, "points are a str"),
        ({"points": POINTS, "adaptive": True}, "no grid"),
        ({"points": POINTS, "axes": []}, "no grid"),
    ],
)
def test_arguments_that_are_no_points(tiny: js.Model, tmp_path: Path, arguments: Any, message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        js.scan(tiny, [(0, 1, 2)], out=tmp_path / "run", **OPTIONS, **arguments)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def run(tiny: js.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("points") / "run"
    js.scan(tiny, [(0, 1, 2), (3, 4, 5)], points=POINTS, out=directory, **OPTIONS)
    return directory


def test_the_answers_are_those_of_the_model_at_each_point(tiny: js.Model, run: Path) -> None:
    records = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    assert [record["coords"] for record in records[::3]] == POINTS * 2
    directions = [js.random_direction(tiny, 3)]
    directions += [js.random_direction(tiny, seed, orthogonal_to=directions[0]) for seed in (4, 5)]
    moved = materialise(tiny.params, directions, jnp.array(POINTS[1]))
    texts = js.generate(js.Model(**{**vars(tiny), "params": moved}), PROMPTS, max_new_tokens=6)
    assert texts == [record["generation"] for record in records[12:15]]
    land = js.Landscape.load(run)
    assert land.asr.shape == (2, 3)
    assert land.asr[1, 1] == js.attack_success_rate(texts)


def test_the_file_has_the_points_and_no_numbers_of_a_grid(run: Path, tmp_path: Path) -> None:
    content = json.loads((run / "landscape.json").read_text())
    assert content["points"] == POINTS
    assert (content["axes"], content["visage"], content["complete"]) == ([], None, True)
    assert "numbers" not in content
    land = js.Landscape.load(run)
    assert land.complete
    assert land.origin == (0,)
    land.save(tmp_path)
    assert (tmp_path / "landscape.json").read_bytes() == (run / "landscape.json").read_bytes()
    with pytest.raises(js.UserError, match="VISAGE needs a grid"):
        land.visage()


@pytest.mark.parametrize("cut", [0.3, 0.8])
def test_a_run_of_points_is_resumed(tiny: js.Model, run: Path, tmp_path: Path, cut: float) -> None:
    for path in run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = (run / "generations.jsonl").read_bytes()
    (tmp_path / "generations.jsonl").write_bytes(state[: int(cut * len(state))])
    js.scan(tiny, [(0, 1, 2), (3, 4, 5)], points=np.array(POINTS), out=tmp_path, **OPTIONS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in run.iterdir()
    }
    with pytest.raises(js.UserError, match="another configuration"):
        js.scan(tiny, [(0, 1, 2), (3, 4, 5)], points=POINTS[::-1], out=tmp_path, **OPTIONS)


def test_what_else_is_done_with_a_run_of_points(run: Path, tmp_path: Path) -> None:
    land = js.score(run, "xstest", progress=False)
    assert land.measures["xstest"]["refused"].shape == (2, 3)
    lines = [json.loads(line) for line in export_run(run)[1].read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    answers = export_run(run, "csv", tmp_path)[1].read_text().splitlines()
    assert answers[0].startswith('"direction","point","coord_0","coord_1","coord_2","prompt_number"')
    assert "points.parquet" in card(load_finished(run))
    with pytest.raises(js.UserError, match="is a list of points: export it to csv"):
        export_run(run, "landscaper", tmp_path)
    with pytest.raises(js.UserError, match="no VISAGE, volume or radius to compare"):
        js.compare([run, run.parent])
    with pytest.raises(js.UserError, match="scan of listed points"):
        ScanSettings.load(run)


def test_figures_are_over_the_distance_or_the_number_of_the_points(tiny: js.Model, run: Path) -> None:
    (plot,) = js.plot_landscape(js.Landscape.load(run)).axes
    assert plot.get_xlabel().startswith("distance from the model")
    np.testing.assert_allclose(plot.lines[0].get_xdata(), np.linalg.norm(POINTS, axis=1))
    (plot,) = js.plot_landscape(js.scan(tiny, [(0, 1, 2)], points=POINTS[::-1], **OPTIONS)).axes
    assert plot.get_xlabel() == "number of the point"
    assert plot.get_title() == "3 points, 3 prompts"


def test_the_command_line_reads_points(tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    points = written(tmp_path / "points.csv", "a,b,c\n0.1,0,0.2\n0.3,-0.1,0\n")
    command = ["scan", "--model", str(tiny_dir), "--num-prompts", "2", "--max-new-tokens", "4", "--cpu"]
    command += ["--out", str(tmp_path / "run"), "--points", str(points)]
    main([*command, "--dry-run"])
    assert "directions: 1, points of each: 2" in capfd.readouterr().out
    main(command)
    out = capfd.readouterr().out
    assert "ASR over all points:" in out
    assert "VISAGE" not in out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["directions"] == [[0, 1, 2]]
    assert config["points"] == [[0.1, 0, 0.2], [0.3, -0.1, 0]]
    land = js.Landscape.load(tmp_path / "run")
    assert set(land.shares) >= {"refused", "complied", "incoherent"}
    assert (tmp_path / "run" / "landscape.png").exists()
    wrong = {
        "--direction random:0 random:1": "In 3 dimensions, directions come in sets of 3",
        "--steps 10": "leave out --steps",
        "--extra-steps 1": "leave out --extra-steps",
        "--adaptive": "--points is no grid",
    }
    for options, message in wrong.items():
        with pytest.raises(SystemExit) as stop:
            main([*command, *options.split()])
        assert stop.value.code == 2
        assert message in capfd.readouterr().err
