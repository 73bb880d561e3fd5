"""Comparison of runs: what is compared, what is paired, and how often a difference is found where there is none."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_run
from hypothesis import given
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.landscapes import comparison as module
from jaxscape.landscapes.axes import symmetric_axes
from jaxscape.landscapes.comparison import NUMBERS, Comparison, holm

AXES, PLANE = symmetric_axes(1, 20, 0.5), symmetric_axes(2, 8, 0.5)


def basin(wall: float, prompts: int = 40, directions: int = 1, seed: int = 0, ndim: int = 1) -> np.ndarray:
    """Refusals up to a wall, which differs between prompts and directions: bool[directions, *grid, prompts]."""
    rng = np.random.default_rng(seed)
    walls = wall + rng.normal(0, 0.03, (directions, 1)) + rng.normal(0, 0.04, prompts)
    axes = AXES if ndim == 1 else PLANE
    distance = np.hypot.reduce(np.meshgrid(*(axis.values for axis in axes), indexing="ij"), axis=0)
    return distance[None, ..., None] < walls.reshape(directions, *[1] * ndim, prompts)


def by_number(comparison: Comparison) -> dict[str, Any]:
    """The differences of a comparison of two runs."""
    return {difference.number: difference for difference in comparison.differences}


def test_scans_of_two_models_along_the_same_directions_are_paired(
    tiny: js.Model, make_model: Any, tmp_path: Path
) -> None:
    other = js.load_model(make_model(seed=3)[0], "float32")
    options: dict[str, Any] = {
        "prompts": js.load_prompts("harmful", 4),
        "steps": 2,
        "max_new_tokens": 4,
        "progress": False,
    }
    lands = [js.scan(m, [0, 1], out=tmp_path / name, **options) for m, name in ((tiny, "a"), (other, "b"))]
    comparison = js.compare([tmp_path / "a", str(tmp_path / "b")])
    assert [run.name for run in comparison.runs] == ["a", "b"]
    assert {difference.paired for difference in comparison.differences} == {"prompts and directions"}
    for run, land in zip(comparison.runs, lands, strict=True):
        assert run.numbers is not None
        assert run.numbers["visage"]["value"] == land.visage()
        assert land.numbers is not None
        assert run.numbers["volume"] == land.numbers["asr"]["volume"]
    difference = by_number(comparison)["volume"]
    assert difference.value == pytest.approx(lands[0].asr.mean() - lands[1].asr.mean())


def test_a_large_difference_is_larger_than_the_noise_and_none_is_not(tmp_path: Path) -> None:
    narrow = write_run(tmp_path / "narrow", basin(0.15), AXES)
    same = write_run(tmp_path / "same", basin(0.15, seed=1), AXES, directions=[[7]])
    wide = write_run(tmp_path / "wide", basin(0.3), AXES)
    comparison = js.compare([narrow, same, wide])
    found = {(item.first, item.second, item.number): item for item in comparison.differences}
    assert len(found) == 9
    for number in ("volume", "radius"):
        assert found["narrow", "wide", number].larger_than_noise == "yes"
        assert found["narrow", "wide", number].value > 0
        assert found["narrow", "same", number].larger_than_noise == "no"
    for item in comparison.differences:
        assert item.low <= item.value <= item.high
        assert 0 < item.p <= item.adjusted <= 1
    assert found["narrow", "wide", "volume"].paired == "prompts and directions"
    assert found["narrow", "same", "volume"].paired == "prompts"
    assert js.compare([narrow, same, wide]).differences == comparison.differences, "seeded"


def test_a_run_compared_with_its_twin_differs_by_nothing(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, basin(0.2, directions=3), AXES) for name in "ab"]
    for item in js.compare(runs).differences:
        assert (item.value, item.low, item.high, item.p, item.adjusted) == (0, 0, 0, 1, 1)


@pytest.mark.parametrize("directions", [1, 3])
def test_pairing_makes_intervals_narrower_and_does_not_mind_the_order_of_prompts(
    tmp_path: Path, directions: int
) -> None:
    first = basin(0.2, directions=directions)
    second = first & (np.random.default_rng(0).random(first.shape) < 0.97)  # the same model, with a little noise
    names = [f"prompt {i}" for i in range(40)]
    a = write_run(tmp_path / "a", first, AXES, names)
    b = write_run(tmp_path / "b", second, AXES, names)
    order = np.random.default_rng(1).permutation(40)
    c = write_run(tmp_path / "c", second[..., order], AXES, [names[i] for i in order])
    d = write_run(tmp_path / "d", second, AXES, [f"other {name}" for name in names], directions=[[9]] * directions)
    paired, shuffled, unpaired = (by_number(js.compare([a, run]))["volume"] for run in (b, c, d))
    assert (shuffled.value, shuffled.low, shuffled.high, shuffled.p) == (
        paired.value,
        paired.low,
        paired.high,
        paired.p,
    )
    assert (paired.paired, unpaired.paired) == ("prompts and directions", "nothing")
    assert unpaired.value == paired.value
    assert unpaired.high - unpaired.low > 2 * (paired.high - paired.low)
    assert paired.larger_than_noise == "yes"
    assert unpaired.larger_than_noise == "no"


@pytest.mark.parametrize("paired", [True, False])
def test_differences_are_found_where_there_are_none_as_often_as_the_level_says(paired: bool) -> None:
    """Two models that are alike, 100 times: about 5 % of the p-values are below 0.05."""
    found = np.zeros(len(NUMBERS))
    for seed in range(100):
        rng = np.random.default_rng(seed)
        walls = [rng.normal(0.25, 0.06, 40)] * 2 if paired else rng.normal(0.25, 0.06, (2, 40))
        runs = [
            loaded(np.abs(AXES[0].values)[None, :, None] >= wall + rng.normal(0, 0.02, 40), f"{paired or number}")
            for number, wall in enumerate(walls)
        ]
        differences = module._differences(runs[0], runs[1], NUMBERS, seed, 400)
        assert differences[0].paired == ("prompts and directions" if paired else "directions")
        found += [difference.p < 0.05 for difference in differences]
    assert (found <= 12).all(), found
    assert found[1:].max() >= 1, "a test that never finds anything would pass, too"


def loaded(succeeded: np.ndarray, prompts: str) -> module.ComparedRun:
    """A run as it is after it was read; runs with the same text `prompts` have the same prompts."""
    asr = 100 * succeeded.mean(axis=-1)
    shape = succeeded.shape[:-1]
    numbers = {"asr": module.landscape_numbers(succeeded, AXES, resamples=40)}
    values = {"paper": js.visage(asr), "interval": [0.0, 0.0]}
    zeros = np.zeros(shape, int)
    land = js.Landscape(AXES, asr, asr, asr, zeros, zeros, succeeded.shape[-1], values, numbers)
    config = {"directions": [[0]], "architecture": "a"}
    return module.ComparedRun(prompts, land, config, (prompts,) * succeeded.shape[-1], succeeded)


def test_holm_is_that_of_a_worked_example() -> None:
    """R: p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm"), and with p-values that are out of order."""
    np.testing.assert_allclose(holm([0.01, 0.02, 0.03, 0.04, 0.05]), [0.05, 0.08, 0.09, 0.09, 0.09])
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_is_the_procedure_from_the_smallest_p_value_on(p_values: list[float]) -> None:
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for step, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
            if p_values[index] * (len(p_values) - step) >= level:
                break
            rejected.add(index)
        assert {index for index, p in enumerate(holm(p_values)) if p < level} == rejected


