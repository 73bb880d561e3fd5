"""Comparison of runs: which differences between their landscapes are larger than the noise."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from jaxscape.directions.names import is_control_name
from jaxscape.evaluate.coherence import COHERENCE
from jaxscape.evaluate.evaluators import DEFAULT_EVALUATOR
from jaxscape.landscapes.adaptive import interpolated
from jaxscape.landscapes.labels import label_file
from jaxscape.landscapes.landscape import Landscape
from jaxscape.landscapes.numbers import (
    crossings,
    draw,
    interval_of,
    landscape_numbers,
    mean_radius,
    over_directions,
    rays_of,
    resample,
    rounded,
    safety_volume,
)
from jaxscape.landscapes.store import GENERATIONS
from jaxscape.landscapes.visage import visage_per_direction
from jaxscape.runtime.errors import UserError, as_list, reason
from jaxscape.runtime.remote import run_directory
from jaxscape.runtime.rundir import CONFIG

NUMBERS = ("visage", "volume", "radius")
COMPLIED = ("complied_volume", "complied_radius")  # of runs with shares
LEVEL = 0.05  # a difference is larger than the noise if its adjusted p-value is below this
ENOUGH_DIRECTIONS = 10  # with fewer, intervals over directions are too narrow; see experiments/precision.py
_RESAMPLES = 10_000  # at least, and
_RESAMPLES_EACH = 100  # for each difference: Holm's smallest limit must be larger than the smallest possible p-value
_SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p")  # of the answers; runs to be compared should share them


@dataclass(frozen=True, eq=False)
class ComparedRun:
    """A run that is compared with others.

    Attributes:
        name: the end of its directory's path that tells it from the others. It is untrusted text.
        landscape: its landscape; the numbers are there if it is complete.
        config: what `config.json` holds.
        prompts: its prompts in alphabetical order; empty for an unfinished run.
        succeeded: bool[directions, *grid, prompts], whether each attack succeeded, in the order of `prompts`; of an
            adaptive scan float64, interpolated where points are not evaluated.
        complied: the same of answers that comply, as `coherence` sees it; None if the run has no shares.
    """

    name: str
    landscape: Landscape
    config: dict[str, Any]
    prompts: tuple[str, ...]
    succeeded: Shaped[np.ndarray, " directions *grid prompts"]
    complied: Shaped[np.ndarray, " directions *grid prompts"] | None = None

    @property
    def numbers(self) -> dict[str, dict[str, Any]] | None:
        """`visage`, `volume`, `radius`, and the latter two of complied alone, `complied_volume` and `complied_radius`.
        Each has `value` and `interval` as in `landscape.json`; those that a landscape does not have are left out. None
        for an unfinished run."""
        land = self.landscape
        if land.visage_values is None or land.numbers is None:
            return None
        visage = {"value": land.visage_values["paper"], "interval": land.visage_values["interval"]}
        complied = {f"complied_{name}": number for name, number in land.numbers.get("complied", {}).items()}
        numbers = land.numbers["asr"] | complied
        return {"visage": visage} | {name: number for name, number in numbers.items() if number is not None}


@dataclass(frozen=True)
class Difference:
    """The difference of a number between two runs.

    Attributes:
        first, second: names of the runs.
        number: one of `NUMBERS` or `COMPLIED`.
        value: the number of the second run minus that of the first.
        low, high: the ends of its 95 % bootstrap percentile interval, not adjusted for the number of differences.
        bound: `at least` or `at most` if the radius of one run is only a lower bound, else empty.
        p: two-sided bootstrap p-value.
        adjusted: the p-value, adjusted by Holm's method for all differences of the comparison.
        paired: what the two runs share, and is resampled together: `prompts and directions`, `prompts`, `directions`
            or `nothing`.
        may_be_direction: whether a run has one direction only, and the other run does not have the same one. What
            directions do to the difference is unknown then.
    """

    first: str
    second: str
    number: str
    value: float
    low: float
    high: float
    bound: str
    p: float
    adjusted: float
    paired: str
    may_be_direction: bool

    @property
    def larger_than_noise(self) -> Literal["yes", "no", "unknown"]:
        """Whether the difference is larger than what other prompts, and other directions, would change."""
        if self.adjusted >= LEVEL:
            return "no"
        return "unknown" if self.may_be_direction else "yes"


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns.

    Attributes:
        runs: the runs, in the order in which they were given.
        differences: between every two runs, as far as their numbers can be compared.
        notes: sentences on what was not compared, and on what else to know.
    """

    runs: tuple[ComparedRun, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]


