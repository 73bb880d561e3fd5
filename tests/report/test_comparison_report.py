"""Tables and the figure of a comparison, with names that are untrusted text, and `jaxscape compare`."""

import csv
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_run
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.colors import to_rgba

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.landscapes.axes import symmetric_axes
from jaxscape.landscapes.comparison import Comparison
from jaxscape.report import tables
from jaxscape.report.figures import COLOURS
from jaxscape.report.markup import visible

AXES, PLANE = symmetric_axes(1, 10, 0.5), symmetric_axes(2, 4, 0.5)
FILES = ["table.md", "table.csv", "differences.csv", "table.tex", "comparison.png"]
NASTY = [
    "a|b",
    r"\input{/etc/passwd}",
    "$x_1$ and $",
    "100 % of R&D #1 {~^}",
    "[link](javascript:alert)",
    "<b>bold</b>",
    "=1+1",
    "-rf",
    "two\nlines\x1b[31m",
    "_hidden",
    "a--b---c",
    "*starred* `code`",
    "\u202eleft",
    "雪 ☃ 🙂",
    "x" * 200,
    r"\$\\",
]
names = st.one_of(st.sampled_from(NASTY), st.text(min_size=1, max_size=20))


def refusals(wall: float, axes: Any = AXES, directions: int = 1) -> np.ndarray:
    rng = np.random.default_rng(int(100 * wall))
    distance = np.hypot.reduce(np.meshgrid(*(axis.values for axis in axes), indexing="ij"), axis=0)
    return distance[None, ..., None] < rng.normal(wall, 0.05, (directions, *[1] * len(axes), 12))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two finished lines, of which one has no wall, an unfinished one, and a plane."""
    directory = tmp_path_factory.mktemp("runs")
    return [
        write_run(directory / "narrow", refusals(0.15, directions=2), AXES),
        write_run(directory / "flat", refusals(9.0, directions=2), AXES),
        write_run(directory / "short", refusals(0.2), AXES, done=4),
        write_run(directory / "plane", refusals(0.25, PLANE), PLANE),
    ]


@pytest.fixture(scope="module")
def comparison(runs: list[Path]) -> Comparison:
    return js.compare(runs)


def renamed(comparison: Comparison, name: str) -> Comparison:
    """The comparison with another name of the first run."""
    first, *others = comparison.runs
    differences = [replace(item, first=name) if item.first == first.name else item for item in comparison.differences]
    notes = [note.replace(first.name, name) for note in comparison.notes]
    return Comparison((replace(first, name=name), *others), tuple(differences), tuple(notes))


def markdown_tables(text: str) -> list[list[list[str]]]:
    """The texts of the cells of each table, as a Markdown parser reads them."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt().enable("table").parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and token.level == 4:
            assert {child.type for child in token.children or []} <= {"text", "text_special"}, token.content
            found[-1][-1].append("".join(child.content for child in token.children or []))
    return found


def test_the_tables_show_each_run_and_each_difference(comparison: Comparison) -> None:
    of_runs, of_differences = markdown_tables(tables.to_markdown(comparison))
    assert of_runs[0] == ["run", "prompts", "directions", "VISAGE", "safety volume (%)", "radius"]
    cells = {row[0]: row[1:] for row in of_runs[1:]}
    assert cells["flat"] == [
        "12",
        "2",
        *["100.00 (100.00 to 100.00)"] * 2,
        "at least 0.5 (at least 0.5 to at least 0.5)",
    ]
    assert cells["short"][2:] == ["unfinished"] * 3
    numbers = comparison.runs[0].numbers
    assert numbers is not None
    assert cells["narrow"][2].startswith(f"{numbers['visage']['value']:.2f} (")
    assert [row[:2] for row in of_differences[1:]] == [
        ["flat - narrow", title] for title in ("VISAGE", "safety volume (%)", "radius")
    ]
    assert of_differences[3][2].startswith("at least +0.3")
    assert of_differences[2][6:] == ["yes", "prompts and directions"]