def test_many_comparisons_can_still_find_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RESAMPLES", 100)  # too few for 30 differences: the number grows with these
    axes = symmetric_axes(1, 4, 0.5)
    runs = [
        write_run(tmp_path / f"{i}", np.abs(axes[0].values)[None, :, None] < np.full(5, 0.2 + 0.3 * (i == 0)), axes)
        for i in range(5)
    ]
    comparison = js.compare(runs)
    assert len(comparison.differences) == 30
    found = {(item.first, item.second) for item in comparison.differences if item.larger_than_noise == "yes"}
    assert found == {("0", f"{i}") for i in range(1, 5)}


def pair(tmp_path: Path, second: np.ndarray | None = None, axes: Any = AXES, **config: Any) -> Comparison:
    """A comparison of a run with one that differs in the axes or the configuration."""
    prompts, done = config.pop("prompts", None), config.pop("done", None)
    runs = [
        write_run(tmp_path / "a", basin(0.2), AXES),
        write_run(tmp_path / "b", basin(0.3) if second is None else second, axes, prompts, done, **config),
    ]
    return js.compare(runs)


def in_unit(unit: str) -> tuple[js.Axis, ...]:
    return tuple(replace(axis, unit=unit) for axis in AXES)


@pytest.mark.parametrize("unit", ["tensors", "weights"])
def test_random_directions_are_compared_with_others_of_equal_norm(unit: str, tmp_path: Path) -> None:
    comparison = pair(tmp_path, axes=in_unit(unit), directions=[[f"{unit}:sparse"]])
    assert [item.number for item in comparison.differences] == list(NUMBERS)
    assert len(js.plot_comparison(comparison).axes) == 1
    third = write_run(tmp_path / "c", basin(0.3), in_unit("raw"), directions=[["file"]])
    assert len(js.plot_comparison(js.compare([tmp_path / "b", third, tmp_path / "a"])).axes) == 2


