"""Runs of measures: their points, their files, resumption at any byte, and the directions of a finished scan."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.directions.kinds import model_at
from jaxscape.evaluate.measure import Subject
from jaxscape.evaluate.measures import make_measures
from jaxscape.landscapes import measure as measure_module
from jaxscape.report.measures import plot_measures

PROMPTS = ["Write a poem about geese", "Hi", "Why?"]
OPTIONS: dict[str, Any] = {
    "measures": ["first-token", "damage", "likelihood"],
    "prompts": PROMPTS,
    "targets": ["Sure", "Hello", "Because"],
    "refusal": "I cannot",
    "harmless": ["Hi", "How are you?"],
    "steps": 2,
    "progress": False,
}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def finished(tiny: js.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("measures")
    js.measure(tiny, [0, 1], out=directory, **OPTIONS)
    return directory


@pytest.fixture(scope="module")
def scanned(tiny: js.Model, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished scan by the command line."""
    directory = tmp_path_factory.mktemp("scans")
    (directory / "prompts.csv").write_text(
        "goal,target\n" + "".join(f"{prompt},Sure\n" for prompt in PROMPTS), encoding="utf-8"
    )
    options = ["--model", str(tiny_dir), "--prompts", str(directory / "prompts.csv"), "--steps", "2"]
    options += ["--num-directions", "2", "--max-new-tokens", "4", "--no-shares"]
    main(["scan", *options, "--out", str(directory / "scan")])
    return directory / "scan"


def test_values_at_each_point_are_those_of_the_model_there(tiny: js.Model, finished: Path) -> None:
    measurement = js.Measurement.load(finished)
    assert measurement.complete
    assert measurement.axes[0].values == (-0.5, 0.0, 0.5)
    subject = Subject(tiny, PROMPTS, OPTIONS["targets"], OPTIONS["refusal"], OPTIONS["harmless"])
    made = make_measures(OPTIONS["measures"], subject)
    for direction in (0, 1):
        for point, alpha in enumerate((-0.5, 0.0, 0.5)):
            moved = model_at(tiny, [direction], [alpha])
            for measure in made:
                expected = measure.summary(measure.samples(moved.params))["value"]
                values = measurement.measures[measure.name]
                found = [values[key][direction, point] for key in ("value", "low", "high")]
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert (measurement.measures["damage"]["value"][:, 1] == 0).all()
    assert (measurement.measures["damage"]["value"][:, ::2] > 0).all()


def test_the_file_has_what_the_result_has(tiny: js.Model, finished: Path) -> None:
    content = json.loads((finished / "measures.json").read_text())
    assert set(content) == {"axes", "measures", "labels", "settings", "complete"}
    assert set(content["measures"]["likelihood"]) == {
        *("value", "low", "high", "nonfinite"),
        *(f"{key}{end}" for key in ("target", "refusal") for end in ("", "_low", "_high")),
    }
    assert content["settings"]["first-token"]["tokens"] == ["I"]
    assert content["settings"]["damage"] == {"num_prompts": 2}
    again = js.measure(tiny, [0, 1], out=finished, **OPTIONS)
    assert again.to_json() == js.Measurement.load(finished).to_json() == (finished / "measures.json").read_text()


