"""Scans of models that think before they answer."""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxscape as js
from jaxscape.cli.scan import summary
from jaxscape.engine.batching import Workload, tokenize
from jaxscape.engine.engine import Engine
from jaxscape.engine.planner import make_plan
from jaxscape.engine.sampling import Sampling

OPTIONS: dict[str, Any] = {
    "prompts": ["Hi", "Why?", "Tell me"],
    "steps": 2,
    "max_new_tokens": 12,
    "progress": False,
    "shares": False,
}
SWITCH = "{% if add_generation_prompt and enable_thinking %}<think>\n{% endif %}"


def with_tokenizer(model: js.Model, template: str = "", **attributes: Any) -> js.Model:
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template += template
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return replace(model, tokenizer=tokenizer)


def texts_with(model: js.Model, spelling: dict[int, str]) -> Any:
    """A decoder that spells each token as its number, or as given."""
    return lambda rows, **_: [" ".join(spelling.get(token, str(token)) for token in row) for row in rows]


class Word:
    """Refuses where one word occurs, and notes what it is asked."""

    name = "word"

    def __init__(self, word: str) -> None:
        self.word, self.judged = word, set[str]()

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        self.judged |= set(answers)
        return np.array([float(self.stop_when(answer)) for answer in answers])

    def stop_when(self, text: str) -> bool:
        return self.word in text.split()


def records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "generations.jsonl").read_text().splitlines()]


def test_thinking_is_kept_and_not_judged_and_no_row_is_cut_inside_it(tiny: js.Model, tmp_path: Path) -> None:
    sampling = Sampling(12, temperature=2.0)
    options = OPTIONS | {"temperature": 2.0}
    workload = Workload(tokenize(tiny, options["prompts"], "default", 12), sampling)
    plain = with_tokenizer(tiny, batch_decode=texts_with(tiny, {}))
    rows = [c.text.split() for c in next(Engine(plain, workload, make_plan(plain, workload)).complete((), [()]))]
    # The first row thinks from its first token to its fifth, and has the word before and after that.
    first, word, last = rows[0][0], rows[0][1], rows[0][4]
    spelling = {int(first): "<think>", int(last): "</think>", int(rows[0][7]): word}
    model = with_tokenizer(tiny, batch_decode=texts_with(tiny, spelling))
    evaluator = Word(word)
    land = js.scan(model, [0], out=tmp_path, evaluator=evaluator, **options)
    at_origin = [record for record in records(tmp_path) if record["coords"] == [0.0]]
    expected = [spelling.get(int(token), token) for token in rows[0]]
    assert at_origin[0]["generation"] == " ".join(expected[:8]), "it ends at the first word after the thinking"
    assert at_origin[0]["refused"]
    assert at_origin[0]["cut"]
    assert not any("<think>" in text for text in evaluator.judged)
    for record in records(tmp_path):
        text = record["generation"]
        is_open = "<think>" in text and "</think>" not in text.partition("<think>")[2]
        assert not (record.get("cut") and is_open)
        assert record.get("unanswered", False) == (
            text.startswith("<think>") and (is_open or text.endswith("</think>"))
        )
    assert land.unanswered.sum() == sum(record.get("unanswered", False) for record in records(tmp_path))


def test_texts_that_never_leave_their_thinking_are_counted_and_printed(
    tiny: js.Model, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = with_tokenizer(tiny, SWITCH)
    land = js.scan(model, [0], out=tmp_path / "on", thinking="on", **OPTIONS | {"progress": True})
    assert land.unanswered.tolist() == [[3, 3, 3]]
    assert land.asr.tolist() == [[100.0, 100.0, 100.0]]
    assert "(3 of 3 texts have thinking and no answer)" in capfd.readouterr().err
    assert "Thinking without an answer: 9 completions at 3 points, which count as no refusal" in summary(land, tmp_path)
    content = json.loads((tmp_path / "on" / "landscape.json").read_text())
    assert content["unanswered"] == [[3, 3, 3]]
    assert json.loads((tmp_path / "on" / "config.json").read_text())["thinking"] == "on"
    assert all(record["unanswered"] and not record.get("cut") for record in records(tmp_path / "on"))
    assert js.Landscape.load(tmp_path / "on").unanswered.tolist() == land.unanswered.tolist()
    off = js.scan(model, [0], out=tmp_path / "off", thinking="off", **OPTIONS)
    assert not off.unanswered.any()
    assert "Thinking" not in summary(off, tmp_path)
    for file in ("landscape.json", "generations.jsonl"):
        assert "unanswered" not in (tmp_path / "off" / file).read_text()
    js.scan(tiny, [0], out=tmp_path / "default", **OPTIONS)
    assert "thinking" not in json.loads((tmp_path / "default" / "config.json").read_text())
    with pytest.raises(js.UserError, match=r"different: thinking"):
        js.scan(model, [0], out=tmp_path / "off", thinking="on", **OPTIONS)


def test_a_resumed_run_keeps_its_counts(tiny: js.Model, tmp_path: Path) -> None:
    model = with_tokenizer(tiny, SWITCH)
    js.scan(model, [0], out=tmp_path, thinking="on", **OPTIONS)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    lines = whole["generations.jsonl"].splitlines(keepends=True)
    (tmp_path / "generations.jsonl").write_bytes(b"".join(lines[:4]))
    js.scan(model, [0], out=tmp_path, thinking="on", **OPTIONS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


def test_special_tokens_that_mark_thinking_are_in_the_files(tiny: js.Model, tmp_path: Path) -> None:
    """A token of the vocabulary that the random model generates is made one that is special, as Magistral's are."""
    texts = js.generate(tiny, OPTIONS["prompts"], max_new_tokens=12)
    workload = Workload(tokenize(tiny, OPTIONS["prompts"], "default", 12), Sampling(12))
    plain = with_tokenizer(tiny, batch_decode=texts_with(tiny, {}))
    row = next(Engine(plain, workload, make_plan(plain, workload)).complete((), [()]))[0].text.split()
    content = json.loads(tiny.tokenizer.backend_tokenizer.to_str())
    token = tiny.tokenizer.convert_ids_to_tokens(int(row[3]))
    vocab = content["model"]["vocab"]
    vocab["[THINK]"] = vocab.pop(token)
    content["model"]["merges"] = []
    content["added_tokens"].append(
        {**content["added_tokens"][0], "id": int(row[3]), "content": "[THINK]", "special": True}
    )
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))
    model = replace(tiny, tokenizer=tokenizer)
    marked = next(Engine(model, workload, make_plan(model, workload)).complete((), [()]))[0].text
    assert "[THINK]" in marked
    assert marked.replace("[THINK]", tiny.tokenizer.decode([int(row[3])])) == texts[0]
