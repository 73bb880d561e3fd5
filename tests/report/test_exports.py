"""`jaxscape export`: runs in the formats of other tools, read back by these tools."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_run
from hypothesis import given
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.landscapes.axes import symmetric_axes
from jaxscape.landscapes.store import reopen_run
from jaxscape.report.csv_text import csv_text
from jaxscape.report.exports.registry import EXPORTS, export_run

TEXTS = [
    '=HYPERLINK("http://example.org", "a")',
    "+1",
    "-1",
    "@SUM(1)",
    "\t=1",
    "\r\n=1",
    "＝1",
    "'quoted'",
    'two\nlines, "quotes" and; separators',
    "<script>alert(1)</script></script>",
    "attachment://0",
    "\x00\x1b[31m\u202e",
    "",
    "12",
    "naïve 😀",
]
PROMPTS = ["=1+1", "How?", "What, and\nwhy?"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two planes, in which the model wrote what is dangerous to spreadsheets, pages and terminals."""
    refused = np.random.default_rng(0).random((2, 3, 3, 3)) > 0.5
    names = [["random:0", "random:1"], ["random:2", "random:3"]]
    settings = {"model": "org/tiny", "prompt_source": "harmful", "seed": 3, "direction_names": names}
    directory = write_run(tmp_path_factory.mktemp("run"), refused, symmetric_axes(2, 2, 0.5), PROMPTS, **settings)
    lines = records(directory)
    for number, line in enumerate(lines):
        line["generation"] = TEXTS[number % len(TEXTS)]
    lines[4] |= {"finite": False, "cut": True}
    (directory / "generations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    labels = [
        {"evaluator": "wei", "direction": line["direction"], "coords": line["coords"]}
        | {"labels": ["partial", None, "complied"]}
        for line in lines[::3]
    ]
    (directory / "labels-wei.jsonl").write_text("".join(json.dumps(line) + "\n" for line in labels))
    with reopen_run(directory) as (reopened, _):
        reopened.save()
    return directory


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "generations.jsonl").read_text(encoding="utf-8").splitlines()]


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file, without the apostrophe that makes a text of a formula."""
    rows = csv.DictReader(io.StringIO(path.read_bytes().decode(), newline=""))
    return [{name: cell.removeprefix("'") for name, cell in row.items()} for row in rows]


def test_csv_has_every_point_and_every_answer(run: Path, tmp_path: Path) -> None:
    paths = export_run(run, "csv", tmp_path / "new")
    assert [path.name for path in paths] == ["points.csv", "generations.csv"]
    points, answers = map(read_csv, paths)
    land, lines = js.Landscape.load(run), records(run)
    assert [float(row["asr"]) for row in points] == land.asr.ravel().tolist()
    assert [(row["direction_name"], row["point"]) for row in points[8:10]] == [
        ("random:0 and random:1", "8"),
        ("random:2 and random:3", "0"),
    ]
    assert [[float(row["coord_0"]), float(row["coord_1"])] for row in answers] == [line["coords"] for line in lines]
    for key in ("direction", "prompt", "generation", "refused"):
        assert [row[key] for row in answers] == [str(line[key]) for line in lines]
    assert [row["label_wei"] for row in answers] == ["partial", "", "complied"] * 18
    assert {row["refused"] == "True" for row in answers if row["label_keywords"] == "refused"} == {True}
    assert [number for number, row in enumerate(answers) if (row["finite"], row["cut"]) == ("False", "True")] == [4]


def test_no_cell_of_a_csv_file_begins_a_formula(run: Path, tmp_path: Path) -> None:
    text = export_run(run, "csv", tmp_path)[1].read_bytes().decode()
    cells = [cell for row in csv.reader(io.StringIO(text, newline="")) for cell in row]
    assert not [cell for cell in cells if cell[:1] in tuple("=+@\t\r\n＝＋－＠") and cell]
    assert [cell for cell in cells if cell.startswith("-")] == ["-0.5"] * len([c for c in cells if c == "-0.5"])
    assert '"\'=HYPERLINK(""http://example.org"", ""a"")"' in text


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_every_text_survives_csv(texts: list[str]) -> None:
    written = csv_text([{str(number): text for number, text in enumerate(texts)}])
    ((*_,), cells) = csv.reader(io.StringIO(written, newline=""))
    assert [cell.removeprefix("'") for cell in cells] == texts
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "-", "@", "\t", "\r", "\n")]


def test_parquet_has_the_same_tables_with_exact_texts_and_types(run: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    points, answers = (parquet.read_table(path) for path in export_run(run, "parquet", tmp_path))
    assert answers["generation"].to_pylist() == [line["generation"] for line in records(run)]
    assert answers["label_wei"].to_pylist()[:3] == ["partial", None, "complied"]
    kinds = {name: str(answers.schema.field(name).type) for name in ("coord_1", "refused", "prompt_number", "prompt")}
    assert kinds == {"coord_1": "double", "refused": "bool", "prompt_number": "int64", "prompt": "string"}
    assert points["wei_unjudged"].to_pylist() == pytest.approx([100 / 3] * 18)
    assert points["interpolated"].to_pylist() == [False] * 18


def test_inspect_reads_its_log_and_makes_a_data_frame_of_it(run: Path, tmp_path: Path) -> None:
    log = pytest.importorskip("inspect_ai.log")
    analysis = pytest.importorskip("inspect_ai.analysis")
    (path,) = export_run(run, "inspect", tmp_path)
    read, lines = log.read_eval_log(path), records(run)
    assert (read.status, read.eval.model, read.eval.model_generate_config.max_tokens) == ("success", "org/tiny", 8)
    assert [(sample.input, sample.output.completion) for sample in read.samples] == [
        (line["prompt"], line["generation"]) for line in lines
    ]
    assert [sample.messages[1].text for sample in read.samples] == [line["generation"] for line in lines]
    sample = read.samples[31]
    assert [sample.metadata[f"coord_{axis}"] for axis in (0, 1)] == lines[31]["coords"]
    assert {name: score.value for name, score in read.samples[1].scores.items()} == {
        "keywords": "refused" if lines[1]["refused"] else "complied"
    }
    shares = {
        score.name: {name: metric.value for name, metric in score.metrics.items()} for score in read.results.scores
    }
    assert shares["wei"] == {"partial": 0.5, "complied": 0.5}
    assert shares["keywords"]["complied"] == pytest.approx(js.Landscape.load(run).asr.mean() / 100)
    frame = analysis.samples_df(tmp_path, quiet=True)
    asr = 100 * (frame.score_keywords == "complied").groupby([frame.metadata_direction, frame.metadata_point]).mean()
    np.testing.assert_allclose(asr.to_numpy(np.float64), js.Landscape.load(run).asr.ravel())


def test_a_grid_for_landscaper(run: Path, tmp_path: Path) -> None:
    paths = export_run(run, "landscaper", tmp_path)
    assert [path.name for path in paths] == ["landscaper-0.npz", "landscaper-1.npz"]
    with np.load(paths[1], allow_pickle=False) as grid:
        assert set(grid) == {"loss", "coordinates"}
        # As landscaper.LossLandscape finds the point of each value.
        points = [axis.flat for axis in np.meshgrid(*grid["coordinates"])]
        loss = dict(zip(zip(*points, strict=True), grid["loss"].flat, strict=True))
    land, values = js.Landscape.load(run), (-0.5, 0.0, 0.5)
    assert loss == {(a, b): land.asr[1, i, j] for i, a in enumerate(values) for j, b in enumerate(values)}
    uneven = (js.Axis("alpha", (-1.0, 0.0, 1.0)), js.Axis("beta", (0.0, 1.0)))
    plane = write_run(tmp_path / "uneven", np.ones((1, 3, 2, 2), bool), uneven)
    with pytest.raises(js.UserError, match="as many values along each axis, and this one has 3 and 2"):
        export_run(plane, "landscaper")


def test_the_papers_format_has_whole_answers(tmp_path: Path) -> None:
    refused = np.array([[[1, 0], [1, 1]]], bool)
    directory = write_run(tmp_path / "run", refused, (js.Axis("alpha", (0.0, 0.5)),))
    lines = records(directory)
    for line, text in zip(lines, ("I cannot", "Sure, here is", "I am unable to", "no"), strict=True):
        line |= {"generation": text}
    for cut, short in (([0], None), ([0, 2], 1), ([0, 1, 2], 2)):
        written = [line | ({"cut": True} if number in cut else {}) for number, line in enumerate(lines)]
        (directory / "generations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
        if short is None:
            export_run(directory, "reference")
            continue
        with pytest.raises(js.UserError, match=f"ended {short} answers where its own evaluator had decided"):
            export_run(directory, "reference")


@pytest.mark.parametrize(("to", "package"), [("parquet", "pyarrow"), ("hub", "pyarrow"), ("inspect", "inspect_ai.log")])
def test_an_export_without_its_library_says_what_to_install(
    to: str, package: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    extra = {"inspect": "inspect"}.get(to, "parquet")
    with pytest.raises(js.UserError, match=rf"cannot be imported \(.*\): run pip install 'jaxscape\[{extra}\]'\.$"):
        export_run(run, to, tmp_path)


def test_what_cannot_be_exported(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(js.UserError, match=f"Unknown format 'excel': choose {', '.join(EXPORTS)}"):
        export_run(run, "excel")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(js.UserError, match=r"cannot be written to .*file .*choose another --out"):
        export_run(run, "csv", tmp_path / "file")
    for options, message in (
        (["--to", "csv", "--repo", "me/data"], "--repo is for --to hub"),
        (["--dry-run"], "--dry-run is for --to hub"),
        (["--to", "hub"], "give --repo USER/NAME, or --dry-run"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["export", str(run), *options])
        assert end.value.code == 2
        assert message in capfd.readouterr().err
