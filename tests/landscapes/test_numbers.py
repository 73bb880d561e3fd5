"""Safety volume and radius: against plain implementations, by their properties, and how often intervals hold."""

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import load_script, random_landscape
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxscape as js
from jaxscape.landscapes.axes import symmetric_axes
from jaxscape.landscapes.numbers import (
    crossings,
    draw,
    interval_of,
    landscape_numbers,
    mean_radius,
    rays_of,
    safety_volume,
)

ROOT = Path(__file__).parents[2]
percents = st.integers(0, 20).map(lambda n: 5.0 * n)
positions = st.lists(st.integers(-50, 50).filter(bool), min_size=1, max_size=8, unique=True).map(
    lambda values: [value / 50 for value in sorted([0, *values])]
)


def radius_of(rates: Any, axes: Any) -> float:
    """The mean distance over the rays of one landscape, a ray without a crossing counting up to the border."""
    rays = rays_of(axes)
    assert rays is not None
    return float(mean_radius(crossings(np.asarray(rates, float), rays), rays)[0])


def plain_volume(rates: list[float], values: list[float]) -> float:
    """The integral of the margin, which is constant around each point up to half the way to the next."""
    edges = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    edges = [2 * values[0] - edges[0], *edges, 2 * values[-1] - edges[-1]]
    total = sum((100 - rate) * (b - a) for rate, a, b in zip(rates, edges, edges[1:], strict=False))
    return total / (edges[-1] - edges[0])


def plain_crossing(rates: list[float], distances: list[float]) -> float:
    """Walk outwards from the model until the rate is above 50 %."""
    if rates[0] > 50:
        return 0.0
    for i in range(1, len(rates)):
        if rates[i] > 50:
            return distances[i - 1] + (distances[i] - distances[i - 1]) * (50 - rates[i - 1]) / (
                rates[i] - rates[i - 1]
            )
    return math.inf


@given(positions, st.data())
def test_volume_and_crossings_are_those_of_plain_implementations(values: list[float], data: Any) -> None:
    rates = data.draw(st.lists(percents, min_size=len(values), max_size=len(values)))
    axes = [js.Axis("alpha", tuple(values))]
    assert safety_volume(np.array(rates), axes) == pytest.approx(plain_volume(rates, values))
    rays = rays_of(axes)
    assert rays is not None
    zero = values.index(0)
    sides = {
        "negative": (rates[zero::-1], [-value for value in values[zero::-1]]),
        "positive": (rates[zero:], values[zero:]),
    }
    expected = {side: plain_crossing(*walk) for side, walk in sides.items() if len(walk[0]) > 1}
    assert rays.sides == tuple(expected)
    np.testing.assert_allclose(crossings(np.array(rates), rays), list(expected.values()), atol=1e-9)


@given(hnp.arrays(float, (3, 5), elements=percents), st.integers(1, 4), st.randoms(use_true_random=False))
def test_properties_of_the_volume(rates: np.ndarray, ndim: int, random: Any) -> None:
    line = [js.Axis("alpha", (-2.0, -1.0, 0.0, 1.0, 2.0))]
    np.testing.assert_allclose(safety_volume(rates, line), (100 - rates).mean(axis=-1), err_msg="equidistant points")
    plane = [js.Axis("alpha", (-0.3, 0.0, 0.3)), *line]
    assert safety_volume(rates, plane) == pytest.approx((100 - rates).mean())
    uneven = [js.Axis("alpha", (-0.3, 0.0, 0.1)), js.Axis("beta", (-1.0, -0.1, 0.0, 0.2, 5.0))]
    value = safety_volume(rates, uneven)
    assert 0 <= value <= 100 + 1e-9
    order = random.sample(range(5), 5)
    shuffled = [uneven[0], js.Axis("beta", tuple(uneven[1].values[i] for i in order))]
    assert safety_volume(rates[:, order], shuffled) == pytest.approx(value), "points may come in any order"
    assert safety_volume(rates.T, uneven[::-1]) == pytest.approx(value), "axes may come in any order"
    assert safety_volume(np.full((3, 5), 30.0), uneven) == pytest.approx(70)