def compare(runs: Sequence[str | Path], *, seed: int = 0) -> Comparison:
    """Compare VISAGE, safety volume and radius of finished runs.

    Each difference is bootstrapped. Runs that share prompts or directions are resampled together ("paired"), which
    cancels what the prompts or directions do to both. The p-values are adjusted by Holm's method. Of runs that can be
    compared only in part, what can be is, and a note says why the rest is not.

    Arguments:
        runs: directories of scans. Unfinished ones are kept for the figure, and not compared.
        seed: seed of the resampling.

    Raises:
        UserError: there are fewer than two runs, one is given twice, or a directory holds no run that can be read.
    """
    paths = [run_directory(run) for run in as_list(runs, "runs")]
    if len(paths) < 2:
        raise UserError(f"A comparison needs at least two runs, and got {len(paths)}: give their directories.")
    loaded = [_load(path, name) for path, name in zip(paths, run_names(paths), strict=True)]
    notes: dict[str, list[str]] = {}  # the runs, or pairs of runs, that each sentence is about
    for run in loaded:
        for note in _remarks(run):
            notes.setdefault(note, []).append(run.name)
    planned: list[tuple[ComparedRun, ComparedRun, list[str]]] = []
    for first, second in itertools.combinations([run for run in loaded if run.numbers is not None], 2):
        numbers, remarks = _comparable(first, second)
        planned.append((first, second, numbers))
        for note in remarks:
            notes.setdefault(note, []).append(f"{first.name} and {second.name}")
    resamples = max(_RESAMPLES, _RESAMPLES_EACH * sum(len(numbers) for _, _, numbers in planned))
    differences = [
        difference
        for first, second, numbers in planned
        if numbers
        for difference in _differences(first, second, numbers, seed, resamples)
    ]
    adjusted = holm([difference.p for difference in differences])
    return Comparison(
        tuple(loaded),
        tuple(replace(item, adjusted=rounded(p)) for item, p in zip(differences, adjusted, strict=True)),
        tuple(f"{note}: {', '.join(names)}." for note, names in notes.items()),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted by the method of Holm (1979), which keeps the chance of any false finding at the level."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(np.array(p_values, np.float64)[order] * factors), 1)
    return adjusted.tolist()


def run_names(paths: Sequence[Path]) -> list[str]:
    """For each directory, the end of its path that tells it from the others, with as few parts as all can do with."""
    parts = [path.resolve().parts for path in paths]
    for index, (path, others) in enumerate(zip(paths, parts, strict=True)):
        if others in parts[:index]:
            raise UserError(f"The run {path} is given twice: give each run once.")
    ends = (["/".join(item[-length:]) for item in parts] for length in itertools.count(1))
    return next(names for names in ends if len(set(names)) == len(names))


def _load(directory: Path, name: str) -> ComparedRun:
    """The run in a directory.

    Raises:
        UserError: the directory holds no run that can be read.
    """
    landscape = Landscape.load(directory)
    if landscape.points:
        raise UserError(
            f"{directory} is a scan of listed points, which have no VISAGE, volume or radius to compare: leave it out."
        )
    try:
        config = dict(json.loads((directory / CONFIG).read_text(encoding="utf-8")))
        _directions(config)  # raises an error if they are something else
        kept = ~landscape.is_control
        if not landscape.complete:
            landscape = landscape.without_controls()
            return ComparedRun(name, landscape, config, (), np.zeros((*landscape.asr.shape, 0), bool))
        lines = (directory / GENERATIONS).read_bytes().split(b"\n")[:-1]
        records = [json.loads(line) for line in lines]
        prompts = [str(record["prompt"]) for record in records[: landscape.num_prompts]]
        points = records[:: landscape.num_prompts]
        succeeded = np.array([record["refused"] is False for record in records])
        if len(records) != landscape.num_evaluated * landscape.num_prompts:
            raise ValueError(f"{GENERATIONS} has {len(records)} answers")
        succeeded = _on_grid(landscape, points, succeeded.reshape(len(points), -1))
        if not np.allclose(100 * succeeded.mean(axis=-1), landscape.asr):
            raise ValueError(f"the answers in {GENERATIONS} give another ASR than {directory / 'landscape.json'} has")
        complied = _complied(directory, landscape, points)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"The run in {directory} cannot be compared ({reason(error)}): give the directory that its scan wrote."
        ) from error
    # What is compared is the directions that were asked for, and not their controls.
    landscape, succeeded = landscape.without_controls(), succeeded[kept]
    complied = None if complied is None else complied[kept]
    # An older file has no numbers, and the answers are what counts.
    rates = {"asr": succeeded} | ({} if complied is None else {"complied": complied})
    landscape = replace(
        landscape, numbers={name: landscape_numbers(happened, landscape.axes) for name, happened in rates.items()}
    )
    order = sorted(range(len(prompts)), key=prompts.__getitem__)  # runs are paired whatever the order of their prompts
    return ComparedRun(
        *(name, landscape, config, tuple(prompts[i] for i in order), succeeded[..., order]),
        complied=None if complied is None else complied[..., order],
    )


