"""VISAGE, its interval, axes, and the landscape file: pure functions and their properties."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxscape as js
from jaxscape.landscapes.axes import symmetric_axes
from jaxscape.landscapes.visage import visage_interval

percents = st.integers(0, 20).map(lambda n: 5.0 * n)


def test_visage_of_examples_worked_by_hand() -> None:
    asr = [100.0, 100.0, 60.0, 0.0, 100.0, 80.0, 100.0]
    assert js.visage(asr) == pytest.approx((40 + 100 + 20) / 3)
    assert js.visage(asr, kind="reference") == pytest.approx((40 + 100 + 0 + 20) / 4)
    # Two directions: the mean of each direction's number.
    assert js.visage([asr, [100.0] * 7]) == pytest.approx((40 + 100 + 20) / 6)
    # 99.995 counts for the paper, and not for the reference code.
    assert js.visage([99.995, 50.0, 99.995]) == pytest.approx((0.005 + 50 + 0.005) / 3)
    assert js.visage([99.995, 50.0, 99.995], kind="reference") == pytest.approx(50)
    plane = np.full((4, 5), 100.0)
    plane[1, 1], plane[2, 3] = 0, 50
    assert js.visage(plane, ndim=2) == pytest.approx(75)
    assert js.visage(plane, kind="reference", ndim=2) == pytest.approx(150 / 6)  # a box of 2 by 3 points


@given(hnp.arrays(float, hnp.array_shapes(min_dims=1, max_dims=3, max_side=6), elements=percents), st.data())
def test_visage_properties(asr: np.ndarray, data: Any) -> None:
    ndim = data.draw(st.integers(1, min(2, asr.ndim)))
    for kind in ("paper", "reference"):
        value = js.visage(asr, kind, ndim)
        assert 0 <= value <= 100
        assert js.visage(np.flip(asr, axis=-1), kind, ndim) == pytest.approx(value), "left and right are alike"
        padded = np.pad(asr, [(0, 0)] * (asr.ndim - 1) + [(2, 1)], constant_values=100.0)
        assert js.visage(padded, kind, ndim) == pytest.approx(value), "points outside the basin do not count"
    assert js.visage(asr, "paper", ndim) >= js.visage(asr, "reference", ndim) - 1e-9


@pytest.mark.parametrize(("asr", "expected"), [([0.0] * 5, 100.0), ([100.0] * 5, 0.0), ([100.0, 0.0], 100.0)])
def test_visage_of_extremes(asr: list[float], expected: float) -> None:
    assert js.visage(asr) == js.visage(asr, kind="reference") == expected


@pytest.mark.parametrize(
    "arguments", [([], "paper", 1), ([1.0], "paper", 2), ([1.0], "other", 1), ([1.0, math.nan], "paper", 1)]
)
def test_visage_of_nonsense_is_a_user_error(arguments: Any) -> None:
    with pytest.raises(js.UserError):
        js.visage(*arguments)


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Prompts drawn anew 200 times from a known basin: about 95 % of the intervals hold its VISAGE."""
    rng = np.random.default_rng(0)
    refusing = np.array([0, 0.3, 0.8, 0.9, 0.7, 0.2, 0])
    truth = js.visage(100 * (1 - refusing))
    hits = 0
    for seed in range(200):
        refused = rng.random((1, 7, 80)) < refusing[:, None]
        low, high = visage_interval(refused, seed=seed, resamples=300)
        hits += low <= truth <= high
    assert 0.88 <= hits / 200 <= 0.99