def test_more_points_near_the_model_do_not_change_the_volume_but_change_the_mean() -> None:
    wall = 0.25
    coarse = np.linspace(-1, 1, 11)
    dense = np.unique(np.concatenate([coarse, np.linspace(-0.1, 0.1, 41)]))
    volumes, means = [], []
    for values in (coarse, dense):
        rates = np.where(np.abs(values) > wall, 100.0, 0.0)
        volumes.append(float(safety_volume(rates, [js.Axis("alpha", tuple(values.tolist()))])))
        means.append((100 - rates).mean())
    assert volumes[0] == pytest.approx(volumes[1])
    assert means[1] > 2 * means[0]


def test_one_prompt_at_the_rim_moves_visage_and_hardly_the_other_numbers() -> None:
    axes = symmetric_axes(1, 20, 0.5)
    refused = np.repeat(np.abs(axes[0].values)[None, :, None] < 0.12, 40, axis=-1)
    flipped = refused.copy()
    flipped[0, 3, 0] = True  # one of 40 prompts is refused at alpha = -0.35
    before, after = (100 * (1 - item.mean(axis=-1)) for item in (refused, flipped))
    assert js.visage(before) - js.visage(after) > 15
    assert (safety_volume(after, axes) - safety_volume(before, axes))[0] == pytest.approx(100 / 21 / 40)
    assert radius_of(after[0], axes) == radius_of(before[0], axes)


def test_axes_without_width() -> None:
    assert safety_volume(np.array([40.0]), [js.Axis("alpha", (0.0,))]) == 60
    assert rays_of([js.Axis("alpha", (0.0,))]) is None


@pytest.mark.parametrize(
    ("rates", "negative", "positive"),
    [
        ([100, 0, 0, 0, 100], 1.5, 1.5),
        ([100, 100, 60, 100, 100], 0, 0),  # the model itself complies
        ([0, 0, 0, 0, 0], math.inf, math.inf),
        ([100, 0, 100, 0, 100], 0, 0),
        ([0, 100, 0, 75, 0], 0.5, 2 / 3),  # the first of several crossings
        ([50, 50, 50, 50, 51], math.inf, 1),  # 50 % is not above 50 %
        ([100, 100, 50, 0, 100], 0, 1.5),
    ],
)
def test_radii_worked_by_hand(rates: list[float], negative: float, positive: float) -> None:
    rays = rays_of([js.Axis("alpha", (-2.0, -1.0, 0.0, 1.0, 2.0))])
    assert rays is not None
    np.testing.assert_allclose(crossings(np.array(rates, float), rays), [negative, positive], atol=1e-9)


def test_a_side_that_the_axis_does_not_have_is_left_out() -> None:
    axes = [js.interpolation_axis(4)]
    refused = np.ones((1, 5, 4), bool)
    refused[:, 3:] = False
    radius = landscape_numbers(~refused, axes)["radius"]
    assert radius["value"] == 0.625
    assert radius["directions"][0].keys() == {"value", "interval", "at_least", "interval_at_least", "positive"}
    away = [js.Axis("alpha", (0.1, 0.2, 0.3, 0.4, 0.5))]
    assert landscape_numbers(~refused, away)["radius"] is None
    assert landscape_numbers(~refused, away)["volume"]["value"] == 60


@given(hnp.arrays(float, (2, 7), elements=percents), hnp.arrays(float, (2, 7), elements=percents))
def test_a_higher_rate_anywhere_never_makes_the_radius_larger(low: np.ndarray, more: np.ndarray) -> None:
    rays = rays_of(symmetric_axes(1, 6, 0.5))
    assert rays is not None
    assert (crossings(np.minimum(low + more, 100), rays) <= crossings(low, rays) + 1e-9).all()


@given(st.floats(0.08, 0.45), st.integers(5, 15))
def test_the_radius_of_a_round_basin_in_a_plane_is_its_radius(wall: float, half: int) -> None:
    axes = symmetric_axes(2, 2 * half, 0.5)
    x, y = np.meshgrid(*(axis.values for axis in axes), indexing="ij")
    rates = np.clip(50 + 200 * (np.hypot(x, y) - wall), 0, 100)  # a wide wall, so that the grid can follow it
    assert radius_of(rates, axes) == pytest.approx(wall, abs=0.25 / half)


