"""What the report's file holds, without a browser."""

import base64
import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_scan
from hypothesis import given
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.landscapes.axes import symmetric_axes
from jaxscape.landscapes.store import GENERATIONS
from jaxscape.report.page.content import answers_content, facts, number_rows, panels, run_content
from jaxscape.report.page.document import json_text, packed, save_report
from jaxscape.report.run import load_run

PROMPTS = ["first", "second", "third"]
ANY_TEXT = st.text(st.characters(codec=None), max_size=40)  # lone surrogates too


def refuses_near(index: int, coords: tuple[float, ...], prompt: str) -> str:
    return "I cannot" if max(map(abs, coords)) < 0.3 else f"Sure, {prompt}"


def embedded(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a report holds: its content, and the answers by the id of their element."""
    text = path.read_text(encoding="utf-8")
    content = re.search(r'<script type="application/json" id="content">(.*?)</script>', text)
    answers = re.findall(r'<script type="application/gzip" id="([\w-]+)">([\w+/=]*)</script>', text)
    assert content is not None
    return json.loads(content[1]), {name: json.loads(gzip.decompress(base64.b64decode(part))) for name, part in answers}


@given(st.recursive(ANY_TEXT, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3)))
def test_json_for_html_is_ascii_without_markup_and_keeps_the_value(value: Any) -> None:
    text = json_text(value)
    assert text.isascii()
    assert not set(text) & set("<>&")
    assert json.loads(text) == value
    assert json.loads(gzip.decompress(base64.b64decode(packed(value)))) == value


def test_a_report_holds_every_answer_with_its_labels_once(tmp_path: Path) -> None:
    labels = {"coherence": lambda text: "complied", "odd": lambda text: None}
    run = write_scan(tmp_path / "run", symmetric_axes(1, 4, 0.5), refuses_near, PROMPTS, labels, num_sets=2)
    path = js.save_report(run)
    assert path == run / "report.html"
    content, answers = embedded(path)
    assert content["runs"][0]["prompts"] == PROMPTS
    assert content["runs"][0]["points"] == ["α = −0.5", "α = −0.25", "α = 0", "α = +0.25", "α = +0.5"]
    assert sorted(answers) == sorted(f"answers-0-{index}-{point}" for index in range(2) for point in range(5))
    land = js.Landscape.load(run)
    for name, point in answers.items():
        _, _, index, number = name.split("-")
        coord = land.axes[0].values[int(number)]
        assert point["texts"] == [refuses_near(int(index), (coord,), prompt) for prompt in PROMPTS]
        refused = [text == "I cannot" for text in point["texts"]]
        assert point["labels"] == {
            "keywords": ["refused" if verdict else "complied" for verdict in refused],
            "coherence": ["complied"] * 3,
            "odd": [None] * 3,
        }
        assert next(iter(point["labels"])) == "keywords", "the evaluator that decides the ASR is the first"


def test_rates_are_those_of_the_landscape(tmp_path: Path) -> None:
    labels = {
        "coherence": lambda text: "refused" if text == "I cannot" else "incoherent",
        "judge": lambda text: "complied",
    }
    write_scan(tmp_path, symmetric_axes(2, 4, 0.5), refuses_near, PROMPTS, labels)
    run = load_run(tmp_path)
    rates = {rate["key"]: rate for rate in run_content("run", run)["rates"]}
    assert set(rates) == {
        *("asr", "refused shares", "complied shares", "incoherent shares"),
        *("refused by judge", "complied by judge", "differ of keywords / judge"),
    }
    land = run.landscape
    expected = {
        "asr": land.asr,
        "refused shares": land.shares["refused"],
        "complied by judge": land.measures["judge"]["complied"],
    }
    for key, values in expected.items():
        np.testing.assert_allclose(rates[key]["value"], values.reshape(1, -1), atol=1e-3)
    np.testing.assert_allclose(rates["asr"]["high"], land.asr_high.reshape(1, -1), atol=1e-3)
    assert run_content("run", run)["origin"] == 12, "the middle of 25 points"


def test_the_same_runs_give_the_same_bytes_and_are_only_read(tmp_path: Path) -> None:
    labels = {"coherence": lambda text: "complied"}
    run = write_scan(tmp_path / "run", symmetric_axes(1, 4, 0.5), refuses_near, PROMPTS, labels)
    with (run / GENERATIONS).open("a") as file:  # a process is writing the next point
        file.write('{"direction": 0, "co')
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    paths = [save_report(run, tmp_path / name) for name in ("a.html", "b.html")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}


def test_an_unfinished_run_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    write_scan(tmp_path, symmetric_axes(1, 4, 0.5), refuses_near, PROMPTS, done=2)
    content, answers = embedded(save_report(tmp_path))
    (run,) = content["runs"]
    assert run["summary"][-1] == "unfinished: 2 of 5 points"
    assert run["evaluated"] == [[True, True, False, False, False]]
    assert run["rates"][0]["value"] == [[100.0, 0.0, None, None, None]]
    assert sorted(answers) == ["answers-0-0-0", "answers-0-0-1"]


def test_listed_points_of_any_number_of_directions_have_a_page(tmp_path: Path) -> None:
    points = [(0.0, 0.0, 0.0), (0.1, 0.0, -0.2), (0.4, 0.4, 0.4)]
    write_scan(tmp_path, [], refuses_near, PROMPTS, points=points)
    content, answers = embedded(save_report(tmp_path))
    (run,) = content["runs"]
    assert run["points"] == ["(0, 0, 0)", "(+0.1, 0, −0.2)", "(+0.4, +0.4, +0.4)"]
    np.testing.assert_allclose(run["x"], np.linalg.norm(points, axis=1))
    assert run["models"] == [{"x": 0.0, "name": "the model"}]
    assert content["numbers"][0]["cells"] == {"prompts": "3", "ASR of the model (%)": "0.0 (0.0 to 56.1)"}
    assert len(answers) == 3


def test_special_directions_stand_beside_their_controls(tmp_path: Path) -> None:
    names = [["refusal"], ["control:[refusal]"]]
    labels = {"coherence": lambda text: "refused" if text == "I cannot" else "complied"}
    axes = symmetric_axes(1, 4, 0.5)
    write_scan(tmp_path, axes, refuses_near, PROMPTS, labels, num_sets=2, direction_names=names)
    run = load_run(tmp_path)
    content = run_content("run", run)
    assert content["panels"] == [[0], [1]]
    assert [(item["name"], item["control"]) for item in content["sets"]] == [
        ("refusal", False),
        ("control:[refusal]", True),
    ]
    numbers = run.landscape.numbers
    assert numbers is not None
    sides = numbers["asr"]["radius"]["directions"][0]
    assert content["sets"][0]["radii"] == [-sides["negative"]["value"], sides["positive"]["value"]]
    rows = number_rows(run)
    assert [row["of"] for row in rows] == [
        *("all directions but controls", "all controls", "refusal", "control:[refusal]"),
    ]
    assert rows[2]["cells"]["radius"] == rows[0]["cells"]["radius"]
    assert rows[3]["cells"]["safety volume (%)"] == rows[1]["cells"]["safety volume (%)"]


def test_random_directions_of_a_line_share_a_figure_and_planes_do_not(tmp_path: Path) -> None:
    for ndim, expected in ((1, [[0, 1]]), (2, [[0], [1]])):
        directory = write_scan(tmp_path / f"{ndim}", symmetric_axes(ndim, 2, 0.5), refuses_near, PROMPTS, num_sets=2)
        assert panels(load_run(directory).landscape) == expected


def test_remarks_say_how_a_text_ended(tmp_path: Path) -> None:
    write_scan(tmp_path, symmetric_axes(1, 2, 0.5), refuses_near, PROMPTS)
    lines = (tmp_path / GENERATIONS).read_text().splitlines()
    lines[0] = lines[0][:-1] + ', "cut": true, "finite": false}'
    (tmp_path / GENERATIONS).write_text("\n".join(lines) + "\n")
    assert answers_content(load_run(tmp_path), 0)["remarks"] == [["cut", "not finite"], [], []]


def test_facts_are_what_the_configuration_says() -> None:
    config = {"model": "m", "weights": "ab" * 32, "axes": [], "full_text": False, "base": None, "direction_files": []}
    assert facts(config) == [("model", "m"), ("weights", "abababababab…"), ("full text", "no"), ("base", "none")]


def test_the_policy_names_the_scripts_of_the_file_and_nothing_else(tmp_path: Path) -> None:
    write_scan(tmp_path, symmetric_axes(1, 2, 0.5), lambda *_: "{{script}} </script><script>alert(1)</script>", PROMPTS)
    text = save_report(tmp_path).read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    scripts = re.findall(r'<script(?: type="module")?>(.*?)</script>', text, re.DOTALL)
    assert policy is not None
    allowed = re.findall(r"'sha256-([^']+)'", policy[1])
    assert allowed == [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert "default-src 'none'" in policy[1]
    assert not re.search(r"script-src[^;]*unsafe", policy[1])
    assert "alert(1)" not in text
    assert text.count(scripts[1]) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[1:], lines[0]], "lines that should be for one point"),
        (lambda lines: [line.replace('"Sure, first"', "[1]") for line in lines], "is no text"),
        (lambda lines: ["nothing", *lines[1:]], "JSONDecodeError"),
    ],
)
def test_damaged_answers_are_a_user_error(damage: Any, message: str, tmp_path: Path) -> None:
    write_scan(tmp_path, symmetric_axes(1, 2, 0.5), refuses_near, PROMPTS)
    lines = (tmp_path / GENERATIONS).read_text().splitlines()
    (tmp_path / GENERATIONS).write_text("\n".join(damage(lines)) + "\n")
    with pytest.raises(js.UserError, match=message):
        save_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_verb_names_the_file_that_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = [write_scan(tmp_path / name, symmetric_axes(1, 2, 0.5), refuses_near, PROMPTS) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    for given_runs, options, path in (
        (runs[:1], [], runs[0] / "report.html"),
        (runs, [], Path("report.html")),
        (runs, ["--out", "x.html"], Path("x.html")),
    ):
        main(["report", *map(str, given_runs), *options])
        assert capfd.readouterr().out == f"{path}\n"
        assert [run["name"] for run in embedded(path)[0]["runs"]] == [run.name for run in given_runs]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs at least one run"),
        (["radius"], "something other than a scan"),
        (["missing"], "has no config.json"),
        (["run", "run"], "given twice"),
        (["run", "--out", "no/such.html"], "cannot be written"),
    ],
)
def test_a_run_that_cannot_be_shown_is_a_user_error(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_scan(tmp_path / "run", symmetric_axes(1, 2, 0.5), refuses_near, PROMPTS)
    (tmp_path / "radius").mkdir()
    (tmp_path / "radius/config.json").write_text(json.dumps({"weights": "w", "directions": [0], "threshold": 50.0}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["report", *arguments])
    assert end.value.code == 2
    assert message in capfd.readouterr().err