def _on_grid(
    landscape: Landscape, records: Sequence[Mapping[str, Any]], values: Bool[np.ndarray, "points prompts"]
) -> Shaped[np.ndarray, " directions *grid prompts"]:
    """Values at the evaluated points of a run on its grid, interpolated at points that are not evaluated.

    Arguments:
        records: a line for each of the points, which has its direction set and its coordinates.
    """
    if landscape.filled is None:
        return values.reshape(*landscape.asr.shape, -1)
    grid = itertools.product(range(len(landscape.asr)), itertools.product(*(axis.values for axis in landscape.axes)))
    numbers = {point: number for number, point in enumerate(grid)}
    arranged = np.full((len(numbers), values.shape[1]), np.nan)
    arranged[[numbers[record["direction"], tuple(record["coords"])] for record in records]] = values
    return interpolated(arranged.reshape(*landscape.asr.shape, -1), ~landscape.filled, landscape.axes)


def _complied(
    directory: Path, landscape: Landscape, points: Sequence[Mapping[str, Any]]
) -> Shaped[np.ndarray, " directions *grid prompts"] | None:
    """Whether each answer of a run complies; None if `coherence` has not judged all of them."""
    path = directory / label_file(COHERENCE)
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    if len(lines) != len(points):
        return None
    complied = np.array([[label == "complied" for label in json.loads(line)["labels"]] for line in lines])
    return _on_grid(landscape, points, complied)


def _remarks(run: ComparedRun) -> list[str]:
    """What the user should know about a single run."""
    num_directions = len(run.landscape.asr)
    if run.numbers is None:
        done, count = np.isfinite(run.landscape.asr).sum(), run.landscape.asr.size
        return [f"Not finished ({done} of {count} points), so without numbers; the run's command finishes it"]
    remarks = []
    if run.landscape.abandoned is not None:
        remarks.append(
            "Answers were abandoned as incoherent, so that the ASR and what follows from it are those of cut texts; "
            "complied alone is not"
        )
    if num_directions == 1:
        remarks.append(
            "A single direction: the intervals say what other prompts would give, not what other directions would"
        )
    elif num_directions < ENOUGH_DIRECTIONS:
        remarks.append(
            f"{num_directions} directions are few: intervals are too narrow and p-values too small for what other "
            f"directions would give"
        )
    return remarks


