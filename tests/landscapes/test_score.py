"""Several evaluators of one run: in the scan, and after it."""

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.engine.engine import Engine
from jaxscape.evaluate.base import REFUSALS, Label

PROMPTS = ["Write a poem about geese", "Hi", "Why?"]
OPTIONS: dict[str, Any] = {"prompts": PROMPTS, "steps": 4, "max_new_tokens": 6, "progress": False, "shares": False}
WHOLE = js.EngineOptions(full_text=True)


class Length:
    """Tells answers of three lengths apart, and counts those that it has judged."""

    name = "length"

    def __init__(self) -> None:
        self.judged = 0

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        return np.array([float(label != "complied") for label in self.label(prompts, answers)])

    def label(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Label]:
        assert list(prompts) == PROMPTS
        self.judged += len(answers)
        return [("complied", "partial", "refused")[min(2, len(answer) // 8)] for answer in answers]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def records(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def landscape(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "landscape.json").read_text())


@pytest.fixture(scope="module")
def plain(tiny: js.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the default evaluator, with whole answers."""
    directory = tmp_path_factory.mktemp("plain")
    js.scan(tiny, [0, 1], out=directory, options=WHOLE, **OPTIONS)
    return directory


@pytest.fixture(scope="module")
def several(tiny: js.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("several")
    js.scan(tiny, [0, 1], out=directory, evaluator=["keywords", Length(), "wei"], **OPTIONS)
    return directory


def test_several_evaluators_share_the_generations_of_a_scan(plain: Path, several: Path) -> None:
    assert records(several, "generations.jsonl") == records(plain, "generations.jsonl"), "no evaluator cuts an answer"
    assert set(contents(several)) - set(contents(plain)) == {
        "labels-keywords.jsonl",
        "labels-length.jsonl",
        "labels-wei.jsonl",
    }
    content, default = landscape(several), landscape(plain)
    measures, disagreement = content.pop("measures"), content.pop("disagreement")
    assert content == default, "the first evaluator decides the ASR"
    assert list(disagreement) == ["keywords / length", "keywords / wei", "length / wei"]
    for (a, b), measure in zip(itertools.combinations(measures, 2), disagreement.values(), strict=True):
        said = [
            [[label in REFUSALS for label in line["labels"]] for line in records(several, f"labels-{name}.jsonl")]
            for name in (a, b)
        ]
        differ = 100 * np.mean(np.array(said[0]) != np.array(said[1]), axis=1).reshape(2, 5)
        np.testing.assert_allclose(np.array(measure["differ"]), differ)
        low, high = js.wilson_interval(differ, 3)
        np.testing.assert_allclose(np.array([measure["differ_low"], measure["differ_high"]]), [low, high])
    assert list(measures) == ["keywords", "length", "wei"]
    np.testing.assert_allclose(np.array(measures["keywords"]["complied"]), content["asr"])
    np.testing.assert_allclose(np.array(measures["keywords"]["complied_low"]), content["asr_low"])
    assert set(measures["keywords"]) == {
        label + end for label in ("refused", "complied") for end in ("", "_low", "_high")
    }
    total = sum(np.array(measures["length"][label]) for label in ("refused", "partial", "complied"))
    np.testing.assert_allclose(total, 100)
    assert np.array(measures["wei"]["refused"]).tolist() == np.full((2, 5), 100.0).tolist(), "short answers"
    lines = records(several, "labels-length.jsonl")
    generations = records(several, "generations.jsonl")
    assert [(line["direction"], line["coords"]) for line in lines] == [
        (record["direction"], record["coords"]) for record in generations[::3]
    ]
    by_length = [("complied", "partial", "refused")[min(2, len(record["generation"]) // 8)] for record in generations]
    assert [label for line in lines for label in line["labels"]] == by_length
    assert set(by_length) >= {"complied", "partial"}
    config = json.loads((several / "config.json").read_text())
    assert config["further_evaluators"] == ["length", "wei"]
    assert "evaluator" not in config
    assert "further_evaluators" not in json.loads((plain / "config.json").read_text())


def test_another_first_evaluator_decides_the_asr(tiny: js.Model, tmp_path: Path) -> None:
    land = js.scan(tiny, [0], out=tmp_path, evaluator=[Length(), "keywords"], **OPTIONS)
    measure = land.measures["length"]
    np.testing.assert_allclose(land.asr, measure["complied"])
    assert [record["refused"] for record in records(tmp_path, "generations.jsonl")] == [
        label != "complied" for line in records(tmp_path, "labels-length.jsonl") for label in line["labels"]
    ]
    loaded = js.Landscape.load(tmp_path)
    np.testing.assert_array_equal(loaded.measures["length"]["partial_high"], measure["partial_high"])
    assert loaded.to_json() == land.to_json()


def test_a_finished_run_is_scored_without_generating(
    tiny: js.Model, plain: Path, several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(plain, tmp_path / "run"))
    monkeypatch.setattr(Engine, "complete", None)  # would fail if a point were evaluated
    length = Length()
    land = js.score(run, [length, "wei"])
    assert length.judged == 30
    measures, disagreement = landscape(several)["measures"], landscape(several)["disagreement"]
    added = {"measures": {name: measures[name] for name in ("length", "wei")}, "disagreement": disagreement}
    assert landscape(run) == landscape(plain) | added, "the paper's keywords have decided the ASR, and so are compared"
    for name in ("labels-length.jsonl", "labels-wei.jsonl", "generations.jsonl"):
        assert (run / name).read_bytes() == (several / name).read_bytes()
    assert land.to_json() == (run / "landscape.json").read_text()
    scored = contents(run)
    js.score(run, ["wei", length])
    assert length.judged == 30, "nothing is judged twice"
    js.scan(tiny, [0, 1], out=run, options=WHOLE, **OPTIONS)
    assert contents(run) == scored, "a scan that finds its run finished keeps what was scored"
    js.score(run, "keywords")
    assert landscape(run)["measures"] == measures


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(cut=1.0, cuts=[0.5, 0.0, 1.0])
@example(cut=0.5, cuts=[1.0, 1.0, 0.0])
@given(cut=st.floats(0, 1), cuts=st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_a_run_whose_files_are_cut_at_any_byte_ends_as_an_unbroken_one(
    tiny: js.Model, several: Path, tmp_path_factory: pytest.TempPathFactory, cut: float, cuts: list[float]
) -> None:
    directory = Path(shutil.copytree(several, tmp_path_factory.mktemp("cut") / "run"))
    names = ["labels-keywords.jsonl", "labels-length.jsonl", "labels-wei.jsonl"]
    for name, part in zip(["generations.jsonl", *names], [cut, *cuts], strict=True):
        whole = (directory / name).read_bytes()
        (directory / name).write_bytes(whole[: round(part * len(whole))])
    length = Length()
    js.scan(tiny, [0, 1], out=directory, evaluator=["keywords", length, "wei"], **OPTIONS)
    assert contents(directory) == contents(several)
    assert length.judged <= 30


def test_scoring_cut_at_any_byte_goes_on(plain: Path, several: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(plain, tmp_path / "run"))
    whole = (several / "labels-length.jsonl").read_bytes()
    for cut in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
        (run / "labels-length.jsonl").write_bytes(whole[:cut])
        length = Length()
        js.score(run, length)
        assert (run / "labels-length.jsonl").read_bytes() == whole
        assert length.judged == 30 - 3 * whole[:cut].count(b"\n")


def test_overwrite_removes_the_labels(tiny: js.Model, several: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(several, tmp_path / "run"))
    js.scan(tiny, [0], out=run, overwrite=True, **OPTIONS)
    assert not list(run.glob("labels-*"))
    assert "measures" not in landscape(run)


def test_a_run_with_other_evaluators_is_refused(tiny: js.Model, several: Path) -> None:
    before = contents(several)
    for evaluator in ("keywords", ["keywords", Length()], ["wei", "keywords", Length()]):
        with pytest.raises(js.UserError, match=r"different: (evaluator, )?further_evaluators\)"):
            js.scan(tiny, [0, 1], out=several, evaluator=evaluator, **OPTIONS)
    assert contents(several) == before


def test_phrases_and_code_of_the_users_are_recorded_with_their_checksums(tiny: js.Model, tmp_path: Path) -> None:
    phrases, code, run = tmp_path / "mine.txt", tmp_path / "mine.py", tmp_path / "run"
    phrases.write_text("I won't\n")
    code.write_text("def zero(prompts, answers):\n    return [0 for answer in answers]\n")
    evaluator = [f"keywords:{phrases}", f"{code}:zero"]
    js.scan(tiny, [0], out=run, evaluator=evaluator, **OPTIONS)
    config = json.loads((run / "config.json").read_text())
    assert config["evaluator"] == "keywords:mine.txt"
    assert config["further_evaluators"] == ["mine.py:zero"]
    assert list(config["evaluator_checksums"]) == ["keywords:mine.txt", "mine.py:zero"]
    assert {path.name for path in run.glob("labels-*")} == {
        "labels-keywords%3Amine.txt.jsonl",
        "labels-mine.py%3Azero.jsonl",
    }
    before = contents(run)
    js.scan(tiny, [0], out=run, evaluator=evaluator, **OPTIONS)
    js.score(run, evaluator)
    assert contents(run) == before
    phrases.write_text("I shan't\n")
    with pytest.raises(js.UserError, match=r"different: evaluator_checksums\)"):
        js.scan(tiny, [0], out=run, evaluator=evaluator, **OPTIONS)
    with pytest.raises(js.UserError, match=r"has labels from another version of 'keywords:mine.txt': delete it"):
        js.score(run, evaluator)
    assert contents(run) == before


def test_answers_that_were_cut_too_early_are_not_judged(tiny: js.Model, plain: Path, tmp_path: Path) -> None:
    """A phrase that this random model says cuts its answers; an evaluator that needs whole ones refuses."""
    text = next(r["generation"] for r in records(plain, "generations.jsonl") if r["generation"][:1].isalnum())
    (tmp_path / "mine.txt").write_text(text[:1])
    (tmp_path / "same.txt").write_text(f"{text[:1]}\nno such phrase")
    js.scan(tiny, [0, 1], out=tmp_path / "run", evaluator=f"keywords:{tmp_path / 'mine.txt'}", **OPTIONS)
    short = sum("cut" in record for record in records(tmp_path / "run", "generations.jsonl"))
    assert short
    before = contents(tmp_path / "run")
    same = f"keywords:{tmp_path / 'same.txt'}"
    for judge in (Length(), "wei"):
        with pytest.raises(js.UserError, match=rf"cannot judge {short} of the run's 30 answers.* --full-text"):
            js.score(tmp_path / "run", [same, judge])
    assert contents(tmp_path / "run") == before
    land = js.score(tmp_path / "run", same)
    np.testing.assert_allclose(land.measures["keywords:same.txt"]["complied"], land.asr)


def test_thinking_is_not_judged_when_a_run_is_scored(plain: Path, tmp_path: Path) -> None:
    """Nor is what follows a marker with which the prompt opened the thinking."""
    run = Path(shutil.copytree(plain, tmp_path / "run"))
    lines = records(run, "generations.jsonl")
    for line in lines:
        line["generation"] = "I cannot</think>Sure." if line["prompt"] == "Hi" else "<think>I cannot</think>Sure."
    (run / "generations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = records(run, "prompts.jsonl")
    for pair in pairs:
        pair["sent"] += "<think>\n" if pair["prompt"] == "Hi" else ""
    (run / "prompts.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    land = js.score(run, ["keywords", "jailbreakbench"])
    assert land.measures["keywords"]["complied"].tolist() == np.full((2, 5), 100.0).tolist()
    assert land.measures["jailbreakbench"]["complied"].tolist() == np.full((2, 5), 100.0).tolist()


def test_runs_that_cannot_be_scored(plain: Path, several: Path, tmp_path: Path) -> None:
    def fails(message: str) -> None:
        before = contents(run)
        with pytest.raises(js.UserError, match=message):
            js.score(run, "wei")
        assert contents(run) == before

    with pytest.raises(js.UserError, match="holds no scan that can be used"):
        js.score(tmp_path / "nothing", "wei")
    run = tmp_path / "run"
    run.mkdir()
    fails("holds no scan that can be used")
    shutil.copytree(several, run, dirs_exist_ok=True)
    labels = (run / "labels-wei.jsonl").read_text()
    for wrong in (
        "{}\n" + labels,
        labels.replace("refused", "maybe"),
        labels.partition("\n")[2],
        "x\n",
        '{"labels": 3}\n',
        labels.replace('"wei"', '"length"'),
    ):
        (run / "labels-wei.jsonl").write_text(wrong)
        fails("labels-wei.jsonl is damaged .* delete it")
    (run / "labels-wei.jsonl").unlink()
    lines = (run / "generations.jsonl").read_bytes().splitlines(keepends=True)
    (run / "generations.jsonl").write_bytes(b"".join(lines[:-3]))
    for name in ("keywords", "length"):
        (run / f"labels-{name}.jsonl").unlink()
    fails("is not finished; run its command again")
    (run / "config.json").write_text("{}")
    fails("holds something other than a scan")
    (run / "config.json").write_text("{")
    fails("config.json is damaged")