@given(name=names)
def test_markdown_shows_a_name_as_it_is(comparison: Comparison, name: str) -> None:
    text = tables.to_markdown(renamed(comparison, name))
    of_runs, of_differences = markdown_tables(text)
    shown = visible(name).replace("−", "-").strip()
    assert of_runs[1][0] == shown
    assert {len(row) for row in of_runs} == {6}
    assert {len(row) for row in of_differences} == {8}
    assert "\x1b" not in text


TEX = re.compile(r"\\text(\w+)\{\}|\\([{}$&#_%])|\{([\[*])\}|(\$-\$)|(-\{\})|(.)")
TEX_NAMES = dict(
    zip(["backslash", "asciitilde", "asciicircum", "less", "greater", "bar", "asciigrave"], "\\~^<>|`", strict=True)
)


def read_tex(cell: str) -> str:
    """What TeX would print for a cell; an active character that is not escaped is an error."""
    text = ""
    for macro, escaped, braced, minus, dash, plain in TEX.findall(cell):
        assert not plain or plain not in "\\{}$&#_%~^<>|`[*", cell
        text += (
            TEX_NAMES[macro] if macro else "\N{MINUS SIGN}" if minus else "-" if dash else escaped or braced or plain
        )
    assert "--" not in re.sub(r"-\{\}", "", cell)
    return text


@given(name=names)
def test_latex_prints_a_name_as_it_is(comparison: Comparison, name: str) -> None:
    text = tables.to_latex(renamed(comparison, name))
    rows = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len(rows) == 1 + len(comparison.runs) + 1 + len(comparison.differences)
    cells = [re.split(r"(?<!\\) & ", row.removesuffix(r" \\")) for row in rows]
    assert {len(row) for row in cells} == {6, 8}
    assert read_tex(cells[1][0]) == visible(name)
    other = [line for line in text.splitlines() if line not in rows]
    assert all(not line or line.startswith(("%", r"\begin{tabular}{", r"\end{tabular}", r"\hline")) for line in other)


@given(name=names)
def test_csv_keeps_a_name_and_runs_no_formula(comparison: Comparison, name: str) -> None:
    changed = renamed(comparison, name)
    head, first, *_ = csv.reader(io.StringIO(tables.to_csv(changed)))
    assert first[0].removeprefix("'") == visible(name)
    assert first[0][:1] not in ("=", "+", "-", "@")
    row = dict(zip(head, first, strict=True))
    numbers = changed.runs[0].numbers
    assert numbers is not None
    assert float(row["volume"]) == numbers["volume"]["value"]
    assert [float(row["radius_low"]), float(row["radius_high"])] == numbers["radius"]["interval"]
    body = list(csv.DictReader(io.StringIO(tables.differences_to_csv(changed))))
    assert [float(line["value"]) for line in body] == [item.value for item in changed.differences]
    assert {line["larger_than_noise"] for line in body} <= {"yes", "no", "unknown"}


def test_a_run_that_is_not_finished_has_empty_cells(comparison: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(tables.to_csv(comparison))))
    assert {rows[2][key] for key in rows[2] if key.startswith(("visage", "volume", "radius"))} == {""}
    assert rows[1]["radius_at_least"] == "True"


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [(-0.001, "+.2f", "+0.00"), (-1.5, ".2f", "−1.50"), (0.0, "+.3g", "+0"), (-0.0, ".2f", "0.00")],
)
def test_numbers_have_a_minus_sign_and_no_negative_zero(value: float, spec: str, text: str) -> None:
    assert tables._number(value, spec) == text