@pytest.mark.parametrize("grid", [(5,), (3, 5)])
def test_bootstrap_interval_is_repeatable_and_holds_the_estimate(grid: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    refused = rng.random((3, *grid, 40)) < rng.random((3, *grid, 1))
    for kind in ("paper", "reference"):
        interval = visage_interval(refused, kind)
        assert interval == visage_interval(refused, kind)
        low, high = interval
        assert low < js.visage(100 * (1 - refused.mean(-1)), kind, len(grid)) < high
    alone = visage_interval(refused[:1])
    assert alone[1] - alone[0] > 0


def test_a_certain_landscape_has_an_interval_of_no_width() -> None:
    refused = np.zeros((1, 5, 30), bool)
    refused[:, 1:4] = True
    assert visage_interval(refused) == (100, 100)
    assert visage_interval(~refused & False) == (0, 0)


@given(ndim=st.sampled_from([1, 2]), half=st.integers(1, 200), radius=st.floats(1e-3, 1e3))
def test_axes_are_symmetric_and_hold_the_centre(ndim: int, half: int, radius: float) -> None:
    axes = symmetric_axes(ndim, 2 * half, radius)
    assert len(axes) == ndim
    for axis in axes:
        assert len(axis.values) == 2 * half + 1
        assert axis.values[half] == 0
        assert axis.values[-1] == radius
        assert [-v for v in reversed(axis.values)] == list(axis.values)
        assert len(set(axis.values)) == len(axis.values)


@pytest.mark.parametrize(
    "arguments", [(1, 0, 0.5), (1, -2, 0.5), (1, 5, 0.5), (3, 4, 0.5), (1, 4, 0.0), (1, 4, math.nan), (1, 4, math.inf)]
)
def test_axes_out_of_range_are_user_errors(arguments: Any) -> None:
    with pytest.raises(js.UserError, match=r"even|dimensions|radius"):
        symmetric_axes(*arguments)


def outcomes(data: Any) -> tuple[Any, ...]:
    ndim, half, sets, prompts = (data.draw(st.integers(1, n)) for n in (2, 2, 3, 9))
    axes = symmetric_axes(ndim, 2 * half, 0.5)
    shape = (sets, *(2 * half + 1 for _ in range(ndim)))
    refused = data.draw(hnp.arrays(bool, (*shape, prompts)))
    done = data.draw(st.integers(0, math.prod(shape)))
    return axes, refused, np.zeros(shape, np.int64), (np.arange(math.prod(shape)) < done).reshape(shape)


@settings(max_examples=40)
@given(st.data())
def test_a_saved_landscape_comes_back(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    land = js.Landscape.from_outcomes(*outcomes(data))
    directory = tmp_path_factory.mktemp("land")
    land.save(directory)
    again = js.Landscape.load(directory)
    assert again.axes == land.axes
    assert (again.complete, again.num_prompts, again.visage_values) == (
        land.complete,
        land.num_prompts,
        land.visage_values,
    )
    for name in ("asr", "asr_low", "asr_high", "nonfinite"):
        np.testing.assert_array_equal(getattr(again, name), getattr(land, name))
    content = json.loads((directory / "landscape.json").read_text())
    assert content["complete"] is land.complete
    if land.complete:
        assert land.visage() == content["visage"]["paper"]
        assert land.visage("reference") == content["visage"]["reference"]
        assert len(content["visage"]["interval"]) == 2
    else:
        assert content["visage"] is None
        with pytest.raises(js.UserError, match="points of this one are missing"):
            land.visage()


GOOD: dict[str, Any] = {
    "axes": [{"name": "alpha", "values": [-1, 0, 1]}],
    **{name: [[100.0, 50.0, 100.0]] for name in ("asr", "asr_low", "asr_high")},
    "nonfinite": [[0, 0, 0]],
    "num_prompts": 2,
    "visage": {"paper": 50.0, "reference": 50.0, "interval": [0.0, 60.0]},
}


def test_the_files_below_are_damaged_in_one_place_each(tmp_path: Path) -> None:
    (tmp_path / "landscape.json").write_text(json.dumps(GOOD))
    assert js.Landscape.load(tmp_path).visage() == 50


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        "[" * 100_000,
        *(
            json.dumps(GOOD | change)
            for change in [
                {"axes": 3},
                {"axes": []},
                {"axes": 3 * GOOD["axes"]},
                {"axes": [{"name": "alpha", "values": ["x", 0, 1]}]},
                {"asr": "x"},
                {"asr": [[1.0, 2.0]]},
                {"asr_low": [1.0, 2.0, 3.0]},
                {"num_prompts": "many"},
                {"visage": None},
                {"visage": {"paper": 1.0}},
                {"visage": GOOD["visage"] | {"interval": [1.0]}},
            ]
        ),
    ],
)
def test_files_that_are_no_landscape_are_user_errors(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "landscape.json").write_text(content)
    with pytest.raises(js.UserError, match=r"holds no landscape|not a landscape file"):
        js.Landscape.load(tmp_path)


def test_a_landscape_that_cannot_be_saved_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    land = js.Landscape.from_outcomes(
        symmetric_axes(1, 2, 1.0), np.zeros((1, 3, 2), bool), np.zeros((1, 3), int), np.ones((1, 3), bool)
    )
    with pytest.raises(js.UserError, match="cannot be written"):
        land.save(tmp_path / "file")
