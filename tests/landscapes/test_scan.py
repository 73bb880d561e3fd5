"""Runs: what they compute, what they keep, and that a killed one ends as an unbroken one would."""

import copy
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.directions.point import materialise
from jaxscape.engine.decode import decode_chunk, insert
from jaxscape.engine.engine import Engine
from jaxscape.models.chat_defaults import with_chat_template
from jaxscape.models.checkpoint import fingerprint, named_leaves, tree_of
from jaxscape.prompts import refusal
from jaxscape.prompts.chat_format import chat_text
from jaxscape.report.exports.registry import export_run

PROMPTS = js.load_prompts("harmful", 3)
FILES = {"config.json", "prompts.jsonl", "generations.jsonl", "landscape.json"}
OPTIONS: dict[str, Any] = {"prompts": PROMPTS, "steps": 4, "max_new_tokens": 6, "progress": False, "shares": False}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "generations.jsonl").read_text().splitlines()]


def test_a_1d_run_evaluates_the_model_at_every_point(tiny: js.Model, tmp_path: Path) -> None:
    direction = js.random_direction(tiny, 0)
    land = js.scan(tiny, [direction, 1], out=tmp_path / "run", **OPTIONS)
    assert land.asr.shape == (2, 5)
    assert [axis.name for axis in land.axes] == ["alpha"]
    lines = records(tmp_path / "run")
    assert len(lines) == 2 * 5 * len(PROMPTS)
    assert all(line.keys() == {"direction", "coords", "prompt", "generation", "refused"} for line in lines)
    for i, line in enumerate(lines):
        assert line["prompt"] == PROMPTS[i % 3]
        assert line["coords"] == [land.axes[0].values[i // 3 % 5]]
        assert line["refused"] == js.is_refusal(line["generation"])
    for index, d in enumerate((direction, js.random_direction(tiny, 1))):
        for i, alpha in enumerate(land.axes[0].values):
            moved = materialise(tiny.params, [d], jnp.array([alpha]))
            texts = js.generate(js.Model(**{**vars(tiny), "params": moved}), PROMPTS, max_new_tokens=6)
            at = [line for line in lines if line["direction"] == index and line["coords"] == [alpha]]
            assert texts == [line["generation"] for line in at]
            assert land.asr[index, i] == js.attack_success_rate(texts)
    content = json.loads((tmp_path / "run" / "landscape.json").read_text())
    assert content["complete"] is True
    assert content["num_prompts"] == 3
    np.testing.assert_array_equal(content["asr"], land.asr)


def test_a_2d_run_spans_the_plane_of_two_orthogonal_directions(tiny: js.Model, tmp_path: Path) -> None:
    land = js.scan(tiny, [(0, 1)], out=tmp_path, **OPTIONS | {"steps": 2})
    assert land.asr.shape == (1, 3, 3)
    first = js.random_direction(tiny, 0)
    second = js.random_direction(tiny, 1, orthogonal_to=first)
    same = js.scan(tiny, [(first, second)], **OPTIONS | {"steps": 2})
    np.testing.assert_array_equal(land.asr, same.asr)
    assert [r["coords"] for r in records(tmp_path)[::3]] == [[x, y] for x in (-0.5, 0, 0.5) for y in (-0.5, 0, 0.5)]
    point = materialise(tiny.params, [first, second], jnp.array([-0.5, 0.5]))
    texts = js.generate(js.Model(**{**vars(tiny), "params": point}), PROMPTS, max_new_tokens=6)
    assert texts == [r["generation"] for r in records(tmp_path) if r["coords"] == [-0.5, 0.5]]


def test_an_interpolation_goes_from_one_model_to_another_and_beyond(tiny: js.Model, make_model: Any) -> None:
    others = [js.load_model(make_model(seed=seed)[0], "float32") for seed in (11, 12)]
    ends = [js.difference(tiny, other) for other in others]
    for end, other in zip(ends, others, strict=True):
        there = materialise(tiny.params, [end], jnp.array([1.0]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), there, other.params)
    axis = js.interpolation_axis(steps=4, extra_steps=1)
    assert axis.values == (-0.25, 0, 0.25, 0.5, 0.75, 1, 1.25)
    line = js.scan(tiny, [ends[0]], axes=[axis], **OPTIONS)
    assert line.asr.shape == (1, 7)
    plane = js.scan(tiny, [tuple(ends)], axes=[js.interpolation_axis(1), js.interpolation_axis(1)], **OPTIONS)
    for model, asr in [(tiny, line.asr[0, 1]), (others[0], line.asr[0, 5]), (others[1], plane.asr[0, 0, 1])]:
        assert asr == js.attack_success_rate(js.generate(model, PROMPTS, max_new_tokens=6))


@pytest.mark.parametrize(("steps", "extra"), [(0, 0), (2, -1)])
def test_interpolation_axes_out_of_range(steps: int, extra: int) -> None:
    with pytest.raises(js.UserError, match="steps must be"):
        js.interpolation_axis(steps, extra)


def test_nothing_is_recompiled_from_point_to_point_or_direction_to_direction(tiny: js.Model) -> None:
    programs = insert, decode_chunk, materialise
    before = decode_chunk._cache_size()
    js.scan(tiny, [0], **OPTIONS)
    compiled = [program._cache_size() for program in programs]
    assert decode_chunk._cache_size() <= before + 2
    js.scan(tiny, [1, np.int64(2)], **OPTIONS)
    assert [program._cache_size() for program in programs] == compiled


def test_points_with_nan_logits_are_counted_and_the_run_goes_on(
    tiny: js.Model, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A direction so long in one weight that two steps of it overflow; the centre is the model itself."""
    leaves = named_leaves(js.random_direction(tiny, 0))
    leaves["model.norm.weight"] = leaves["model.norm.weight"].at[0].set(3e38)
    land = js.scan(tiny, [tree_of(leaves)], out=tmp_path, **OPTIONS | {"radius": 4.0, "progress": True})
    assert land.nonfinite.tolist() == [[3, 3, 0, 3, 3]]
    assert [line.get("finite", True) for line in records(tmp_path)] == [False] * 6 + [True] * 3 + [False] * 6
    assert "3 of 3 prompts met NaN or infinite logits" in capfd.readouterr().err
    assert js.Landscape.load(tmp_path).nonfinite.tolist() == land.nonfinite.tolist()


def test_progress_names_the_point_its_asr_and_the_time_left(tiny: js.Model, capfd: pytest.CaptureFixture[str]) -> None:
    js.scan(tiny, [0], **OPTIONS | {"progress": True})
    lines = capfd.readouterr().err.splitlines()
    assert sum("ASR" in line and "left" in line for line in lines) == 5
    assert "slots" in lines[0]
    assert lines[1].startswith("the first 3 of 100 prompts from 'harmful'; the first one: ")
    assert "1/5  direction 0  alpha -0.5  ASR" in lines[2]


def test_a_scan_says_that_a_model_has_no_chat_template(tiny: js.Model, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = copy.copy(tiny.tokenizer)
    tokenizer.chat_template = None
    js.scan(replace(tiny, tokenizer=with_chat_template(tokenizer)), [0], **OPTIONS | {"progress": True})
    assert "the model's files have no chat template, so Vicuna's is used" in capfd.readouterr().err.splitlines()


@pytest.fixture(scope="module")
def unbroken(tiny: js.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unbroken")
    js.scan(tiny, [0, 1], out=directory, **OPTIONS)
    return directory


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1), leftovers=st.booleans())
def test_a_run_cut_at_any_byte_ends_as_an_unbroken_one(
    tiny: js.Model, unbroken: Path, tmp_path_factory: pytest.TempPathFactory, cut: float, leftovers: bool
) -> None:
    directory = tmp_path_factory.mktemp("cut") / "run"
    shutil.copytree(unbroken, directory)
    whole = (directory / "generations.jsonl").read_bytes()
    (directory / "generations.jsonl").write_bytes(whole[: round(cut * len(whole))])
    if leftovers:  # of a file that was being written
        (directory / ".landscape.json.tmp").write_text("half a fi")
        (directory / "landscape.json").unlink()
    land = js.scan(tiny, [0, 1], out=directory, **OPTIONS)
    assert contents(directory) == contents(unbroken)
    np.testing.assert_array_equal(land.asr, js.Landscape.load(unbroken).asr)


def test_a_finished_run_is_read_and_not_repeated(
    tiny: js.Model, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(unbroken)
    monkeypatch.setattr(Engine, "complete", None)  # would fail if a point were evaluated
    land = js.scan(tiny, [0, 1], out=unbroken, **OPTIONS)
    assert land.complete
    assert contents(unbroken) == before


def test_the_landscape_is_on_disk_after_every_point(tiny: js.Model, tmp_path: Path, monkeypatch: Any) -> None:
    seen = []
    original = Engine.complete

    def complete(*arguments: Any) -> Any:
        for completions in original(*arguments):
            land = js.Landscape.load(tmp_path)
            seen.append((int(np.isfinite(land.asr).sum()), len(records(tmp_path)), land.complete))
            yield completions

    monkeypatch.setattr(Engine, "complete", complete)
    js.scan(tiny, [0], out=tmp_path, **OPTIONS)
    assert seen == [(i, 3 * i, False) for i in range(5)]


def scan_command(directory: Path, model: Path) -> list[str]:
    command = ["scan", "--model", str(model), "--num-prompts", "3", "--steps", "40", "--max-new-tokens", "6"]
    return [*command, "--num-directions", "2", "--out", str(directory)]


def test_a_killed_process_goes_on_where_it_was(tiny_dir: Path, tmp_path: Path) -> None:
    """A command that was killed at several moments and then run to its end leaves the bytes of an unbroken run."""
    directory = tmp_path / "killed"
    command = scan_command(directory, tiny_dir)
    file = directory / "generations.jsonl"

    def lines() -> int:
        return file.read_bytes().count(b"\n") if file.exists() else -1

    moments: list[Callable[[], bool]] = [
        lambda: directory.exists(),
        lambda: lines() >= 1,
        lambda: lines() >= 20,
        (directory / "coherence.json").exists,
    ]
    for reached in moments:
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxscape", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not reached() and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was killed, not finished"
    assert lines() == 2 * 41 * 3
    main(command)
    main(scan_command(tmp_path / "unbroken", tiny_dir))
    assert contents(directory) == contents(tmp_path / "unbroken")
    assert set(contents(directory)) == FILES | {"landscape.png", "coherence.json", "labels-coherence.jsonl"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompts": js.load_prompts("benign", 3)}, "prompts, tokens"),
        ({"prompts": js.load_prompts("harmful", 2)}, "num_prompts, prompts, tokens"),
        ({"steps": 6}, "axes"),
        ({"temperature": 1.0, "radius": 1.0}, "axes, temperature"),
        ({"describe": {"note": "x"}}, "note"),
    ],
)
def test_a_directory_of_another_configuration_is_refused(
    tiny: js.Model, unbroken: Path, change: dict[str, Any], named: str
) -> None:
    before = contents(unbroken)
    with pytest.raises(js.UserError, match=rf"different: {named}\); choose another --out"):
        js.scan(tiny, [0, 1], out=unbroken, **OPTIONS | change)
    assert contents(unbroken) == before


def test_other_weights_and_other_directions_are_another_configuration(
    tiny: js.Model, unbroken: Path, make_model: Any
) -> None:
    other = js.load_model(make_model(seed=9)[0], "float32")
    with pytest.raises(js.UserError, match="weights"):
        js.scan(js.Model(**{**vars(other), "name": tiny.name}), [0, 1], out=unbroken, **OPTIONS)
    ended = js.Model(**{**vars(tiny), "eos_token_ids": (2, 3)})
    with pytest.raises(js.UserError, match=r"different: architecture\)"):
        js.scan(ended, [0, 1], out=unbroken, **OPTIONS)
    with pytest.raises(js.UserError, match=r"different: system_prompt, tokens\)"):
        js.scan(tiny, [0, 1], out=unbroken, system_prompt="Be brief.", **OPTIONS)
    with pytest.raises(js.UserError, match="different: directions"):
        js.scan(tiny, [0, js.random_direction(tiny, 1)], out=unbroken, **OPTIONS)


def test_any_changed_value_changes_the_fingerprint(tiny: js.Model) -> None:
    leaves = named_leaves(tiny.params)
    name = "model.layers.0.mlp.up_proj.weight"
    rng = np.random.default_rng(0)
    seen = {fingerprint(tiny.params)}
    for _ in range(20):
        row, column = rng.integers(0, (64, 32))
        changed = leaves | {name: leaves[name].at[row, column].add(1e-3)}
        seen.add(fingerprint(tree_of(changed)))
    swapped = leaves | {name: leaves[name][::-1]}
    seen.add(fingerprint(tree_of(swapped)))
    assert len(seen) >= 21


def test_a_run_does_not_depend_on_the_slots(tiny: js.Model, unbroken: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(unbroken, tmp_path / "run"))
    (directory / "generations.jsonl").write_bytes(b"")
    js.scan(tiny, [0, 1], out=directory, options=js.EngineOptions(slots=2), **OPTIONS)
    assert contents(directory) == contents(unbroken)


def test_a_resumed_run_keeps_its_form(tiny: js.Model, tmp_path: Path) -> None:
    for form in ("materialised", "factorised"):
        directory = tmp_path / form
        js.scan(tiny, [0], out=directory, options=js.EngineOptions(form=form), **OPTIONS)
        before = contents(directory)
        assert json.loads(before["config.json"])["form"] == form
        (directory / "generations.jsonl").write_bytes(before["generations.jsonl"][:700])
        js.scan(tiny, [0], out=directory, **OPTIONS)
        assert contents(directory) == before
    with pytest.raises(js.UserError, match=r"different: form\)"):
        js.scan(tiny, [0], out=directory, options=js.EngineOptions(form="materialised"), **OPTIONS)


def test_texts_end_at_the_keyword_that_decides_and_say_so(tiny: js.Model, tmp_path: Path, monkeypatch: Any) -> None:
    """A keyword that this random model says: its text is cut there, or, whole, goes on."""
    js.scan(tiny, [0], out=tmp_path / "plain", **OPTIONS)
    plain = records(tmp_path / "plain")
    word = next(c for record in plain for c in record["generation"][:-1] if c.isascii() and c.isalnum())
    monkeypatch.setattr(refusal, "REFUSAL_KEYWORDS", (word,))
    js.scan(tiny, [0], out=tmp_path / "cut", **OPTIONS)
    js.scan(tiny, [0], out=tmp_path / "whole", options=js.EngineOptions(full_text=True), **OPTIONS)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["full_text"] is True
    cut, whole = records(tmp_path / "cut"), records(tmp_path / "whole")
    assert [record["generation"] for record in whole] == [record["generation"] for record in plain]
    assert [record["refused"] for record in cut] == [record["refused"] for record in whole]
    assert not any("cut" in record for record in whole)
    assert any(record.get("cut") for record in cut)
    for short, long in zip(cut, whole, strict=True):
        assert long["generation"].startswith(short["generation"])
        assert not short.get("cut") or (short["refused"] and word in short["generation"])
        assert short.get("cut") or short["generation"] == long["generation"]


def test_a_models_directory_is_no_run_also_with_overwrite(tiny: js.Model, tiny_dir: Path) -> None:
    before = contents(tiny_dir)
    for overwrite in (False, True):
        with pytest.raises(js.UserError, match="holds something other than a scan"):
            js.scan(tiny, [0], out=tiny_dir, overwrite=overwrite, **OPTIONS)
    assert contents(tiny_dir) == before


def test_overwrite_starts_over(tiny: js.Model, tmp_path: Path) -> None:
    js.scan(tiny, [3], out=tmp_path, **OPTIONS)
    (tmp_path / "landscape.png").write_text("old")
    export_run(tmp_path)
    export_run(tmp_path, "csv")
    (tmp_path / "notes.txt").write_text("mine")
    js.scan(tiny, [0], out=tmp_path, overwrite=True, **OPTIONS | {"steps": 2})
    assert len(records(tmp_path)) == 9
    assert set(contents(tmp_path)) == FILES | {"notes.txt"}
    sent = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [pair["prompt"] for pair in sent] == OPTIONS["prompts"]
    assert [pair["sent"] for pair in sent] == [chat_text(tiny.tokenizer, prompt) for prompt in OPTIONS["prompts"]]


def test_directories_that_no_run_can_use_are_user_errors(tiny: js.Model, tmp_path: Path) -> None:
    def check(directory: Path, message: str) -> None:
        with pytest.raises(js.UserError, match=message):
            js.scan(tiny, [0], out=directory, **OPTIONS)

    (tmp_path / "file").write_text("mine")
    check(tmp_path / "file", "is a file")
    check(tmp_path / "file" / "below", "is a file")
    check(tmp_path, r"has files in it \(file, for example\)")
    assert contents(tmp_path) == {"file": b"mine"}
    (tmp_path / "file").rename(tmp_path / "generations.jsonl")
    check(tmp_path, "has files in it")
    assert contents(tmp_path) == {"generations.jsonl": b"mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_directory_is_a_user_error(tiny: js.Model, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(js.UserError, match="read-only"):
        js.scan(tiny, [0], out=tmp_path / "run", **OPTIONS)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("config.json", b"{", "damaged"),
        ("config.json", b"[]", "damaged"),
        ("generations.jsonl", b"nonsense\n" * 3, "damaged"),
        ("generations.jsonl", b"3\n" * 3, "damaged"),
        ("generations.jsonl", b'{"direction": 0, "coords": [0.1], "prompt": "x", "refused": true}\n' * 3, "damaged"),
    ],
)
def test_a_damaged_run_is_a_user_error(
    tiny: js.Model, unbroken: Path, tmp_path: Path, name: str, damage: bytes, message: str
) -> None:
    directory = Path(shutil.copytree(unbroken, tmp_path / "run"))
    (directory / name).write_bytes(damage)
    before = contents(directory)
    with pytest.raises(js.UserError, match=message):
        js.scan(tiny, [0, 1], out=directory, **OPTIONS)
    assert contents(directory) == before


def test_two_processes_do_not_write_one_run(tiny: js.Model, unbroken: Path) -> None:
    with (unbroken / "generations.jsonl").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(js.UserError, match="Another process is running"):
            js.scan(tiny, [0, 1], out=unbroken, **OPTIONS)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ([], "at least one direction"),
        ([0, (1, 2)], "not both"),
        ([(0, 1, 2)], "1 or 2 dimensions"),
        ([-1], "seed"),
        ([2**32], "seed"),
        ([{"model": {"norm": {"weight": np.zeros(32)}}}], "missing lm_head.weight"),
    ],
)
def test_directions_that_make_no_landscape(tiny: js.Model, directions: Any, message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        js.scan(tiny, directions, **OPTIONS)
    with pytest.raises(js.UserError, match="There are 1 axes but 2 directions"):
        js.scan(tiny, [(0, 1)], axes=[js.interpolation_axis(2)], **OPTIONS)


@pytest.mark.parametrize("num_sets", [1, 2])
def test_the_export_is_in_the_reference_projects_format(tiny: js.Model, tmp_path: Path, num_sets: int) -> None:
    js.scan(tiny, list(range(num_sets)), out=tmp_path, **OPTIONS)
    paths = export_run(tmp_path)
    assert [path.name for path in paths] == (
        ["output.jsonl"] if num_sets == 1 else ["output-0.jsonl", "output-1.jsonl"]
    )
    for index, path in enumerate(paths):
        steps = [json.loads(line) for line in path.read_text().splitlines()]
        assert [step["step"] for step in steps] == [0, 1, 2, 3, 4]
        ours = [r for r in records(tmp_path) if r["direction"] == index]
        theirs = [item for step in steps for item in step["output"]]
        assert theirs == [{"prompt": r["prompt"], "generation": r["generation"]} for r in ours]


def test_an_unfinished_run_is_not_exported(tiny: js.Model, unbroken: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(unbroken, tmp_path / "run"))
    content = json.loads((directory / "landscape.json").read_text())
    content["asr"][0][0] = None
    (directory / "landscape.json").write_text(json.dumps(content))
    with pytest.raises(js.UserError, match="not finished"):
        export_run(directory)
    directory = Path(shutil.copytree(unbroken, tmp_path / "cut"))
    (directory / "generations.jsonl").write_bytes((directory / "generations.jsonl").read_bytes()[:-200])
    with pytest.raises(js.UserError, match="not finished"):
        export_run(directory)