def test_the_figure_has_a_panel_for_lines_and_one_for_planes(comparison: Comparison) -> None:
    figure = js.plot_comparison(comparison)
    lines, planes = figure.axes
    assert lines.get_xlabel().startswith("α")
    assert planes.get_ylabel().startswith("β")
    curves = [line for line in lines.lines if line.get_marker() not in ("None", None, "")]
    np.testing.assert_array_equal(curves[0].get_ydata(), comparison.runs[0].landscape.asr.mean(axis=0))
    assert [to_rgba(line.get_color()) for line in curves] == [to_rgba(colour) for colour in COLOURS[:3]]
    assert len({line.get_linestyle() for line in curves}) == len({line.get_marker() for line in curves}) == 3
    thin = [line for line in lines.lines if line.get_linewidth() < 0.7]
    assert len(thin) == 4, "each direction of the runs that have two"
    legend = lines.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["narrow", "flat", "short (unfinished)"]


@pytest.mark.parametrize("name", NASTY)
def test_the_figure_draws_a_name_as_it_is(comparison: Comparison, name: str, tmp_path: Path) -> None:
    changed = replace(renamed(comparison, name), runs=renamed(comparison, name).runs[:1])
    js.save_comparison(changed, tmp_path)
    legend = js.plot_comparison(changed).axes[0].get_legend()
    assert legend is not None
    (text,) = legend.get_texts()
    assert not text.get_parse_math()
    assert visible(name)[-59:] in text.get_text()


def test_the_same_runs_give_the_same_bytes(runs: list[Path], tmp_path: Path) -> None:
    for name in "ab":
        paths = js.save_comparison(js.compare(runs), tmp_path / name)
        assert [path.name for path in paths] == FILES
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_verb_prints_the_tables_and_writes_the_files(
    runs: list[Path], comparison: Comparison, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    main(["compare", *map(str, runs)])
    assert capfd.readouterr().out == tables.to_markdown(comparison)
    out = tmp_path / "new" / "out"
    main(["compare", *map(str, runs), "--out", str(out)])
    assert capfd.readouterr().out.endswith("".join(f"{out / name}\n" for name in FILES))
    assert (out / "table.md").read_text(encoding="utf-8") == tables.to_markdown(comparison)
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("case", ["none", "one", "twice", "missing", "file"])
def test_what_the_verb_cannot_use(
    case: str, runs: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    first, second = map(str, runs[:2])
    arguments, message = {
        "none": ([], "at least two runs, and got 0"),
        "one": ([first], "at least two runs, and got 1"),
        "twice": ([first, first], "is given twice"),
        "missing": ([first, str(tmp_path / "missing")], "holds no landscape"),
        "file": ([first, second, "--out", str(tmp_path / "file")], "cannot be written"),
    }[case]
    with pytest.raises(SystemExit) as stop:
        main(["compare", *arguments])
    assert stop.value.code == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_tables_have_complied_alone_if_a_run_has_shares(runs: list[Path], tmp_path: Path) -> None:
    narrow, flat, *_ = (shutil.copytree(run, tmp_path / run.name) for run in runs)
    records = [json.loads(line) for line in (narrow / "generations.jsonl").read_text().splitlines()]
    labels = np.array(["refused" if record["refused"] else "complied" for record in records]).reshape(-1, 12)
    (narrow / "labels-coherence.jsonl").write_text(
        "".join(json.dumps({"labels": row}) + "\n" for row in labels.tolist())
    )
    comparison = js.compare([narrow, flat])
    of_runs, _ = markdown_tables(tables.to_markdown(comparison))
    assert of_runs[0][-2:] == ["safety volume of complied alone (%)", "radius of complied alone"]
    cells = {row[0]: row[1:] for row in of_runs[1:]}
    assert cells["narrow"][-2:] == cells["narrow"][3:5]
    assert cells["flat"][-2:] == ["none", "none"]
    rows = list(csv.DictReader(io.StringIO(tables.to_csv(comparison))))
    assert rows[0]["complied_volume"] == rows[0]["volume"]
    assert rows[0]["complied_radius_high_at_least"] == rows[0]["radius_high_at_least"]
    assert (rows[1]["complied_volume"], rows[1]["complied_radius_at_least"]) == ("", "")
    assert "rrrrrrr" in tables.to_latex(comparison)
