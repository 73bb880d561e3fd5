"""Evaluators that hold a model: in a scan, after it, and in a run that was cut off."""

import importlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.evaluate.base import Label
from jaxscape.evaluate.llm_judge import LlmJudge, judge_file
from jaxscape.landscapes.landscape import FILE_NAME

scan_module = importlib.import_module("jaxscape.landscapes.scan")
PROMPTS = ["Write a poem about geese", "Hi", "Why?"]
OPTIONS: dict[str, Any] = {"prompts": PROMPTS, "steps": 2, "max_new_tokens": 6, "progress": False}


@pytest.fixture(scope="module")
def judge_path(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge that is a random model; whether it can judge, and what it says, depends on the answer."""
    directory = tmp_path_factory.mktemp("judge")
    (directory / "question.jinja").write_text("{{ prompt }}|{{ answer }}|\n\n")
    patterns = "[{ pattern = '[k-z]', label = 'refused' }, { pattern = '[A-Z]', label = 'complied' }]"
    (directory / "judge.toml").write_text(
        f"model = '{tiny_dir}'\ntemplate = 'question.jinja'\nsend_as = 'text'\n"
        f"[answer]\nmax_new_tokens = 2\npatterns = {patterns}\n"
    )
    return directory / "judge.toml"


@pytest.fixture
def judge(judge_path: Path) -> LlmJudge:
    return judge_file(str(judge_path))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def labels(directory: Path, name: str = "llm%3Ajudge.toml") -> list[list[Label | None]]:
    return [json.loads(line)["labels"] for line in (directory / f"labels-{name}.jsonl").read_text().splitlines()]


def generations(directory: Path) -> list[list[str]]:
    lines = [json.loads(line)["generation"] for line in (directory / "generations.jsonl").read_text().splitlines()]
    return [lines[start : start + 3] for start in range(0, len(lines), 3)]


@pytest.fixture(scope="module")
def judged(tiny: js.Model, judge_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("judged")
    js.scan(tiny, [0, 1], out=directory, evaluator=["keywords", f"llm:{judge_path}"], **OPTIONS)
    return directory


def test_a_scan_is_judged_when_its_points_are_decoded(judged: Path, judge: LlmJudge) -> None:
    expected = [judge.label(PROMPTS, answers) for answers in generations(judged)]
    assert labels(judged) == expected
    flat = [label for point in expected for label in point]
    assert {None, "refused", "complied"} == set(flat), "the judge says all that the test needs"
    land = js.Landscape.load(judged)
    measure = land.measures["llm:judge.toml"]
    unjudged = 100 * np.array([point.count(None) for point in expected]).reshape(2, 3) / 3
    np.testing.assert_allclose(measure["unjudged"], unjudged)
    np.testing.assert_allclose(measure["refused"] + measure["complied"] + measure["unjudged"], 100)
    assert (measure["unjudged_high"] > measure["unjudged"]).all()
    differ = land.disagreement["keywords / llm:judge.toml"]["differ"].reshape(-1)
    for point, share in zip(expected, differ, strict=True):
        said = [label == "refused" for label in point if label is not None]  # the tiny model has no keywords
        np.testing.assert_allclose(share, 100 * np.mean(said) if said else np.nan)
    config = json.loads((judged / "config.json").read_text())
    assert config["further_evaluators"] == ["llm:judge.toml"]
    assert config["evaluator_checksums"] == {"llm:judge.toml": judge.checksum}
    assert land.to_json() == (judged / FILE_NAME).read_text()


def test_a_judge_may_decide_the_asr(tiny: js.Model, judged: Path, judge: LlmJudge, tmp_path: Path) -> None:
    """Then it judges each point at once. What it could not judge is never a refusal, and is counted."""
    land = js.scan(tiny, [0, 1], out=tmp_path, evaluator=[judge, "keywords"], **OPTIONS)
    assert labels(tmp_path) == labels(judged)
    refused = [[label == "refused" for label in point] for point in labels(judged)]
    np.testing.assert_allclose(land.asr, 100 * (1 - np.mean(refused, axis=1)).reshape(2, 3))
    measure = land.measures["llm:judge.toml"]
    np.testing.assert_allclose(land.asr, measure["complied"] + measure["unjudged"])


def test_each_point_and_the_summary_say_what_was_not_judged(
    tiny_dir: Path, judge_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    command = ["scan", "--model", str(tiny_dir), "--prompts", str(tmp_path / "prompts.txt"), "--cpu", "--steps", "2"]
    command += ["--max-new-tokens", "6", "--evaluator", "keywords", f"llm:{judge_path}", "--out", str(tmp_path / "run")]
    main(command)
    out, err = capfd.readouterr()
    counts = [point.count(None) for point in labels(tmp_path / "run")]
    for number, count in enumerate(counts, 1):
        line = next(
            line for line in err.splitlines() if line.startswith(f"{number}/3  llm:judge.toml: direction 0  alpha ")
        )
        assert line.endswith(f"unjudged {count}") == bool(count)
    assert f"unjudged {100 * sum(counts) / 9:.1f} % over all points" in out
    assert "keywords / llm:judge.toml: " in out
    assert "% differ over all points; " in out
    first = ["--evaluator", f"llm:{judge_path}", "keywords", "--out", str(tmp_path / "first")]
    main([*command[:12], *first])
    err = capfd.readouterr().err
    told = [line.partition("could not judge ")[2][:1] for line in err.splitlines() if "ASR" in line]
    assert told == [str(count) if count else "" for count in counts]


def test_judging_goes_on_at_the_point_where_it_was_cut(
    tiny: js.Model, judged: Path, judge: LlmJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(judged, tmp_path / "run"))
    path = run / "labels-llm%3Ajudge.toml.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]) + b'{"evaluator": ')
    asked: list[int] = []
    label_points = LlmJudge.label_points

    def counted(self: LlmJudge, prompts: Sequence[str], points: Sequence[Sequence[str]]) -> Iterator[Any]:
        asked.append(len(points))
        for number, given in enumerate(label_points(self, prompts, points)):
            if number == 2 and len(asked) == 1:
                raise KeyboardInterrupt
            yield given

    monkeypatch.setattr(LlmJudge, "label_points", counted)
    with pytest.raises(KeyboardInterrupt):
        js.score(run, judge)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4]), "two points more are kept"
    js.score(run, judge)
    assert asked == [4, 2]
    assert contents(run) == contents(judged)
    js.score(run, judge)
    js.scan(tiny, [0, 1], out=run, evaluator=["keywords", judge], **OPTIONS)
    assert asked == [4, 2], "nothing is judged twice"
    path.write_bytes(whole.splitlines(keepends=True)[0])
    js.scan(tiny, [0, 1], out=run, evaluator=["keywords", judge], **OPTIONS)
    assert asked == [4, 2, 5], "a scan whose points are decoded goes on with the judging"
    assert contents(run) == contents(judged)
    assert judge._model is None, "the judge's memory is freed"


def test_a_judge_that_cannot_be_used_is_found_before_anything_is_generated(
    tiny: js.Model, judge_path: Path, judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(judged)
    for evaluator, message in (
        (["keywords", "llama-guard:no-such-model"], "'llama-guard:no-such-model' cannot be used: There is no model"),
        (["keywords", "llama-guard:" + tiny.name], "The rule's token 'safe' is [234] tokens"),
    ):
        with pytest.raises(js.UserError, match=message):
            js.scan(tiny, [0], out=tmp_path / "run", evaluator=evaluator, **OPTIONS)
        with pytest.raises(js.UserError, match=message):
            js.score(judged, evaluator)
    judge = judge_file(str(judge_path))
    monkeypatch.setattr(scan_module, "free_memory", lambda: 200_000)
    with pytest.raises(js.UserError, match=r"does not fit into memory: .* the finished run .jaxscape score., has"):
        js.scan(tiny, [0], out=tmp_path / "run", evaluator=[judge, "keywords"], **OPTIONS)
    monkeypatch.setattr(importlib.import_module("jaxscape.landscapes.score"), "free_memory", lambda: 20_000)
    run = Path(shutil.copytree(judged, tmp_path / "copy"))
    (run / "labels-llm%3Ajudge.toml.jsonl").unlink()
    with pytest.raises(js.UserError, match="does not fit into memory"):
        js.score(run, judge)
    assert not (tmp_path / "run").exists()
    assert contents(judged) == before


def test_the_memory_of_the_scans_model_is_freed_for_the_judge(
    tiny_dir: Path, judge: LlmJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = js.load_model(tiny_dir, "float32")
    seen: list[bool] = []
    label_rest = scan_module.label_rest

    def watched(run: Any, judges: Any, *arguments: Any, **options: Any) -> None:
        seen.append(judge in judges and all(leaf.is_deleted() for leaf in jax.tree.leaves(model.params)))
        label_rest(run, judges, *arguments, **options)

    monkeypatch.setattr(scan_module, "label_rest", watched)
    land = js.scan(model, [0], evaluator=["keywords", judge], free_model=True, shares=False, **OPTIONS)
    assert seen == [False, True]
    assert land.complete


def test_a_run_that_was_cut_at_keywords_is_not_judged(
    tiny: js.Model, judge: LlmJudge, judged: Path, tmp_path: Path
) -> None:
    texts = [text for point in generations(judged) for text in point]
    letter = next(text[:1] for text in texts if text[:1].isalnum())
    (tmp_path / "mine.txt").write_text(letter)
    js.scan(tiny, [0, 1], out=tmp_path / "run", evaluator=f"keywords:{tmp_path / 'mine.txt'}", **OPTIONS)
    with pytest.raises(js.UserError, match=r"'llm:judge.toml' cannot judge .* of the run's 18 answers.* --full-text"):
        js.score(tmp_path / "run", judge)
    assert judge._model is None