def test_runs_on_different_grids_are_compared_by_their_radius(tmp_path: Path) -> None:
    axes = symmetric_axes(1, 10, 0.6)
    refused = np.abs(axes[0].values)[None, :, None] < np.full(40, 0.3)
    comparison = pair(tmp_path, refused, axes)
    assert [item.number for item in comparison.differences] == ["radius"]
    assert "VISAGE and volume are not compared, because they depend on the grid" in comparison.notes[-1]
    assert comparison.notes[-1].endswith(": a and b.")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"axes": (js.interpolation_axis(10, 5),), "second": basin(0.3)[:, :21]}, "different axes (alpha; interp"),
        ({"axes": PLANE, "second": basin(0.3, ndim=2)}, "different axes (alpha; alpha, beta)"),
        ({"axes": in_unit("raw"), "directions": [["file"]]}, "their axes have different units (not recorded and raw)"),
        ({"evaluator": "other"}, "different evaluators judged them (keywords and other)"),
        ({"evaluator_checksums": {"keywords": "b"}}, "because two versions of the evaluator keywords judged them"),
        ({"done": 5}, "Not finished (5 of 21 points), so without numbers; the run's command finishes it: b."),
    ],
)
def test_what_cannot_be_compared_is_a_sentence(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    comparison = pair(tmp_path, **changes)
    assert comparison.differences == ()
    assert sum(sentence in note for note in comparison.notes) == 1
    assert [run.numbers is None for run in comparison.runs] == [False, "done" in changes]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompts": [f"other {i}" for i in range(40)]}, "Different prompts"),
        ({"directions": [[5]]}, "One direction only, and not the same one"),
        ({"directions": [["checksum"]]}, "not all are random"),
        ({"architecture": "b"}, "One direction only, and not the same one"),
        ({"max_new_tokens": 64}, "max_new_tokens is not the same (8 and 64): a and b."),
        ({"second": basin(0.3, directions=4)}, "4 directions are few"),
    ],
)
def test_what_else_to_know_is_a_sentence(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    comparison = pair(tmp_path, **changes)
    assert len(comparison.differences) == 3
    assert sum(sentence in note for note in comparison.notes) == 1


@pytest.mark.parametrize("ndim", [1, 2])
def test_a_direction_is_the_same_with_and_without_its_control(ndim: int, tmp_path: Path) -> None:
    special, control = ["f" * 64, 0][:ndim], [f"control:{'f' * 64}:0", 0][:ndim]
    axes = AXES if ndim == 1 else PLANE
    with_control = np.concatenate([basin(0.3, ndim=ndim), basin(0.4, ndim=ndim)])
    names = [["refusal", "random:0"][:ndim], ["control:[refusal]:0", "random:0"][:ndim]]
    for name, refused, sets in (("a", basin(0.2, ndim=ndim), 1), ("b", with_control, 2)):
        given = {"directions": [special, control][:sets], "direction_names": names[:sets]}
        write_run(tmp_path / name, refused, axes, **given, architecture="same")
    compared = js.compare([tmp_path / "a", tmp_path / "b"])
    assert not any("One direction only" in note for note in compared.notes)
    assert not any(difference.may_be_direction for difference in compared.differences)


@pytest.mark.parametrize(("walls", "bound"), [((0.2, 9), "at least"), ((9, 0.2), "at most"), ((9, 9), None)])
def test_a_radius_that_is_a_lower_bound(walls: tuple[float, float], bound: str | None, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, basin(wall), AXES) for name, wall in zip("ab", walls, strict=True)]
    comparison = js.compare(runs)
    radius = by_number(comparison).get("radius")
    if bound is None:
        assert radius is None
        assert "The radius is not compared, because" in comparison.notes[-1]
    else:
        assert radius is not None
        assert radius.bound == bound
        assert radius.larger_than_noise == "yes"