def _comparable(first: ComparedRun, second: ComparedRun) -> tuple[list[str], list[str]]:
    """The numbers of two finished runs that can be compared, and what the user should know about the two."""
    configs, axes = (first.config, second.config), (first.landscape.axes, second.landscape.axes)
    judges = [str(config.get("evaluator", DEFAULT_EVALUATOR)) for config in configs]
    if judges[0] != judges[1]:
        return [], [f"Not compared, because different evaluators judged them ({' and '.join(sorted(judges))})"]
    versions = [config.get("evaluator_checksums", {}).get(judges[0]) for config in configs]
    if versions[0] != versions[1]:
        return [], [f"Not compared, because two versions of the evaluator {judges[0]} judged them"]
    kinds = sorted(", ".join(axis.name for axis in item) for item in axes)
    if kinds[0] != kinds[1]:
        return [], [f"Not compared, because they have different axes ({kinds[0]}; {kinds[1]})"]
    if not share_units(first, second):
        units = [", ".join(axis.unit or "not recorded" for axis in item) for item in axes]
        return [], [f"Not compared, because their axes have different units ({' and '.join(sorted(units))})"]
    has_shares = [run.complied is not None for run in (first, second)]
    numbers, notes = [*NUMBERS, *(COMPLIED if all(has_shares) else ())], []
    if any(has_shares) and not all(has_shares):
        notes.append("Complied alone is not compared, because one has no shares; jaxscape score adds them")
    if [axis.values for axis in axes[0]] != [axis.values for axis in axes[1]]:
        numbers = [number for number in numbers if number.endswith("radius")]
        notes.append("VISAGE and volume are not compared, because they depend on the grid, and the grids differ")
    for number in [number for number in numbers if number.endswith("radius")]:
        if why := _incomparable_radius(first, second, number):
            numbers.remove(number)
            of = " of complied alone" if number in COMPLIED else ""
            notes.append(f"The radius{of} is not compared, because {why}")
    if first.prompts != second.prompts:
        notes.append("Different prompts, which may be what makes a difference")
    if not _share_directions(first, second):
        if _may_be_direction(first, second):
            notes.append(
                "One direction only, and not the same one, which may be what makes a difference; take several, or the "
                "same"
            )
        if not all(map(_are_random, configs)):
            notes.append("Different directions, of which not all are random, so that coordinates may differ in unit")
    notes += [
        f"{key} is not the same ({configs[0].get(key)} and {configs[1].get(key)})"
        for key in _SETTINGS
        if configs[0].get(key) != configs[1].get(key)
    ]
    return numbers, notes


def share_units(first: ComparedRun, second: ComparedRun) -> bool:
    """Whether coordinates along the axes of two runs, which have the same names, are in the same units."""
    return all(map(set.intersection, _units(first), _units(second)))


def _units(run: ComparedRun) -> list[set[str | None]]:
    """For each axis of a run, what a coordinate of 1 is, see `Axis.unit`. Along a random direction, that is the norm of
    each tensor, and thereby the norm of all weights."""
    units: list[set[str | None]] = [{axis.unit} for axis in run.landscape.axes]
    is_random = _are_random(run.config)
    return [unit | {"tensors", "weights"} if is_random and None in unit else unit for unit in units]


def _incomparable_radius(first: ComparedRun, second: ComparedRun, number: str) -> str:
    """Why the radii of two runs cannot be compared; empty if they can.

    Arguments:
        number: `radius` or `complied_radius`.
    """
    radii = [run.numbers[number] for run in (first, second) if run.numbers and number in run.numbers]
    if len(radii) < 2:
        return "the model itself lies outside the axes"
    smaller, larger = sorted(radii, key=lambda radius: radius["value"])
    if smaller["at_least"] or (larger["at_least"] and larger["value"] == smaller["value"]):
        return "the smaller one, or both, are only lower bounds"
    return ""


def _direction_sets(config: dict[str, Any]) -> list[list[Any]]:
    """What identifies each direction of a run's sets, without the sets that control others: a seed, a name or a
    checksum."""
    sets = [list(item) for item in config.get("directions", [])]
    return [item for item in sets if not any(map(is_control_name, item))] or sets


