"""Adaptive scans: which points are evaluated, what fills the others, and that the numbers are those of all points."""

import csv
import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import append_answers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

import jaxscape as js
from jaxscape.evaluate.base import Label
from jaxscape.evaluate.coherence import COHERENCE
from jaxscape.landscapes.adaptive import first_round, interpolated, next_points, round_numbers
from jaxscape.landscapes.axes import Axis, interpolation_axis, symmetric_axes
from jaxscape.landscapes.numbers import landscape_numbers
from jaxscape.landscapes.store import Adaptive, open_run
from jaxscape.landscapes.visage import visage_interval
from jaxscape.report.exports.registry import export_run


def replay(happened: np.ndarray, axes: Sequence[Axis], seed: int | None = None) -> tuple[np.ndarray, list[np.ndarray]]:
    """What an adaptive scan evaluates if the outcomes are `happened`, [*grid, prompts]: the points that are known
    before each round, and at the end. With a seed, rounds are interrupted, which must not change anything."""
    known, rounds = np.zeros(happened.shape[:-1], bool), []
    rng = None if seed is None else np.random.default_rng(seed)
    while True:
        outcomes = np.where(known[..., None], happened, np.nan).astype(float)
        wanted = next_points(outcomes[None, None], known[None], axes)[0]
        rounds.append(known.copy())
        if not wanted.any():
            return interpolated(outcomes[None], known[None], axes)[0], rounds
        if rng is not None and wanted.sum() > 1:
            wanted &= rng.random(wanted.shape) < 0.5
        known |= wanted