def test_a_short_axis_without_a_wall_says_nothing_about_a_wall_beyond_it(tmp_path: Path) -> None:
    short = symmetric_axes(1, 4, 0.1)
    comparison = pair(tmp_path, np.ones((1, 5, 40), bool), short)
    assert comparison.differences == ()
    assert any("the smaller one, or both, are only lower bounds" in note for note in comparison.notes)


def test_what_another_direction_may_explain_is_not_called_larger_than_the_noise(tmp_path: Path) -> None:
    comparison = pair(tmp_path, directions=[[5]])
    assert by_number(comparison)["volume"].larger_than_noise == "unknown"
    several = write_run(tmp_path / "c", basin(0.3, directions=3), AXES)
    assert by_number(js.compare([tmp_path / "a", several]))["volume"].larger_than_noise == "unknown"


def test_planes_are_compared_with_planes(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / n, basin(w, 20, ndim=2), PLANE) for n, w in (("a", 0.15), ("b", 0.3))]
    found = by_number(js.compare(runs))
    assert found["radius"].larger_than_noise == "yes"
    assert found["radius"].value == pytest.approx(0.15, abs=0.03)


def test_a_run_from_before_there_were_numbers(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, basin(0.2), AXES) for name in "ab"]
    expected = js.compare(runs)
    for run in runs:
        path = run / "landscape.json"
        content = json.loads(path.read_text())
        del content["numbers"]
        path.write_text(json.dumps(content))
    assert js.compare(runs).differences == expected.differences
    assert [run.numbers for run in js.compare(runs).runs] == [run.numbers for run in expected.runs]


def test_names_are_as_short_as_they_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "z"]
    for path in paths:
        write_run(path, basin(0.2), AXES)
    assert [run.name for run in js.compare(paths[1:]).runs] == ["run", "z"]
    names = [run.name for run in js.compare(paths).runs]
    assert names == ["x/run", "y/run", f"{tmp_path.name}/z"]
    monkeypatch.chdir(paths[0])
    assert [run.name for run in js.compare([".", paths[2]]).runs] == ["run", "z"]


def test_runs_that_cannot_be_read_are_user_errors(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", basin(0.2), AXES)
    for runs, message in [
        ([good], "at least two runs, and got 1"),
        ([], "at least two runs, and got 0"),
        (str(good), "must be a list"),
        ([good, tmp_path / "good" / "." / ".." / "good"], "is given twice"),
        ([good, tmp_path / "missing"], "holds no landscape"),
    ]:
        with pytest.raises(js.UserError, match=message):
            js.compare(runs)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["config", "no config", "directions", "cut", "other", "text", "missing"])