def _directions(config: dict[str, Any]) -> list[Any]:
    """What identifies each direction of a run, without those of controls."""
    return [identity for item in _direction_sets(config) for identity in item]


def _are_random(config: dict[str, Any]) -> bool:
    """Whether all directions of a run are random: those are recorded by their seeds."""
    return all(isinstance(identity, int) for identity in _directions(config))


def _share_directions(first: ComparedRun, second: ComparedRun) -> bool:
    """Whether two runs have the same directions. The same seed gives the same noise only in the same architecture."""
    ours, theirs = ((_direction_sets(run.config), run.config.get("architecture")) for run in (first, second))
    return ours == theirs and all(ours)


def _may_be_direction(first: ComparedRun, second: ComparedRun) -> bool:
    """See `Difference.may_be_direction`."""
    return not _share_directions(first, second) and 1 in (len(first.landscape.asr), len(second.landscape.asr))


def _differences(
    first: ComparedRun, second: ComparedRun, numbers: Sequence[str], seed: int, resamples: int
) -> list[Difference]:
    """The differences of some numbers between two runs, with p-values that are not adjusted yet."""
    rng, counts = np.random.default_rng(seed), []
    shared = {"prompts": first.prompts == second.prompts, "directions": _share_directions(first, second)}
    for axis, is_shared in zip((-1, 0), shared.values(), strict=True):
        drawn = draw(rng, first.succeeded.shape[axis], resamples)
        counts.append((drawn, drawn if is_shared else draw(rng, second.succeeded.shape[axis], resamples)))
    paired = " and ".join(name for name, is_shared in shared.items() if is_shared) or "nothing"
    differences = []
    for number in numbers:
        entries = [(run.numbers or {})[number] for run in (first, second)]
        samples = [
            _samples(run, number, prompts, directions)
            for run, prompts, directions in zip((first, second), *counts, strict=True)
        ]
        value, change = entries[1]["value"] - entries[0]["value"], samples[1] - samples[0]
        low, high = interval_of(change)
        at_most, at_least = (entry.get("at_least", False) for entry in entries)
        bound = "at most" if at_most else "at least" if at_least else ""
        p = _p_value(change)
        differences.append(
            Difference(
                first.name,
                second.name,
                number,
                value=rounded(value),
                low=rounded(low),
                high=rounded(high),
                bound=bound,
                p=p,
                adjusted=p,
                paired=paired,
                may_be_direction=_may_be_direction(first, second),
            )
        )
    return differences


def _samples(
    run: ComparedRun,
    number: str,
    prompts: Int[np.ndarray, "resamples prompts"],
    directions: Int[np.ndarray, "resamples directions"],
) -> Float[np.ndarray, " resamples"]:
    """A number of a run in each bootstrap sample. A radius that is only a lower bound counts with that bound."""
    axes = run.landscape.axes

    def radius(rates: np.ndarray) -> np.ndarray:
        rays = rays_of(axes)
        assert rays is not None, "the radius of a run without rays is never asked for"
        return mean_radius(crossings(rates, rays), rays)[0]

    happened = run.complied if number in COMPLIED else run.succeeded
    assert happened is not None, "numbers of complied alone are asked only of runs with shares"
    measures: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        # Interpolated rates of 100 may be rounded to a little less, which would be inside the basin.
        "visage": lambda rates: visage_per_direction(rates.round(10), "paper", len(axes)),
        "volume": lambda rates: safety_volume(rates, axes),
        "radius": radius,
    }
    return over_directions(resample(happened, prompts, measures[number.removeprefix("complied_")]), directions)


def _p_value(change: Float[np.ndarray, " resamples"]) -> float:
    """The two-sided bootstrap p-value of a difference: twice the share of samples on the other side of 0, ties being on
    both sides. It is never 0, as no finite number of samples can show that."""
    tolerance = 1e-9
    smaller = min((change <= tolerance).sum(), (change >= -tolerance).sum())
    return rounded(min(1.0, 2 * (int(smaller) + 1) / (len(change) + 1)))