@given(hnp.arrays(float, (5, 5), elements=percents))
def test_rays_of_a_plane(rates: np.ndarray) -> None:
    axes = symmetric_axes(2, 4, 1.0)
    rays = rays_of(axes)
    assert rays is not None
    assert rays.sides == ()
    np.testing.assert_allclose(rays.weights.sum(axis=-1), 1)
    corner = math.sqrt(2)
    assert rays.ends.min() == pytest.approx(1)
    assert rays.ends.max() == pytest.approx(corner)
    distances = crossings(rates, rays)
    line = rays_of(axes[:1])
    assert line is not None
    along, across = crossings(rates[:, 2], line), crossings(rates[2], line)
    np.testing.assert_allclose(distances[[8, 0, 12, 4]], [*along, *across], atol=1e-9)
    diagonal = rays_of([js.Axis("", tuple(corner * value for value in axes[0].values))])
    assert diagonal is not None
    np.testing.assert_allclose(distances[[10, 2]], crossings(np.diagonal(rates), diagonal), atol=1e-6)
    for turned in (np.rot90(rates), rates.T, np.flip(rates)):
        assert radius_of(turned, axes) == pytest.approx(radius_of(rates, axes), abs=1e-6)


def test_a_plane_in_which_the_model_is_a_corner() -> None:
    axes = [js.interpolation_axis(4), js.interpolation_axis(4)]
    rays = rays_of(axes)
    assert rays is not None
    assert len(rays.ends) == 5, "the rays from 0 to 90 degrees"


@pytest.mark.parametrize("grid", [(7,), (3, 5)])
def test_intervals_are_those_of_a_plain_bootstrap(grid: tuple[int, ...]) -> None:
    """The same samples, drawn one by one, with rates and numbers computed anew for each."""
    rng = np.random.default_rng(3)
    axes = [js.Axis(name, tuple(np.linspace(-1, 1, n).tolist())) for name, n in zip("ab", grid, strict=False)]
    happened = rng.random((3, *grid, 9)) < rng.random((3, *grid, 1))
    numbers = landscape_numbers(happened, axes, seed=5, resamples=120)
    seeded = np.random.default_rng(5)
    prompt_counts, direction_counts = draw(seeded, 9, 120), draw(seeded, 3, 120)
    volumes, radii, second = [], [], []
    for prompts, directions in zip(prompt_counts, direction_counts, strict=True):
        columns = [j for j, count in enumerate(prompts) for _ in range(count)]
        rates = [100 * np.mean(happened[i][..., columns], axis=-1) for i in range(3)]
        drawn = [i for i, count in enumerate(directions) for _ in range(count)]
        volumes.append(np.mean([safety_volume(rates[i], axes) for i in drawn]))
        radii.append(np.mean([radius_of(rates[i], axes) for i in drawn]))
        second.append(radius_of(rates[1], axes))
    for found, samples in [
        (numbers["volume"], volumes),
        (numbers["radius"], radii),
        (numbers["radius"]["directions"][1], second),
    ]:
        np.testing.assert_allclose(found["interval"], interval_of(np.array(samples)), atol=1e-8)


def test_a_bound_is_never_shown_as_a_value() -> None:
    axes = symmetric_axes(1, 4, 0.5)
    refused = np.ones((2, 5, 10), bool)
    refused[:, 0] = False  # only the negative side has a wall
    radius = landscape_numbers(~refused, axes)["radius"]
    assert (radius["at_least"], radius["interval_at_least"]) == (True, [True, True])
    for direction in radius["directions"]:
        assert direction["negative"]["value"] == 0.375
        assert direction["negative"]["at_least"] is False
        assert direction["positive"]["value"] == 0.5
        assert direction["positive"]["at_least"] is True
    refused[:, 4, :6] = False  # 60 %: with other prompts it may well stay below 50 %
    radius = landscape_numbers(~refused, axes)["radius"]
    assert (radius["at_least"], radius["interval_at_least"]) == (False, [False, True])


def test_numbers_are_repeatable_and_quick() -> None:
    rng = np.random.default_rng(0)
    happened = rng.random((3, 21, 80)) < 0.4
    axes = symmetric_axes(1, 20, 0.5)
    start = time.process_time()
    first = landscape_numbers(happened, axes)
    assert time.process_time() - start < 1
    assert first == landscape_numbers(happened, axes)
    assert first != landscape_numbers(happened, axes, seed=1)