def basin(axes: Sequence[Axis], wall: float, spread: float, prompts: int, seed: int, jitter: float = 0.0) -> np.ndarray:
    """Whether attacks succeed in a basin whose wall each prompt has elsewhere: bool[*grid, prompts]."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*(axis.values for axis in axes), indexing="ij")
    stretched = np.hypot.reduce([part * scale for part, scale in zip(grid, (1.0, 1.3), strict=False)], axis=0)
    walls = wall + spread * rng.standard_normal(prompts)
    return stretched[..., None] + jitter * rng.standard_normal((*stretched.shape, prompts)) > walls


def test_the_rounds_of_the_default_axis() -> None:
    assert first_round(symmetric_axes(1, 20, 0.5))[0].values == (-0.5, -0.25, 0.0, 0.25, 0.5)
    numbers = round_numbers(symmetric_axes(1, 20, 0.5)[0])
    assert np.flatnonzero(numbers == 0).tolist() == [0, 5, 10, 15, 20]
    np.testing.assert_array_equal(numbers, numbers[::-1])


@given(st.integers(1, 40), st.booleans())
def test_each_round_halves_the_gaps_and_the_first_has_the_model_and_the_ends(steps: int, is_symmetric: bool) -> None:
    axis = symmetric_axes(1, 2 * steps, 1.0)[0] if is_symmetric else interpolation_axis(steps)
    numbers = round_numbers(axis)
    first = np.flatnonzero(numbers == 0)
    assert {0, axis.values.index(0.0), len(axis.values) - 1} <= set(first.tolist())
    gaps = [np.diff(np.flatnonzero(numbers <= number)).max() for number in range(numbers.max() + 1)]
    assert gaps[0] <= np.ceil((len(axis.values) - 1) / 4)
    assert gaps[-1] == 1
    assert all(after == -(-before // 2) for before, after in itertools.pairwise(gaps))


@given(st.integers(1, 2), st.integers(4, 12), st.integers(0, 99))
@settings(max_examples=20)
def test_a_flat_landscape_is_evaluated_at_the_first_round_only(ndim: int, half: int, seed: int) -> None:
    axes = symmetric_axes(ndim, 2 * half, 0.5)
    outcomes = np.random.default_rng(seed).random(20) < 0.5
    happened = np.broadcast_to(outcomes, (*[2 * half + 1] * ndim, 20))
    filled, rounds = replay(happened, axes)
    assert len(rounds) == 2
    assert rounds[-1].sum() == (round_numbers(axes[0]) == 0).sum() ** ndim
    np.testing.assert_allclose(filled, happened, atol=1e-12)


@given(st.integers(1, 2), st.integers(0, 10_000), st.sampled_from([5, 40]))
@settings(max_examples=30)
def test_evaluated_points_are_kept_and_interrupted_rounds_choose_the_same(ndim: int, seed: int, prompts: int) -> None:
    axes = symmetric_axes(ndim, 12, 0.5)
    happened = basin(axes, 0.25, 0.1, prompts, seed, jitter=0.1)
    filled, rounds = replay(happened, axes)
    np.testing.assert_array_equal(filled[rounds[-1]], happened[rounds[-1]])
    assert np.isfinite(filled).all()
    assert filled.min() >= 0
    assert filled.max() <= 1
    again, interrupted = replay(happened, axes, seed)
    np.testing.assert_array_equal(interrupted[-1], rounds[-1])
    np.testing.assert_array_equal(again, filled)
    # Where the basin ends, nothing is interpolated: each side of its border is evaluated.
    is_full = 100 * filled.mean(axis=-1) > 100 - 1e-9
    for axis in range(ndim):
        ends = np.diff(is_full.astype(int), axis=axis) != 0
        for part in (np.delete(rounds[-1], -1, axis), np.delete(rounds[-1], 0, axis)):
            assert part[ends].all() or ndim == 2


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=20)
def test_interpolation_is_that_of_scipy(seed: int, is_plane: bool) -> None:
    axes = (symmetric_axes(1, 12, 0.5)[0], interpolation_axis(7, 1))[: 1 + is_plane]
    numbers = [round_numbers(axis) for axis in axes]
    grid = tuple(len(axis.values) for axis in axes)
    coarse = [np.flatnonzero(number == 0) for number in numbers]
    known = np.zeros(grid, bool)
    known[np.ix_(*coarse)] = True
    values = np.random.default_rng(seed).random((*grid, 3))
    filled = interpolated(np.where(known[..., None], values, np.nan)[None], known[None], axes)[0]
    places = [np.array(axis.values) for axis in axes]
    reference = RegularGridInterpolator(
        [place[index] for place, index in zip(places, coarse, strict=True)], values[np.ix_(*coarse)]
    )
    expected = reference(np.stack(np.meshgrid(*places, indexing="ij"), axis=-1))
    np.testing.assert_allclose(filled, expected, atol=1e-12)


@pytest.mark.parametrize(("ndim", "most"), [(1, 0.62), (2, 0.25)])
def test_the_numbers_are_those_of_the_full_grid_at_a_fraction_of_the_cost(ndim: int, most: float) -> None:
    axes, shares = symmetric_axes(ndim, 20, 0.5), []
    for seed in range(5):
        happened = basin(axes, 0.17, 0.02, 40, seed, jitter=0.01)
        filled, rounds = replay(happened, axes)
        shares.append(rounds[-1].mean())
        full, adaptive = (landscape_numbers(part[None], axes, resamples=200) for part in (happened, filled))
        for number in ("volume", "radius"):
            low, high = full[number]["interval"]
            assert low <= adaptive[number]["value"] <= high
            width = np.diff(adaptive[number]["interval"]) / (high - low)
            assert 0.7 < width < 1.5
        low, high = visage_interval(~happened[None])
        assert low <= js.visage(100 * filled.mean(axis=-1), ndim=ndim) <= high
    assert np.mean(shares) <= most


class Unmoved:
    """An evaluator that takes the answers of the unperturbed model for refusals."""

    name = "unmoved"

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers = answers

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        return np.array([float(answer[:4] == own[:4]) for answer, own in zip(answers, self.answers, strict=True)])


PROMPTS = js.load_prompts("harmful", 3)
OPTIONS: dict[str, Any] = {
    "prompts": PROMPTS,
    "steps": 12,
    "radius": 0.3,
    "max_new_tokens": 6,
    "progress": False,
    "shares": False,
}


@pytest.fixture(scope="module")
def judge(tiny: js.Model) -> Unmoved:
    return Unmoved(js.generate(tiny, PROMPTS, max_new_tokens=6))


@pytest.fixture(scope="module")
def runs(tiny: js.Model, judge: Unmoved, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The same scan, of all points and adaptive."""
    directory = tmp_path_factory.mktemp("runs")
    for adaptive in (False, True):
        js.scan(tiny, [0, 1], adaptive=adaptive, evaluator=judge, out=directory / str(adaptive), **OPTIONS)
    return {adaptive: directory / str(adaptive) for adaptive in (False, True)}


def answers(directory: Path) -> dict[tuple[int, float, str], str]:
    records = [json.loads(line) for line in (directory / "generations.jsonl").read_text().splitlines()]
    return {(record["direction"], record["coords"][0], record["prompt"]): record["generation"] for record in records}


def test_an_adaptive_scan_has_some_points_of_the_full_one(runs: dict[bool, Path]) -> None:
    full, adaptive = (js.Landscape.load(runs[is_adaptive]) for is_adaptive in (False, True))
    assert full.filled is None
    assert adaptive.filled is not None
    assert adaptive.complete
    assert 10 < adaptive.num_evaluated < 26, "more than the first round, less than all"
    assert answers(runs[True]).items() <= answers(runs[False]).items()
    assert len(answers(runs[True])) == 3 * adaptive.num_evaluated
    np.testing.assert_array_equal(adaptive.asr[~adaptive.filled], full.asr[~adaptive.filled])
    assert adaptive.numbers is not None
    assert adaptive.visage_values is not None
    (measure,) = adaptive.measures.values()
    ends = js.wilson_interval(measure["complied"][adaptive.filled], 3)
    np.testing.assert_allclose([measure[f"complied_{end}"][adaptive.filled] for end in ("low", "high")], ends)
    content = json.loads((runs[True] / "landscape.json").read_text())
    np.testing.assert_array_equal(content["filled"], adaptive.filled)
    assert "filled" not in json.loads((runs[False] / "landscape.json").read_text())


