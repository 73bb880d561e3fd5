"""Extending runs: what a larger run takes over from a smaller one, and that it ends as if it had been made at once."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import LONGROPE, MakeModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.engine.engine import Engine
from jaxscape.landscapes.axes import Axis

PROMPTS = ["Write a poem about geese", "Hi", "Explain what a key is and how a lock works, please"]
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "progress": False, "shares": False}
SEVERAL = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


def contents(directory: Path, *but: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in but}


def answers(directory: Path) -> set[tuple[Any, ...]]:
    """Which answers a run has: direction, coordinates in float32, prompt."""
    ids = json.loads((directory / "config.json").read_text())["directions"]
    records = map(json.loads, (directory / "generations.jsonl").read_text().splitlines())
    return {(*ids[r["direction"]], *np.float32(r["coords"]).tolist(), r["prompt"]) for r in records}


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the answers that are generated."""
    counts: list[int] = []
    original = Engine.complete

    def complete(*arguments: Any) -> Any:
        for completions in original(*arguments):
            counts.append(len(completions))
            yield completions

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "complete", complete)
        yield counts


@dataclass(frozen=True, eq=False, repr=False)
class Single:
    """Runs that are made at once, each of them once."""

    model: js.Model
    directory: Path

    def __call__(
        self, directions: Any = (0,), num_prompts: int = 3, form: str = "materialised", **options: Any
    ) -> Path:
        name = f"{directions}-{num_prompts}-{form}-{sorted(options.items())}"
        place = self.directory / name.replace("/", "_")
        if not place.exists():
            options |= {"prompts": PROMPTS[:num_prompts], "options": js.EngineOptions(form=form), "out": place}
            js.scan(self.model, list(directions), **OPTIONS | options)
        return place


@pytest.fixture(scope="module")
def single(tiny: js.Model, tmp_path_factory: pytest.TempPathFactory) -> Single:
    return Single(tiny, tmp_path_factory.mktemp("single"))


@SEVERAL
@given(
    directions=st.sampled_from([((1,), (0, 1)), ((1, 0), (0, 1))]),
    num_prompts=st.sampled_from([(1, 3), (2, 3), (3, 3)]),
    grid=st.sampled_from([((2, 0.15), (6, 0.45)), ((4, 0.3), (6, 0.45))]),
    cut=st.floats(0, 1),
)
def test_any_part_of_a_run_is_extended_to_the_bytes_of_a_single_run(
    single: Single,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    directions: Any,
    num_prompts: tuple[int, int],
    grid: Any,
    cut: float,
) -> None:
    small, large = (
        single(sets, count, steps=steps, radius=radius, temperature=1.0)
        for sets, count, (steps, radius) in zip(directions, num_prompts, grid, strict=True)
    )
    directory = tmp_path_factory.mktemp("extended") / "run"
    shutil.copytree(small, directory)
    whole = (directory / "generations.jsonl").read_bytes()
    (directory / "generations.jsonl").write_bytes(whole[: round(cut * len(whole))])
    size = num_prompts[0]
    kept = whole[: round(cut * len(whole))].count(b"\n") // size * size
    with counted(monkeypatch) as counts:
        steps, radius = grid[1]
        options = OPTIONS | {"steps": steps, "radius": radius, "temperature": 1.0}
        land = js.scan(single.model, [*directions[1]], prompts=PROMPTS, out=directory, extend=True, **options)
    assert contents(directory) == contents(large)
    assert land.complete
    assert sum(counts) == len(answers(large)) - kept


NUM_CHANGES = 44  # that an extension makes to files in these tests


class Killed(BaseException):
    """What a process that is killed does next: nothing."""