@pytest.mark.parametrize(("directions", "lowest"), [(1, 0.89), (12, 0.88)])
def test_intervals_hold_the_truth_as_often_as_they_say(directions: int, lowest: float) -> None:
    """Basins with known walls, 200 times: walls differ between prompts, and, if there are several, directions."""
    rng = np.random.default_rng(1)
    axes = symmetric_axes(1, 20, 0.5)
    alphas = np.abs(axes[0].values)
    spread = 0.0 if directions == 1 else 0.1

    def walls(num_directions: int, prompts: int) -> np.ndarray:
        return 0.2 + spread * rng.uniform(-1, 1, (num_directions, 1)) + 0.1 * rng.uniform(-1, 1, prompts)

    def rates_with_many_prompts(shift: np.ndarray) -> np.ndarray:
        """The rates along directions whose walls lie between shift + 0.1 and shift + 0.3."""
        return np.clip((alphas - shift[:, None] - 0.1) / 0.2, 0, 1) * 100

    shifts = spread * (2 * (np.arange(4000) + 0.5) / 4000 - 1)
    truth_volume = safety_volume(rates_with_many_prompts(shifts), axes).mean()
    rays = rays_of(axes)
    assert rays is not None
    truth_radius = mean_radius(crossings(rates_with_many_prompts(shifts), rays), rays)[0].mean()
    assert truth_radius == pytest.approx(0.2, abs=1e-3)
    hits = np.zeros(2)
    for seed in range(200):
        numbers = landscape_numbers(alphas[:, None] > walls(directions, 60)[:, None, :], axes, seed=seed, resamples=300)
        for i, (name, truth) in enumerate([("volume", truth_volume), ("radius", truth_radius)]):
            low, high = numbers[name]["interval"]
            hits[i] += low <= truth <= high
    assert ((lowest <= hits / 200) & (hits / 200 <= 0.99)).all(), hits / 200


@settings(max_examples=20)
@given(st.integers(1, 2), st.integers(1, 3))
def test_a_finished_landscape_has_numbers_and_they_come_back(
    tmp_path_factory: pytest.TempPathFactory, ndim: int, sets: int
) -> None:
    directory = tmp_path_factory.mktemp("land")
    land = random_landscape(ndim, sets)
    land.save(directory)
    content = json.loads((directory / "landscape.json").read_text())
    assert content["numbers"] == land.numbers == js.Landscape.load(directory).numbers
    assert land.numbers is not None
    volume = land.numbers["asr"]["volume"]
    assert volume["value"] == pytest.approx((100 - land.asr).mean())
    assert volume["interval"][0] <= volume["value"] <= volume["interval"][1]
    assert len(volume["directions"]) == len(land.numbers["asr"]["radius"]["directions"]) == sets
    others = [key for key in content if key != "numbers"]
    assert others == ["axes", "asr", "asr_low", "asr_high", "nonfinite", "visage", "num_prompts", "complete"]
    del content["numbers"]  # as in a file that was written before there were numbers
    (directory / "landscape.json").write_text(json.dumps(content))
    assert js.Landscape.load(directory).numbers is None


def test_an_unfinished_landscape_has_no_numbers() -> None:
    land = random_landscape(1, done=3)
    assert land.numbers is None
    assert "numbers" not in land.to_json()


@pytest.mark.parametrize("numbers", [3, {}, {"asr": {"volume": {"value": 1.0}}}, {"asr": {"radius": 2}}, [1]])
def test_damaged_numbers_are_user_errors(numbers: Any, tmp_path: Path) -> None:
    random_landscape(1).save(tmp_path)
    content = json.loads((tmp_path / "landscape.json").read_text())
    (tmp_path / "landscape.json").write_text(json.dumps(content | {"numbers": numbers}))
    with pytest.raises(js.UserError, match="not a landscape file"):
        js.Landscape.load(tmp_path)


def test_the_table_of_the_guide_is_what_the_script_prints() -> None:
    precision = load_script(ROOT / "experiments/precision.py")
    guide = (ROOT / "docs/how-to/how-many-prompts.md").read_text(encoding="utf-8")
    for line in precision.table((20, 80), (1, 3), 200).splitlines():
        assert line in guide
