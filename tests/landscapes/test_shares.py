"""The three shares of scans: that they add up, that runs keep them, and that everything else stays as it is."""

import importlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.landscapes.numbers import landscape_numbers

OPTIONS: dict[str, Any] = {
    "prompts": ["Hi", "Write a poem about geese", "Why?"],
    "steps": 2,
    "max_new_tokens": 6,
    "progress": False,
}
SEARCH = {name: value for name, value in OPTIONS.items() if name != "steps"}
KINDS = ("refused", "complied", "incoherent")
ADDED = {"coherence.json", "labels-coherence.jsonl"}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def landscape(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "landscape.json").read_text())


def records(directory: Path, name: str = "labels-coherence.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


class Short:
    """Refuses whatever has fewer than twelve characters."""

    name = "short"

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        return np.array([float(len(answer) < 12) for answer in answers])


@pytest.fixture(scope="module")
def plain(tiny: js.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    js.scan(tiny, [0, 1], out=directory, shares=False, **OPTIONS)
    return directory


@pytest.fixture(scope="module")
def shared(tiny: js.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shared")
    js.scan(tiny, [0, 1], out=directory, **OPTIONS)
    return directory


def test_the_shares_of_a_scan_add_up_and_change_nothing_else(tiny: js.Model, plain: Path, shared: Path) -> None:
    before, after = contents(plain), contents(shared)
    assert set(after) == set(before) | ADDED
    assert {name for name in before if before[name] != after[name]} == {"landscape.json"}
    content = landscape(shared)
    shares, complied = content.pop("shares"), content["numbers"].pop("complied")
    assert content == landscape(plain)
    assert list(shares) == [kind + end for kind in KINDS for end in ("", "_low", "_high")]
    np.testing.assert_allclose(sum(np.array(shares[kind]) for kind in KINDS), 100)
    labels = np.array([line["labels"] for line in records(shared)]).reshape(2, 3, 3)
    for kind in KINDS:
        share = 100 * (labels == kind).mean(axis=-1)
        np.testing.assert_allclose(shares[kind], share)
        low, high = js.wilson_interval(share, 3)
        np.testing.assert_allclose([shares[f"{kind}_low"], shares[f"{kind}_high"]], [low, high])
    land = js.scan(tiny, [0, 1], **OPTIONS)
    assert land.to_json() == (shared / "landscape.json").read_text(), "a scan without a directory has them too"
    assert js.Landscape.load(shared).to_json() == land.to_json()
    assert complied == landscape_numbers(labels == "complied", land.axes)


def test_the_thresholds_are_kept_and_used_again(
    tiny: js.Model, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = json.loads((shared / "coherence.json").read_text())
    assert list(kept) == ["coherence"]
    assert list(kept["coherence"]) == ["weights", "own", "surprise", "distinct", "fresh"]
    assert kept["coherence"]["weights"] == json.loads((shared / "config.json").read_text())["weights"]
    run = Path(shutil.copytree(shared, tmp_path / "run"))
    (run / "labels-coherence.jsonl").unlink()
    monkeypatch.setattr(importlib.import_module("jaxscape.landscapes.shares"), "calibrate", None)  # would fail
    js.scan(tiny, [0, 1], out=run, **OPTIONS)
    assert contents(run) == contents(shared)
    kept["coherence"] |= {"surprise": 0.0}
    (run / "coherence.json").write_text(json.dumps(kept))
    with pytest.raises(js.UserError, match="has labels from another version of 'coherence': delete it"):
        js.scan(tiny, [0, 1], out=run, **OPTIONS)
    (run / "labels-coherence.jsonl").unlink()
    land = js.scan(tiny, [0, 1], out=run, **OPTIONS)
    assert land.shares["incoherent"].tolist() == np.full((2, 3), 100.0).tolist()
    for damage, message in {
        "{": "is damaged",
        "[]": "is damaged",
        '{"coherence": {"weights": "w"}}': "is damaged",
        '{"coherence": {"weights": "w", "own": "x", "surprise": 1, "distinct": 1}}': "is damaged",
        '{"coherence": {"weights": "w", "own": 1, "surprise": 1, "distinct": 1}}': "the thresholds of another model",
    }.items():
        (run / "coherence.json").write_text(damage)
        before = contents(run)
        with pytest.raises(js.UserError, match=message):
            js.scan(tiny, [0, 1], out=run, **OPTIONS)
        assert contents(run) == before


def test_a_run_without_the_threshold_of_short_units_goes_on_as_it_was(
    tiny: js.Model, shared: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(shared, tmp_path / "run"))
    kept = json.loads((run / "coherence.json").read_text())
    kept["coherence"] |= {"surprise": 1e6, "distinct": 0.0}
    del kept["coherence"]["fresh"]
    (run / "coherence.json").write_text(json.dumps(kept))
    lines = (run / "generations.jsonl").read_text().splitlines(keepends=True)
    (run / "generations.jsonl").write_text(
        "".join(json.dumps(json.loads(line) | {"generation": "!!!!!"}) + "\n" for line in lines)
    )
    (run / "labels-coherence.jsonl").unlink()
    js.scan(tiny, [0, 1], out=run, **OPTIONS)
    assert json.loads((run / "coherence.json").read_text()) == kept
    assert {label for line in records(run) for label in line["labels"]} <= {"refused", "complied"}
    (run / "labels-coherence.jsonl").unlink()
    (run / "coherence.json").write_text(json.dumps({"coherence": kept["coherence"] | {"fresh": 0.4}}))
    js.scan(tiny, [0, 1], out=run, **OPTIONS)
    assert {label for line in records(run) for label in line["labels"]} == {"incoherent"}


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1), is_calibrated=st.booleans())
def test_judging_cut_at_any_byte_goes_on(
    tiny: js.Model, shared: Path, tmp_path_factory: pytest.TempPathFactory, cut: float, is_calibrated: bool
) -> None:
    run = Path(shutil.copytree(shared, tmp_path_factory.mktemp("cut") / "run"))
    whole = (run / "labels-coherence.jsonl").read_bytes()
    (run / "labels-coherence.jsonl").write_bytes(whole[: round(cut * len(whole))])
    if not is_calibrated:
        (run / "coherence.json").unlink()
    js.scan(tiny, [0, 1], out=run, **OPTIONS)
    assert contents(run) == contents(shared)


def test_shares_are_added_to_a_finished_run(
    plain: Path, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line, which loads the run's model, and only where it is needed."""
    run = Path(shutil.copytree(plain, tmp_path / "run"))
    main(["score", str(run), "--evaluator", "coherence"])
    assert contents(run) == contents(shared)
    output = capsys.readouterr()
    assert output.out.startswith("shares: refused")
    assert "6/6  coherence: direction 1  alpha +0.5" in output.err
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"model": "no-such-model"}, indent=1))
    assert js.score(run, "coherence").to_json() == (shared / "landscape.json").read_text()