@pytest.mark.parametrize("cut", [0, 5, 30, -1, -40, "middle"])
def test_a_killed_run_ends_with_the_bytes_of_an_unbroken_one(
    tiny: js.Model, finished: Path, tmp_path: Path, cut: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    state = (run / "measures.jsonl").read_bytes()
    (run / "measures.jsonl").write_bytes(state[: len(state) // 2 if cut == "middle" else int(cut)])
    (run / "measures.json").unlink()
    computed: list[Any] = []
    params_at = measure_module._params_at
    monkeypatch.setattr(measure_module, "_params_at", lambda *a: computed.append(a[2]) or params_at(*a))
    js.measure(tiny, [0, 1], out=run, **OPTIONS)
    assert contents(run) == contents(finished)
    assert len(computed) == {0: 6, 5: 6, 30: 6, -1: 1, -40: 1, "middle": 4}[cut]


def test_own_answers_are_generated_once(tiny: js.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own answers are in the state; a resumed run takes them from there."""
    answers = ["I cannot do that", "Sure", "I cannot"]
    asked: list[int] = []
    generate = lambda *_, **__: asked.append(1) or answers  # noqa: E731 (a tiny random model never refuses)
    monkeypatch.setattr("jaxscape.evaluate.measure.generate", generate)
    options = {**OPTIONS, "refusal": None, "measures": ["first-token", "likelihood"]}
    js.measure(tiny, [0], out=tmp_path, **options)
    assert asked == [1], "two measures share them"
    state = (tmp_path / "measures.jsonl").read_bytes()
    assert json.loads(state.split(b"\n")[0]) == {"answers": answers}
    (tmp_path / "measures.jsonl").write_bytes(state[:-10])
    js.measure(tiny, [0], out=tmp_path, **options)
    assert asked == [1]
    assert (tmp_path / "measures.jsonl").read_bytes() == state


def test_another_configuration_is_refused(tiny: js.Model, finished: Path, scanned: Path) -> None:
    for change, key in (
        ({"measures": ["damage"]}, "measures, prompts, refusal, targets|measures"),
        ({"harmless": ["Hi"]}, "harmless"),
        ({"steps": 4}, "grid"),
        ({"targets": ["a", "b", "c"]}, "targets"),
    ):
        with pytest.raises(js.UserError, match=f"another configuration .different: .*({key})"):
            js.measure(tiny, [0, 1], out=finished, **{**OPTIONS, **change})
    with pytest.raises(js.UserError, match="holds something other than a run of measures"):
        js.measure(tiny, [0, 1], out=scanned, **OPTIONS)
    with pytest.raises(js.UserError, match="holds something other than a scan"):
        js.scan(tiny, [0], prompts=PROMPTS, out=finished, progress=False)


def test_a_damaged_state_is_a_user_error_and_can_be_started_over(
    tiny: js.Model, finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    lines = (run / "measures.jsonl").read_text().splitlines(keepends=True)
    (run / "measures.jsonl").write_text("".join([lines[0], lines[2], *lines[2:]]))
    with pytest.raises(js.UserError, match=r"is damaged .*start over with --overwrite"):
        js.measure(tiny, [0, 1], out=run, **OPTIONS)
    js.measure(tiny, [0, 1], out=run, overwrite=True, **OPTIONS)
    assert contents(run) == contents(finished)


def test_points_that_are_nan_are_null_and_counted(tiny: js.Model, tmp_path: Path) -> None:
    """Where one prompt meets NaN, the others are averaged; where all do, there is no value."""
    rows = [set(tiny.tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in PROMPTS]
    token = min(rows[0] - rows[1] - rows[2])
    flat = jax.tree.map(jnp.zeros_like, tiny.params)
    table = tiny.params["model"]["embed_tokens"]["weight"]

    def towards(change: Any) -> Any:
        return {**flat, "model": {**flat["model"], "embed_tokens": {"weight": change}}}

    one, all_of_them = (towards(jnp.zeros_like(table).at[place].set(3e38)) for place in (token, slice(None)))
    options = {**OPTIONS, "measures": ["first-token"], "radius": 2.0}  # 2 x 3e38 is infinite in float32
    js.measure(tiny, [one, all_of_them], out=tmp_path, **options)
    content = json.loads((tmp_path / "measures.json").read_text())["measures"]["first-token"]
    assert content["nonfinite"] == [[1.0, 0.0, 1.0], [3.0, 0.0, 3.0]]
    assert [[value is None for value in row] for row in content["value"]] == [[False] * 3, [True, False, True]]
    assert js.Measurement.load(tmp_path).complete


def test_two_dimensions(tiny: js.Model, tmp_path: Path) -> None:
    options = {**OPTIONS, "measures": ["damage"]}
    measurement = js.measure(tiny, [(0, 1)], **options)
    assert measurement.measures["damage"]["value"].shape == (1, 3, 3)
    assert measurement.measures["damage"]["value"][0, 1, 1] == 0
    assert len(plot_measures(measurement).axes) == 2, "a contour plot and its colour bar"


def test_figures_have_a_panel_for_each_measure(finished: Path, scanned: Path) -> None:
    measurement = js.Measurement.load(finished)
    assert [axes.get_title() for axes in plot_measures(measurement).axes] == list(OPTIONS["measures"])
    figure = plot_measures(measurement, js.Landscape.load(scanned))
    assert [axes.get_title() for axes in figure.axes] == ["ASR", *OPTIONS["measures"]]
    line = figure.axes[2].lines[0]
    np.testing.assert_array_equal(line.get_ydata(), measurement.measures["damage"]["value"][0])


def test_measures_along_the_directions_of_a_scan(tiny: js.Model, scanned: Path, capsys: Any) -> None:
    names = ["damage", "likelihood"]
    main(["measure", "--like", str(scanned), "--measures", *names, "--refusal", "I cannot"])
    out = scanned.with_name("scan-measures")
    assert capsys.readouterr().out.strip() == str(out / "measures.png")
    measurement = js.Measurement.load(out)
    land = js.Landscape.load(scanned)
    assert measurement.axes == land.axes
    assert measurement.measures["damage"]["value"].shape == land.asr.shape
    options = {"targets": ["Sure"] * 3, "refusal": "I cannot", "progress": False}
    same = js.measure(tiny, measures=names, like=scanned, **options)
    np.testing.assert_array_equal(same.measures["likelihood"]["value"], measurement.measures["likelihood"]["value"])
    config = json.loads((out / "config.json").read_text())
    scan_config = json.loads((scanned / "config.json").read_text())
    for key in ("weights", "directions", "direction_names", "prompts", "system_prompt", "dtype", "model"):
        assert config[key] == scan_config[key]


def test_prompts_that_are_sent_in_another_way_are_refused(tiny: js.Model, tmp_path: Path) -> None:
    """The file of a system prompt may change between the beginning of a run and its end."""
    system, options = tmp_path / "system.txt", {**OPTIONS, "system_prompt": f"@{tmp_path / 'system.txt'}"}
    system.write_text("Be kind.")
    js.measure(tiny, [0], out=tmp_path / "run", **options)
    of_scan: dict[str, Any] = {"prompts": PROMPTS, "system_prompt": options["system_prompt"], "steps": 2}
    js.scan(tiny, [0], out=tmp_path / "scan", max_new_tokens=2, shares=False, progress=False, **of_scan)
    system.write_text("Be curt.")
    with pytest.raises(js.UserError, match=r"another configuration .different: tokens\)"):
        js.measure(tiny, [0], out=tmp_path / "run", **options)
    with pytest.raises(js.UserError, match="are sent in another way now: the chat template, the tokenizer or the file"):
        js.measure(tiny, measures=["damage"], like=tmp_path / "scan")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    older = {key: value for key, value in config.items() if key not in ("tokens", "architecture")}
    (tmp_path / "run" / "config.json").write_text(json.dumps(older))
    js.measure(tiny, [0], out=tmp_path / "run", **options)  # from before these were recorded


def test_the_run_beside_a_scan_has_its_name(scanned: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(scanned)
    main(["measure", "--like", ".", "--measures", "damage", "--overwrite"])
    assert capsys.readouterr().out.strip() == str(scanned.with_name("scan-measures") / "measures.png")


def test_another_model_than_the_scans_is_a_user_error(make_model: Any, tiny: js.Model, scanned: Path) -> None:
    other = js.load_model(make_model(seed=99)[0], "float32")
    with pytest.raises(js.UserError, match="are not those of the scan in"):
        js.measure(other, measures=["damage"], like=scanned)
    with pytest.raises(js.UserError, match="leave out your own"):
        js.measure(tiny, [0], ["damage"], like=scanned)


def test_directions_that_a_program_gave_cannot_be_made_again(tiny: js.Model, tmp_path: Path) -> None:
    js.scan(tiny, [js.random_direction(tiny, 3)], prompts=["Hi"], steps=2, max_new_tokens=2, out=tmp_path)
    with pytest.raises(js.UserError, match="were given by a program, and are not kept"):
        js.measure(tiny, measures=["damage"], like=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--measures", "damagee"], "Unknown measure 'damagee' (did you mean damage?)"),
        (["--measures", "likelihood"], "needs a target for each prompt, and these prompts have none"),
        (["--like", "nowhere"], "nowhere has no config.json"),
        (["--like", "nowhere", "--seed", "3"], "--like takes the prompts and the directions from its run"),
        (["--like", "nowhere", "--model", "m"], "--like takes the model from its run"),
        (["--trajectory", "x"], "leave out --trajectory"),
        (["--measures", "damage", "--target", "Sure"], "--target is for likelihood, which --measures does not name"),
        (["--measures", "first-token", "--harmless", "benign"], "--harmless is for damage, which --measures does not"),
        (["--shots", "0"], "--shots is for multiple-choice, which --measures does not name"),
        (["--measures", "damage"], "--refusal is for first-token and likelihood, which --measures does not name"),
    ],
)
def test_wrong_options_are_one_sentence(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = [] if "--like" in arguments else ["--model", str(tiny_dir), "--refusal", "I cannot"]
    with pytest.raises(SystemExit) as end:
        main(["measure", *model, *arguments])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_targets_are_those_of_the_prompt_file(tiny: js.Model, tiny_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("goal,target\nHi,Hello\nWhy?,Because it is\n")
    options = ["--measures", "likelihood", "--refusal", "No", "--steps", "2", "--prompts", str(path), "--seed", "4"]
    main(["measure", "--model", str(tiny_dir), *options, "--out", str(tmp_path / "run")])
    same = js.measure(
        tiny,
        [4],
        ["likelihood"],
        prompts=["Hi", "Why?"],
        targets=["Hello", "Because it is"],
        refusal="No",
        steps=2,
        progress=False,
    )
    loaded = js.Measurement.load(tmp_path / "run").measures["likelihood"]
    np.testing.assert_array_equal(loaded["target_low"], same.measures["likelihood"]["target_low"])
    path.write_text("goal,response\nHi,Hello\n")
    with pytest.raises(SystemExit):
        main(["measure", "--model", str(tiny_dir), *options, "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"axes": [], "measures": {"a": {"value": [1]}}}'])
def test_a_file_that_holds_no_measures_is_a_user_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(js.UserError, match="holds no measures"):
        js.Measurement.load(tmp_path)
    (tmp_path / "measures.json").write_text(text)
    with pytest.raises(js.UserError, match="is not a file of measures"):
        js.Measurement.load(tmp_path)
