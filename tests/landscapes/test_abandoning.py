"""Scans that abandon answers whose beginnings make no sense: what they keep, and that the rest is that of any scan."""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.cli.scan import summary
from jaxscape.evaluate.coherence import BEGINNING, BeginningThresholds, calibrate
from jaxscape.landscapes.questions import Questions
from jaxscape.landscapes.shares import abandon_noise
from jaxscape.report.exports.registry import export_run
from jaxscape.report.figures import plot_landscape
from jaxscape.report.page.content import answers_content
from jaxscape.report.page.content import summary as page_summary
from jaxscape.report.run import load_run

OPTIONS: dict[str, Any] = {
    "prompts": ["Hi", "Write a poem about geese", "Why?", "What is a map?"],
    "steps": 4,
    "max_new_tokens": 12,
    "progress": False,
}
ABANDON: dict[str, Any] = OPTIONS | {"abandon_incoherent": True}


@pytest.fixture(scope="module", autouse=True)
def noise_from_surprise(tiny: js.Model) -> Any:
    """Thresholds that divide a tiny random model's own answers, to which all texts are alike."""
    shares = importlib.import_module("jaxscape.landscapes.shares")
    own = calibrate(tiny, beginnings=True)
    limits = BeginningThresholds(surprise=own.own + 0.3, distinct=0.0, fresh=0.0)
    fixed = replace(own, beginning=limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            shares, "calibrate", lambda model, beginnings: replace(fixed, beginning=limits if beginnings else None)
        )
        yield


@pytest.fixture(scope="module")
def run(tiny: js.Model, tmp_path_factory: pytest.TempPathFactory, noise_from_surprise: None) -> Path:
    directory = tmp_path_factory.mktemp("abandoned") / "run"
    js.scan(tiny, [0], out=directory, **ABANDON)
    return directory