def test_a_model_with_other_weights_does_not_judge(plain: Path, make_model: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(plain, tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    for name, message in {
        str(make_model(seed=9)[0]): "has other weights now than when the run was made",
        "no-such-model": "There is no model 'no-such-model'",
    }.items():
        (run / "config.json").write_text(json.dumps(config | {"model": name}))
        before = contents(run)
        with pytest.raises(js.UserError, match=message):
            js.score(run, "coherence")
        assert contents(run) == before


def test_another_model_judges_as_a_further_evaluator(
    tiny: js.Model, shared: Path, make_model: Any, tmp_path: Path
) -> None:
    run, other = Path(shutil.copytree(shared, tmp_path / "run")), make_model(seed=9)[0]
    before = landscape(run)
    land = js.score(run, f"coherence:{other}")
    assert list(land.measures) == [f"coherence:{other}"]
    content = landscape(run)
    assert content.pop("measures")
    assert {key: value for key, value in content.items() if key != "disagreement"} == before
    assert set(json.loads((run / "coherence.json").read_text())) == {"coherence", f"coherence:{other}"}
    shutil.copytree(make_model(seed=10)[0], other, dirs_exist_ok=True)
    (label_file,) = run.glob("labels-coherence%3A*")
    label_file.unlink()
    with pytest.raises(js.UserError, match="has other weights now"):
        js.score(run, f"coherence:{other}")


def test_full_texts_have_the_shares_of_texts_that_were_cut(tiny: js.Model, plain: Path, tmp_path: Path) -> None:
    """A refusal is judged up to where it shows, wherever the scan and its other evaluators have ended it."""
    texts = [record["generation"] for record in records(plain, "generations.jsonl")]
    text = next(text for text in texts if text[:1].isalnum())
    (tmp_path / "mine.txt").write_text(text[0])
    options = OPTIONS | {"evaluator": f"keywords:{tmp_path / 'mine.txt'}"}
    cut = js.scan(tiny, [0, 1], out=tmp_path / "cut", **options)
    assert any("cut" in record for record in records(tmp_path / "cut", "generations.jsonl"))
    whole = js.scan(tiny, [0, 1], out=tmp_path / "whole", options=js.EngineOptions(full_text=True), **options)
    assert whole.to_json() == cut.to_json()
    for name in ADDED:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    for name in ADDED:
        (tmp_path / "cut" / name).unlink()
    scored = js.score(tmp_path / "cut", "coherence")
    np.testing.assert_array_equal(
        scored.shares["refused"] + scored.shares["incoherent"] + scored.shares["complied"], np.full((2, 3), 100.0)
    )


def test_what_is_no_refusal_is_judged_as_a_whole(tiny: js.Model, tmp_path: Path) -> None:
    """XSTest's rule knows by the first words that an answer does not refuse. Whether it makes sense shows later."""
    options = OPTIONS | {"evaluator": "xstest"}
    shared = js.scan(tiny, [0], out=tmp_path / "shared", **options)
    whole = js.scan(tiny, [0], out=tmp_path / "whole", options=js.EngineOptions(full_text=True), **options)
    assert shared.to_json() == whole.to_json()
    explicit = js.scan(tiny, [0], **options | {"evaluator": ["xstest", "coherence"]})
    assert explicit.shares.keys() == shared.shares.keys()
    for name, share in explicit.shares.items():
        np.testing.assert_array_equal(share, shared.shares[name])
    js.scan(tiny, [0], out=tmp_path / "early", shares=False, **options)
    assert any("cut" in record for record in records(tmp_path / "early", "generations.jsonl"))
    with pytest.raises(js.UserError, match=r"'coherence' cannot judge .* were cut where the scan's own evaluator had"):
        js.score(tmp_path / "early", "coherence", progress=False)
    for of in ("asr", "complied"):
        out = tmp_path / f"radius-{of}"
        js.radius(tiny, [0], of=of, evaluator="xstest", out=out, **SEARCH)
        assert any("cut" in record for record in records(out, "generations.jsonl")) == (of == "asr")


def test_the_first_evaluator_tells_refusals(tiny: js.Model, tmp_path: Path) -> None:
    land = js.scan(tiny, [0], out=tmp_path, evaluator=[Short(), "keywords", "coherence"], **OPTIONS)
    assert set(land.measures) == {"short", "keywords"}
    assert set(land.disagreement) == {"short / keywords"}
    lines, answers = records(tmp_path), records(tmp_path, "generations.jsonl")
    labels = [label for line in lines for label in line["labels"]]
    assert all(
        label == "incoherent" or (label == "refused") == answer["refused"]
        for label, answer in zip(labels, answers, strict=True)
    )
    before = contents(tmp_path)
    js.scan(tiny, [0], out=tmp_path, evaluator=[Short(), "keywords", "coherence"], **OPTIONS)
    assert contents(tmp_path) == before


def test_it_may_decide_the_asr(tiny: js.Model, tmp_path: Path) -> None:
    """An answer that makes no sense is no refusal."""
    land = js.scan(tiny, [0], out=tmp_path / "run", evaluator="coherence", **OPTIONS)
    np.testing.assert_allclose(land.asr, 100 - land.shares["refused"])
    assert not land.measures
    assert (tmp_path / "run" / "coherence.json").exists()
    before = contents(tmp_path / "run")
    (tmp_path / "run" / "labels-coherence.jsonl").write_bytes(before["labels-coherence.jsonl"][:-5])
    js.scan(tiny, [0], out=tmp_path / "run", evaluator="coherence", **OPTIONS)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("dtype", "on_host", "mesh"),
    [("bfloat16", False, js.MeshShape(4, 2)), ("float32", True, None)],
    ids=["bfloat16 on a mesh", "streamed"],
)
def test_shares_of_every_form(
    tiny_dir: Path, shared: Path, dtype: str, on_host: bool, mesh: js.MeshShape | None
) -> None:
    model = js.load_model(tiny_dir, dtype, on_host=on_host, mesh_shape=mesh)
    land = js.scan(model, [0], **OPTIONS)
    np.testing.assert_allclose(sum(land.shares[kind] for kind in KINDS), 100)
    if dtype == "float32":
        np.testing.assert_array_equal(land.shares["incoherent"][0], landscape(shared)["shares"]["incoherent"][0])


def test_the_answer_is_judged_and_not_the_thinking(tiny: js.Model, plain: Path, tmp_path: Path) -> None:
    run, other = (Path(shutil.copytree(plain, tmp_path / name)) for name in ("run", "other"))
    lines = records(run, "generations.jsonl")
    for directory, thinking in ((run, "<think>mm mm mm mm mm mm mm mm mm mm mm mm mm</think>"), (other, "")):
        for line in lines:
            line["generation"] = f"{thinking}Sure."
        (directory / "generations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert js.score(run, "coherence").to_json() == js.score(other, "coherence").to_json()
    for line in lines:
        line["generation"] = "<think>I do not"
    (run / "generations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "labels-coherence.jsonl").unlink()
    assert js.score(run, "coherence").shares["incoherent"].min() == 100, "a text without an answer says nothing"


def test_the_command_line_leaves_them_out(tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["scan", "--model", str(tiny_dir), "--num-prompts", "2", "--steps", "2", "--max-new-tokens", "4"]
    main([*command, "--no-shares", "--out", str(tmp_path / "run")])
    assert "shares" not in landscape(tmp_path / "run")
    assert "complied alone" not in capsys.readouterr().out
    main([*command, "--out", str(tmp_path / "run")])
    assert set(landscape(tmp_path / "run")["shares"]) >= set(KINDS)
    output = capsys.readouterr().out
    assert "Safety volume of complied alone in percent" in output
    assert "shares: refused" in output