@contextmanager
def killed_after(count: int) -> Iterator[list[int]]:
    """Let the process be killed before one more change of a file, after `count` of them. It yields a list with the
    number of changes that are left."""
    left = [count]

    def change(function: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> Any:
            if not left[0]:
                raise Killed
            left[0] -= 1
            return function(*arguments, **options)

        return changed

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((os, "replace"), (os, "rename"), (os, "fsync"), (Path, "unlink"), (Path, "rmdir")):
            patch.setattr(module, name, change(getattr(module, name)))
        with suppress(Killed):
            yield left


LABELLED: dict[str, Any] = {"evaluator": ["keywords", "xstest"]}
LARGER = LABELLED | {"steps": 4}


@pytest.fixture(scope="module")
def plotted(single: Single, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a figure that a larger run makes out of date."""
    small = single(num_prompts=2, steps=2, **LABELLED)
    directory = Path(shutil.copytree(small, tmp_path_factory.mktemp("plotted") / "run"))
    (directory / "landscape-curve.png").write_text("a figure")
    (directory / "notes.txt").write_text("mine")
    return directory


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moments=st.lists(st.integers(0, NUM_CHANGES), min_size=1, max_size=3))
def test_an_extension_that_is_killed_at_any_moment_goes_on(
    single: Single, plotted: Path, tmp_path_factory: pytest.TempPathFactory, moments: list[int]
) -> None:
    """The former run can be read until the larger one takes its place, and both may be opened in between."""
    directory = Path(shutil.copytree(plotted, tmp_path_factory.mktemp("killed") / "run"))
    whole, before = single(**LARGER), contents(directory)

    def extend() -> None:
        js.scan(single.model, [0], prompts=PROMPTS, out=directory, extend=True, **OPTIONS | LARGER)

    for moment in moments:
        with killed_after(moment):
            extend()
        land = js.Landscape.load(directory)
        assert land.complete
        assert land.to_json() in (js.Landscape.load(path).to_json() for path in (plotted, whole))
        if (directory / "extension").exists():
            kept = contents(directory, "extension")
            assert kept == before
    extend()
    assert contents(directory) == contents(whole) | {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ({"points": [[0.1], [0.0]]}, {"points": [[0.0], [0.3], [0.1]]}),
        ({"points": [[0.1]]}, {"axes": [Axis("alpha", (0.0, 0.1))]}),
        ({"directions": [(0, 1)], "steps": 2}, {"directions": [(2, 3), (0, 1)], "steps": 2}),
        ({"adaptive": True, "steps": 4}, {"adaptive": True, "steps": 8}),
        ({"adaptive": True, "steps": 8}, {"steps": 8}),
        ({"steps": 8}, {"adaptive": True, "steps": 8}),
        ({"form": "factorised", "steps": 2}, {"form": "factorised", "directions": [0, 1], "steps": 2}),
    ],
)
def test_every_kind_of_points_is_extended(single: Single, tmp_path: Path, small: Any, large: Any) -> None:
    directory = Path(shutil.copytree(single(num_prompts=2, **small), tmp_path / "run"))
    options = {"directions": [0]} | OPTIONS | {key: value for key, value in large.items() if key != "form"}
    js.scan(single.model, prompts=PROMPTS, out=directory, extend=True, **options)
    assert contents(directory) == contents(single(**large))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_new_tokens": 5}, "max_new_tokens was 6 and is 5 now"),
        ({"temperature": 0.5, "steps": 4}, "temperature was 0.0 and is 0.5 now"),
        ({"seed": 1}, "seed was 0 and is 1 now"),
        ({"system_prompt": "Be brief."}, "system_prompt was 'default' and is 'Be brief.' now"),
        ({"evaluator": "xstest"}, "evaluator was not set and is 'xstest' now"),
        ({"options": js.EngineOptions(full_text=True)}, "full_text was false and is true now"),
        ({"options": js.EngineOptions(form="factorised")}, "form was 'materialised' and is 'factorised' now"),
        ({"describe": {"note": "x"}}, "note was not set and is 'x' now"),
        ({"prompts": PROMPTS[:1]}, "it has 2 prompts, and only 1 are given"),
        ({"prompts": PROMPTS[::-1]}, "its 2 prompts are not the first 2 of the 3 that are given, in the same order"),
        ({"directions": [(0, 1)]}, "its sets of directions have 1 each, and those that are given have 2"),
        ({"directions": [1, 2]}, "its direction random:0 is not among those that are given, or is another one now"),
        ({"steps": 6, "radius": 0.6}, r"4 of its 5 points, such as \[-0.5\], are not among those that are given"),
    ],
)
def test_a_run_that_cannot_be_extended_is_refused_with_the_reason(
    single: Single, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    directory = Path(shutil.copytree(single(num_prompts=2, steps=4), tmp_path / "run"))
    before = contents(directory)
    options = {"directions": [0], "prompts": PROMPTS, "steps": 4} | OPTIONS | change
    with pytest.raises(js.UserError, match=f"cannot be extended: {reason}"):
        js.scan(single.model, out=directory, extend=True, **options)
    with pytest.raises(js.UserError, match=r"another configuration \(different: .*\); choose another --out, or start"):
        js.scan(single.model, out=directory, **options)
    assert contents(directory) == before


def test_new_points_between_known_ones_decode_together(
    single: Single, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Path(shutil.copytree(single(steps=4, form="factorised"), tmp_path / "run"))
    batches: list[int] = []

    def complete(engine: Engine, directions: Any, points: Any, block: int = 0) -> Any:
        batches.append(len(points))
        return original(engine, directions, points, block)

    original = Engine.complete
    monkeypatch.setattr(Engine, "complete", complete)
    js.scan(single.model, [0], prompts=PROMPTS, out=directory, extend=True, steps=8, **OPTIONS)
    assert batches == [4]
    assert contents(directory) == contents(single(steps=8, form="factorised"))


def test_longrope_keeps_its_frequencies(make_model: MakeModel, tmp_path: Path) -> None:
    """Prompts that are added are answered as in a run of all prompts, or the extension is refused."""
    directory, _ = make_model(
        "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=40, pad_token_id=0, seed=3
    )
    model = js.load_model(directory, "float32")
    long, short = "Explain what a key is and how a lock works, please, in many words, and then again", "Hi"
    asked = {"long": [long], "short": [short], "both": [long, short]}
    runs = {name: tmp_path / name for name in asked}
    for name, prompts in asked.items():
        js.scan(model, [0], prompts=prompts, steps=2, out=runs[name], **OPTIONS)
    configs = {name: json.loads((run / "config.json").read_text()) for name, run in runs.items()}
    assert [configs[name].get("long_rope") for name in runs] == [True, None, True]
    js.scan(model, [0], prompts=[long, short], steps=2, out=runs["long"], extend=True, **OPTIONS)
    assert contents(runs["long"]) == contents(runs["both"])
    with pytest.raises(js.UserError, match="long_rope was not set and is true now, and its answers depend on it"):
        js.scan(model, [0], prompts=[short, long], steps=2, out=runs["short"], extend=True, **OPTIONS)


def test_another_chat_template_is_refused(single: Single, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(single(num_prompts=2, steps=4), tmp_path / "run"))
    tokenizer = copy.copy(single.model.tokenizer)
    tokenizer.chat_template = str(tokenizer.chat_template).replace("Be kind.", "Be curt.")
    model = replace(single.model, tokenizer=tokenizer)
    with pytest.raises(js.UserError, match="because the model's chat template or tokenizer has changed"):
        js.scan(model, [0], prompts=PROMPTS, out=directory, extend=True, steps=4, **OPTIONS)


def test_what_to_do_about_a_smaller_run_and_an_unfinished_extension(single: Single, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(single(num_prompts=2, steps=2), tmp_path / "run"))

    def scan(steps: int, **options: Any) -> None:
        js.scan(single.model, [0], prompts=PROMPTS, steps=steps, out=directory, **OPTIONS | options)

    with pytest.raises(js.UserError, match=r"num_prompts, prompts, tokens\); continue it with --extend, choose"):
        scan(4)
    with pytest.raises(js.UserError, match="give only one of them"):
        scan(4, extend=True, overwrite=True)
    with pytest.raises(js.UserError, match="There is no run to extend"):
        js.scan(single.model, [0], prompts=PROMPTS, extend=True, **OPTIONS)
    with killed_after(15):
        scan(4, extend=True)
    with pytest.raises(js.UserError, match="finish this extension with its own command, or remove"):
        scan(8, extend=True)
    scan(8, overwrite=True, options=js.EngineOptions(form="materialised"))
    assert contents(directory) == contents(single(steps=8))


def test_the_command_extends_a_run(tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without --extend it says that it could, and with it, it says what it takes over and draws the figure again."""

    def scan(directory: Path, num_prompts: int, steps: int, *options: str) -> None:
        sizes = ["--num-prompts", str(num_prompts), "--steps", str(steps), "--max-new-tokens", "6"]
        command = ["scan", "--model", str(tiny_dir), *sizes, "--form", "materialised", "--no-shares", *options]
        main([*command, "--out", str(directory)])

    scan(tmp_path / "run", 2, 2)
    with pytest.raises(SystemExit):
        scan(tmp_path / "run", 3, 4)
    assert "continue it with --extend" in capfd.readouterr().err
    scan(tmp_path / "run", 3, 4, "--extend")
    assert "6 answers are taken over from the run that this one extends" in capfd.readouterr().err
    scan(tmp_path / "single", 3, 4)
    assert contents(tmp_path / "run") == contents(tmp_path / "single")


def test_a_folder_of_the_users_is_no_extension(single: Single, tmp_path: Path) -> None:
    (tmp_path / "extended").mkdir()
    (tmp_path / "extended" / "notes.txt").write_text("mine")
    with pytest.raises(js.UserError, match="has files in it"):
        js.scan(single.model, [0], prompts=PROMPTS, out=tmp_path, extend=True, **OPTIONS)
    assert contents(tmp_path / "extended") == {"notes.txt": b"mine"}


@pytest.mark.parametrize("name", ["generations.jsonl", "labels-xstest.jsonl", "config.json"])
def test_a_damaged_run_is_not_extended(single: Single, plotted: Path, tmp_path: Path, name: str) -> None:
    directory = Path(shutil.copytree(plotted, tmp_path / "run"))
    (directory / name).write_bytes(b'{"labels": 3}\n' * 12)
    before = contents(directory)
    with pytest.raises(js.UserError, match=f"{name} is damaged"):
        js.scan(single.model, [0], prompts=PROMPTS, out=directory, extend=True, **OPTIONS | LARGER)
    assert contents(directory) == before


class Judge:
    """An evaluator that takes long: it counts the answers that it is asked about."""

    name, uses_model = "slow", True

    def __init__(self) -> None:
        self.count = 0

    def score(self, prompts: list[str], answers: list[str]) -> np.ndarray:
        self.count += len(answers)
        return np.array([len(prompt + answer) % 2 for prompt, answer in zip(prompts, answers, strict=True)])


@pytest.mark.parametrize("place", ["first", "late", "scored"])
def test_no_answer_is_judged_twice(single: Single, tmp_path: Path, place: str) -> None:
    """Neither by an evaluator of the scan nor by one that scored it, and coherence keeps its thresholds."""
    judge, directory, whole = Judge(), tmp_path / "run", tmp_path / "whole"
    options: dict[str, Any] = OPTIONS | {"shares": True, "steps": 4, "options": js.EngineOptions(full_text=True)}
    options |= {"evaluator": {"first": [judge], "late": ["keywords", judge], "scored": ["keywords"]}[place]}
    js.scan(single.model, [0], prompts=PROMPTS[:2], out=directory, **options | {"steps": 2})
    if place == "scored":
        js.score(directory, judge, progress=False)
    asked = judge.count
    assert asked == 3 * 2
    js.scan(single.model, [0], prompts=PROMPTS, out=directory, extend=True, **options)
    if place == "scored":
        assert (directory / "earlier-labels-slow.jsonl").exists()
        assert judge.count == asked
        js.score(directory, judge, progress=False)
    assert judge.count == 5 * 3
    js.scan(single.model, [0], prompts=PROMPTS, out=whole, **options)
    if place == "scored":
        js.score(whole, judge, progress=False)
    assert contents(directory) == contents(whole)
    assert "coherence.json" in contents(directory)