def lines(directory: Path, name: str = "generations.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_abandoned_answers_are_beginnings_and_all_others_are_whole(tiny: js.Model, run: Path, tmp_path: Path) -> None:
    js.scan(tiny, [0], out=tmp_path / "whole", **OPTIONS)
    abandoned = [line.get("abandoned", False) for line in lines(run)]
    assert 0 < sum(abandoned) < len(abandoned)
    for line, whole, is_abandoned in zip(lines(run), lines(tmp_path / "whole"), abandoned, strict=True):
        if is_abandoned:
            assert line == whole | {"generation": line["generation"], "cut": True, "abandoned": True}
            assert whole["generation"].startswith(line["generation"].rstrip("\ufffd"))
            assert len(line["generation"]) < len(whole["generation"])
        else:
            assert line == whole
    config = json.loads((run / "config.json").read_text())
    assert config.pop("abandon_incoherent") is True
    assert config == json.loads((tmp_path / "whole" / "config.json").read_text())
    labels = [label for line in lines(run, "labels-coherence.jsonl") for label in line["labels"]]
    assert {label for label, lost in zip(labels, abandoned, strict=True) if lost} == {"incoherent"}
    rest = [label for line in lines(tmp_path / "whole", "labels-coherence.jsonl") for label in line["labels"]]
    assert [(a, b) for a, b, lost in zip(labels, rest, abandoned, strict=True) if not lost and a != b] == []
    land = js.Landscape.load(run)
    assert land.abandoned is not None
    assert land.abandoned.tolist() == np.reshape(abandoned, (1, 5, 4)).sum(axis=-1).tolist()
    assert js.Landscape.load(tmp_path / "whole").abandoned is None


@pytest.mark.parametrize("form", ["factorised", "materialised"])
def test_a_run_that_goes_on_and_every_form_have_the_same_files(
    tiny: js.Model, run: Path, tmp_path: Path, form: Any
) -> None:
    """With few rows, so that answers are asked about at many times."""
    options = js.EngineOptions(form=form, slots=2)
    js.scan(tiny, [0], out=tmp_path / "run", options=options, **ABANDON)
    (tmp_path / "run" / "labels-coherence.jsonl").unlink()
    half = (tmp_path / "run" / "generations.jsonl").read_bytes().splitlines(keepends=True)[:9]
    (tmp_path / "run" / "generations.jsonl").write_bytes(b"".join(half))
    js.scan(tiny, [0], out=tmp_path / "run", options=options, **ABANDON)
    found, expected = contents(tmp_path / "run"), contents(run)
    assert {name for name in found if found[name] != expected[name]} <= {"config.json"}, "it names the form"


def test_an_extended_run_is_that_of_all_prompts(tiny: js.Model, run: Path, tmp_path: Path) -> None:
    few = ABANDON | {"prompts": OPTIONS["prompts"][:2], "steps": 2}
    js.scan(tiny, [0], out=tmp_path / "run", **few)
    js.scan(tiny, [0], out=tmp_path / "run", extend=True, **ABANDON)
    assert contents(tmp_path / "run") == contents(run)


def test_shards_merge_into_the_run_of_one_machine(tiny: js.Model, run: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        js.scan(tiny, [0], out=tmp_path / str(number), shard=f"{number}/2", **ABANDON)
    js.merge([tmp_path / "1", tmp_path / "2"], tmp_path / "run")
    assert contents(tmp_path / "run") == contents(run)


def test_everyone_who_shows_the_asr_says_what_it_counts(run: Path, tiny: js.Model, tmp_path: Path) -> None:
    land, kept = js.Landscape.load(run), load_run(run)
    assert land.abandoned is not None
    sentence = f"{land.abandoned.sum()} of 20 answers abandoned as incoherent: the ASR is that of cut texts"
    assert sentence in summary(land, Path("figure.png"))
    assert sentence in plot_landscape(land).get_suptitle() + "".join(ax.get_title() for ax in plot_landscape(land).axes)
    assert sentence in page_summary(kept)
    js.scan(tiny, [0], out=tmp_path / "whole", **OPTIONS)
    (note,) = [note for note in js.compare([run, tmp_path / "whole"]).notes if "abandoned" in note]
    assert note.endswith("complied alone is not: run.")
    remarks = [remark for index in range(5) for remark in answers_content(kept, index)["remarks"]]
    assert remarks.count(["abandoned"]) == land.abandoned.sum()


def test_other_evaluators_judge_what_is_there(tiny: js.Model, run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    land = js.score(copy, "xstest")
    assert not np.isnan(land.measures["xstest"]["complied"]).any()
    assert land.abandoned is not None


def test_the_papers_export_needs_the_ends_of_the_answers(run: Path, tmp_path: Path) -> None:
    with pytest.raises(js.UserError, match="abandoned answers that make no sense, so their ends are missing"):
        export_run(run, "reference", tmp_path)
    assert not list(tmp_path.iterdir())


def test_coherence_may_decide_the_asr(tiny: js.Model, run: Path, tmp_path: Path) -> None:
    js.scan(tiny, [0], out=tmp_path / "run", evaluator="coherence", **ABANDON)
    lost = [line.get("abandoned", False) for line in lines(tmp_path / "run")]
    assert lost == [line.get("abandoned", False) for line in lines(run)]


def test_what_repeats_itself_later_on_is_abandoned_too(tiny: js.Model) -> None:
    """But no refusal, and nothing while the model thinks; and no answer that is nearly whole."""
    limits = BeginningThresholds(surprise=20.0, distinct=0.3, fresh=0.4)
    thresholds = replace(calibrate(tiny), beginning=limits)
    questions = Questions.of(tiny, OPTIONS["prompts"], "default", "default", 32)
    abandon = abandon_noise(tiny, thresholds, questions, js.is_refusal, limit=30)
    assert abandon.sizes == [BEGINNING, 15]
    texts = ["map map map map map map", "I cannot map map map map", "<think>map map map map", "A map shows where it is"]
    assert abandon.is_lost(15, [0, 1, 2, 3], texts) == [True, False, False, False]


def test_a_run_cannot_change_its_mind(tiny: js.Model, run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    with pytest.raises(js.UserError, match="abandon_incoherent"):
        js.scan(tiny, [0], out=copy, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": False}, "needs the model's judgement of what makes sense"),
        ({"options": js.EngineOptions(full_text=True)}, "full_text generates every answer to its end"),
        ({"options": js.EngineOptions(form="streamed")}, "the form streamed keeps them on the host"),
        (
            {"max_new_tokens": BEGINNING},
            f"the first {BEGINNING} tokens of an answer, and max_new_tokens is {BEGINNING}",
        ),
    ],
)
def test_what_cannot_be_abandoned_is_an_error(
    tiny: js.Model, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(js.UserError, match=message):
        js.scan(tiny, [0], out=tmp_path / "run", **(ABANDON | options))
    assert not (tmp_path / "run").exists()


def test_too_long_prompts_are_an_error(tiny: js.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("jaxscape.landscapes.scan"), "LARGEST_PROMPT_CACHE", 1000)
    with pytest.raises(js.UserError, match="of the prompts on each device, more than"):
        js.scan(tiny, [0], out=tmp_path / "run", **ABANDON)
    assert not (tmp_path / "run").exists()


def test_the_command_has_the_option(tiny_dir: Path, tmp_path: Path) -> None:
    command = ["scan", "--model", str(tiny_dir), "--num-prompts", "2", "--steps", "2", "--max-new-tokens", "9", "--cpu"]
    main([*command, "--abandon-incoherent", "--out", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["abandon_incoherent"] is True