def test_damaged_runs_are_user_errors(damage: str, tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", basin(0.2), AXES)
    bad = write_run(tmp_path / "bad", basin(0.2), AXES)
    generations = bad / "generations.jsonl"
    lines = generations.read_text().splitlines(keepends=True)
    if damage == "config":
        (bad / "config.json").write_text("[1]")
    elif damage == "directions":
        (bad / "config.json").write_text('{"directions": 3}')
    elif damage == "no config":
        (bad / "config.json").unlink()
    elif damage == "missing":
        generations.unlink()
    else:
        changed = {"cut": lines[:-1], "text": ["hello\n", *lines[1:]]}
        changed["other"] = [line.replace('"refused": true', '"refused": false') for line in lines]
        generations.write_text("".join(changed[damage]))
    with pytest.raises(js.UserError, match=r"The run in .*bad cannot be compared"):
        js.compare([good, bad])


def judged(directory: Path, refused: np.ndarray, noise: np.ndarray) -> Path:
    """The run in a directory, with labels of `coherence`: what is not refused is noise where `noise` says so."""
    labels = np.where(refused, "refused", np.where(noise, "incoherent", "complied"))
    lines = [json.dumps({"labels": row}) for row in labels.reshape(-1, labels.shape[-1]).tolist()]
    (directory / "labels-coherence.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def test_complied_alone_is_compared_where_both_runs_have_shares(tmp_path: Path) -> None:
    """Two runs with the same refusals, of which one becomes noise beyond the basin and the other harmful."""
    refused = basin(0.2, directions=3)
    names = [f"prompt {39 - i:03d}" for i in range(40)]  # not in alphabetical order
    harmful = judged(write_run(tmp_path / "harmful", refused, AXES, names), refused, np.zeros_like(refused))
    noise = judged(write_run(tmp_path / "noise", refused, AXES, names), refused, np.ones_like(refused))
    comparison = js.compare([harmful, noise])
    numbers = [run.numbers or {} for run in comparison.runs]
    assert numbers[0]["complied_volume"] == numbers[0]["volume"]
    assert numbers[0]["complied_radius"] == numbers[0]["radius"]
    assert numbers[1]["complied_volume"]["value"] == 100
    assert numbers[1]["complied_radius"]["at_least"]
    found = by_number(comparison)
    assert list(found) == [*NUMBERS, *module.COMPLIED]
    assert [found[name].larger_than_noise for name in found] == ["no", "no", "no", "yes", "yes"]
    change = found["complied_volume"]
    assert change.value == pytest.approx(100 - numbers[0]["volume"]["value"])
    assert change.low < change.value < change.high
    assert change.paired == "prompts and directions"
    assert found["complied_radius"].bound == "at least"
    without = write_run(tmp_path / "without", refused, AXES, names)
    comparison = js.compare([harmful, without])
    assert list(by_number(comparison)) == list(NUMBERS)
    assert any(note.startswith("Complied alone is not compared, because one has no") for note in comparison.notes)
    lines = (noise / "labels-coherence.jsonl").read_text().splitlines(keepends=True)
    (noise / "labels-coherence.jsonl").write_text("".join(lines[:-1]))
    assert js.compare([harmful, noise]).runs[1].complied is None, "not all points are judged"
    (noise / "labels-coherence.jsonl").write_text("".join([*lines[:-1], "{}\n"]))
    with pytest.raises(js.UserError, match=r"The run in .*noise cannot be compared"):
        js.compare([harmful, noise])
    wide = judged(
        write_run(tmp_path / "wide", refused[:, ::2], symmetric_axes(1, 10, 0.5), names),
        refused[:, ::2],
        ~refused[:, ::2],
    )
    assert list(by_number(js.compare([harmful, wide]))) == ["radius", "complied_radius"]