@pytest.mark.parametrize("cut", [0.1, 0.6, 0.9])
def test_a_resumed_adaptive_scan_ends_as_an_unbroken_one(
    tiny: js.Model, judge: Unmoved, runs: dict[bool, Path], tmp_path: Path, cut: float
) -> None:
    for path in runs[True].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = (runs[True] / "generations.jsonl").read_bytes()
    (tmp_path / "generations.jsonl").write_bytes(state[: int(cut * len(state))])
    js.scan(tiny, [0, 1], adaptive=True, evaluator=judge, out=tmp_path, **OPTIONS)
    for path in runs[True].iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_state_with_points_off_the_grid_is_damaged(
    tiny: js.Model, judge: Unmoved, runs: dict[bool, Path], tmp_path: Path
) -> None:
    for path in runs[True].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = (runs[True] / "generations.jsonl").read_text()
    (tmp_path / "generations.jsonl").write_text(state.replace("[-0.3]", "[-0.31]"))
    with pytest.raises(js.UserError, match="is damaged"):
        js.scan(tiny, [0, 1], adaptive=True, evaluator=judge, out=tmp_path, **OPTIONS)


def test_what_else_is_done_with_an_adaptive_run(runs: dict[bool, Path], tmp_path: Path) -> None:
    land = js.score(runs[True], "xstest", progress=False)
    assert np.isfinite(land.measures["xstest"]["refused"]).all()
    comparison = js.compare(list(runs.values()))
    assert {difference.number for difference in comparison.differences} >= {"visage", "volume"}
    for run, directory in zip(comparison.runs, runs.values(), strict=True):
        saved = js.Landscape.load(directory)
        assert saved.numbers is not None
        assert run.numbers is not None
        assert run.numbers["volume"] == saved.numbers["asr"]["volume"]
    with pytest.raises(js.UserError, match="has no answers at some points"):
        export_run(runs[True])
    points, answers = (
        list(csv.DictReader(io.StringIO(path.read_bytes().decode(), newline="")))
        for path in export_run(runs[True], "csv", tmp_path)
    )
    assert [row["interpolated"] for row in points] == list(map(str, land.filled.ravel().tolist()))
    assert len(answers) == land.num_evaluated * land.num_prompts
    (plot,) = js.plot_landscape(land).axes
    assert len(plot.lines[0].get_markevery()) < 13
    assert "points evaluated, the others interpolated" in plot.get_title()


class Labelled:
    """Stands for `coherence` where labels are given."""

    name = COHERENCE

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        return np.zeros(len(answers))


@pytest.mark.parametrize("decides", ["asr", "shares"])
def test_where_compliance_changes_points_are_evaluated_too(tmp_path: Path, decides: Adaptive) -> None:
    """A model that refuses nowhere, and becomes incoherent away from the centre."""
    axes, prompts = symmetric_axes(1, 20, 0.5), [str(number) for number in range(40)]
    complied = ~basin(axes, 0.17, 0.02, 40, 0)
    config = {"weights": "w", "directions": [[0]], "axes": []}
    with open_run(tmp_path, config, axes, 1, prompts, prompts, adaptive=decides) as run:
        while run.extend():
            for _, (alpha,) in run.points[run.num_done :]:
                row = complied[axes[0].values.index(alpha)]
                labels: list[Label] = ["complied" if value else "incoherent" for value in row]
                append_answers(run, ["Sure"] * 40, [False] * 40, [(Labelled(), labels)])
        land = run.landscape()
    assert land.asr.min() == 100
    assert land.numbers is not None
    volume = landscape_numbers(complied[None], axes)["volume"]
    is_right = volume["interval"][0] <= land.numbers["complied"]["volume"]["value"] <= volume["interval"][1]
    assert (land.num_evaluated, is_right) == ((5, False) if decides == "asr" else (11, True))


def test_an_axis_that_is_not_in_order_is_not_adaptive(tiny: js.Model) -> None:
    with pytest.raises(js.UserError, match="do not ascend"):
        js.scan(tiny, [0], prompts=PROMPTS, axes=[Axis("alpha", (0.0, 0.2, 0.1))], adaptive=True)


def test_coherence_judges_after_each_round(tiny: js.Model, tmp_path: Path) -> None:
    options = OPTIONS | {"shares": True, "steps": 8}
    land = js.scan(tiny, [0], adaptive=True, out=tmp_path, **options)
    assert np.isfinite(land.shares["complied"]).all()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert json.loads(before["config.json"])["adaptive"] == "shares"
    assert before["labels-coherence.jsonl"].count(b"\n") == land.num_evaluated
    (tmp_path / "labels-coherence.jsonl").write_bytes(b"")
    with pytest.raises(js.UserError, match="is not finished; run its command again"):  # the ASR alone would end it
        js.score(tmp_path, "wei", progress=False)
    js.scan(tiny, [0], adaptive=True, out=tmp_path, **options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
