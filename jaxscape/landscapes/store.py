"""The directory of a scan: each finished point is on disk before the next one begins.

`generations.jsonl` is the only state of a run. Each of its lines is the answer to one prompt at one point. It grows by
whole points in a fixed order. When a run is resumed, the points whose lines are all there are kept, and what a killed
process wrote after them is cut off. `landscape.json`, figures and tables are computed from it and from the labels.

`labels-NAME.jsonl` keeps what an evaluator said of each answer, so that no answer is judged twice. What
is missing there is judged from the generations.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxscape.directions.kinds import Given
from jaxscape.directions.random import Random
from jaxscape.engine.scheduler import Completion
from jaxscape.evaluate.base import Evaluator, Label
from jaxscape.evaluate.evaluators import DEFAULT_EVALUATOR
from jaxscape.evaluate.statistics import wilson_interval
from jaxscape.finetuning import trajectory
from jaxscape.landscapes import landscape
from jaxscape.landscapes.adaptive import interpolated, next_points
from jaxscape.landscapes.axes import Axis
from jaxscape.landscapes.labels import EARLIER_LABEL_FILES, LABEL_FILES, EarlierLabels, LabelBook, Point, Rates
from jaxscape.landscapes.landscape import FIGURE, Landscape
from jaxscape.landscapes.shards import Shard
from jaxscape.runtime import reporting, rundir
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import append_json_lines, cut_after, to_json_lines, whole_lines, write_whole
from jaxscape.runtime.processes import from_first

GENERATIONS, PROMPTS = "generations.jsonl", "prompts.jsonl"
COHERENCE_FILE = "coherence.json"
EXPORTED = (
    "landscape.eval",
    "points.csv",
    "points.parquet",
    "generations.csv",
    "generations.parquet",
    "landscaper-*.npz",
    "hub",
)
"""What `jaxscape export` writes, beside `output*.jsonl`."""
SCAN = rundir.RunKind(
    "scan",
    state=GENERATIONS,
    marks=frozenset({"weights", "directions", "axes"}),
    computed=(
        landscape.FILE_NAME,
        FIGURE,
        "landscape-*.png",
        trajectory.FILE_NAME,
        "output*.jsonl",
        *EXPORTED,
        *reporting.FOLDERS,
        "report.html",
        LABEL_FILES,
        EARLIER_LABEL_FILES,
        COHERENCE_FILE,
    ),
    descriptive=frozenset({"direction_names", "direction_files", "interpolate_to"}),  # checksums identify directions,
)

Adaptive = Literal["asr", "shares"]
"""What decides which points of a grid are evaluated: the ASR, or also the share of the answers that comply."""

Record = Mapping[str, Any]
"""A line of `generations.jsonl`."""


@dataclass(frozen=True)
class Earlier:
    """What is known of a run's points before it begins, because it extends another one.

    Attributes:
        answers: for points, the lines of the answers to the first prompts.
        labels: what evaluators said of the answers to the first prompts.
        software: what has computed them, see `rundir.SOFTWARE`.
    """

    answers: Mapping[Point, Sequence[Record]] = field(default_factory=dict)
    labels: EarlierLabels = field(default_factory=dict)
    software: Any = None


class Run:
    """The points of a scan and their outcomes, in the order in which they are evaluated.

    Attributes:
        axes: the axes of the grid; none if the points are a list.
        coords: the points of each direction set, if they are a list; empty for a grid.
        adaptive: what decides which points of the grid are evaluated; None if all are.
        points: the points, direction set by direction set; the last axis varies fastest. Of an adaptive scan, those
            that were chosen so far, see `extend`; of a shard, its part.
        is_whole: whether all points are chosen.
        num_done: how many points are evaluated; they are the first ones.
        refused: bool[points, prompts], whether each answer counts as a refusal; only for evaluated points.
        finite: bool[points, prompts], False if an answer met a NaN or infinite logit; only for evaluated points.
        unanswered: bool[points, prompts], whether a text has thinking in it and no answer; only for evaluated points.
        abandoned: bool[points, prompts], whether an answer was ended because its beginning makes no sense; only for
            evaluated points.
        labels: what evaluators said of the answers at the evaluated points.
        evaluator: name of the evaluator that decides the ASR.
        directions: see `Landscape.directions`.
        directory: the run's directory; None if it has none, and in every process but the first.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        num_sets: int,
        prompts: Sequence[str],
        out: tuple[Path, BinaryIO] | None = None,
        evaluator: str = DEFAULT_EVALUATOR,
        coords: Sequence[tuple[float, ...]] = (),
        adaptive: Adaptive | None = None,
        directions: Sequence[Sequence[str]] = (),
        earlier: Earlier | None = None,
        shard: Shard | None = None,
    ) -> None:
        """Restore what is in the directory.

        Arguments:
            out: the run's directory, and its state file; None keeps the run in memory.
            num_sets: the number of direction sets.
            earlier: what is known already; None if the run extends no other one.
            shard: the part of the points that are evaluated; None for all.

        The other arguments are the attributes of the same names.
        """
        self.axes, self.coords, self.prompts = tuple(axes), tuple(coords), tuple(prompts)
        self._shape = (num_sets, *([len(axis.values) for axis in axes] or [len(coords)]))
        grid = self.coords or itertools.product(*(axis.values for axis in axes))
        self._all: list[Point] = list(itertools.product(range(num_sets), grid))
        self._earlier = earlier or Earlier()
        self.adaptive, self.is_whole = adaptive, adaptive is None
        self._start, stop = (0, len(self._all)) if shard is None else (shard.start, shard.stop)
        self.points: list[Point] = [] if adaptive else self._all[self._start : stop]
        self.num_done = 0
        self.refused = np.zeros((len(self._all), len(prompts)), bool)
        self.finite = np.ones((len(self._all), len(prompts)), bool)
        self.unanswered = np.zeros((len(self._all), len(prompts)), bool)
        self.abandoned = np.zeros((len(self._all), len(prompts)), bool)
        self._out, self.evaluator, self.directions = out, evaluator, directions
        self.directory = None if out is None else out[0]
        self._unwritten: list[list[dict[str, Any]]] = []  # the lines of a run without a directory, point by point
        self.labels = LabelBook(self.points, len(prompts), self.directory)
        if out is not None:
            self._restore(*out)
            self.labels.restore(self.num_done)
        self.labels.earlier |= self._earlier.labels

    def extend(self) -> bool:
        """Add the points of the next round of an adaptive scan to `points`; return whether there are any.

        The evaluators that decide have judged all points so far.
        """
        if self.adaptive is not None and self.num_done == len(self.points):
            wanted = self._next_points()
            self.points += [point for point, is_wanted in zip(self._all, wanted.flat, strict=True) if is_wanted]
            self.is_whole = not wanted.any()
            self.save()
        return self.num_done < len(self.points)

    def _next_points(self) -> Bool[np.ndarray, " directions *grid"]:
        rates = [1.0 - self.refused[: self.num_done]]
        if self.adaptive == "shares" and len(complied := self.labels.complied()) == self.num_done:
            rates.append(complied.astype(np.float64))
        return next_points(np.stack(list(map(self._on_grid, rates))), self._evaluated(), self.axes)

    def known(self, point: Point) -> Sequence[Record]:
        """The lines of the answers at a point that are known before it is evaluated, those to the first prompts."""
        return self._earlier.answers.get(point, ())

    @property
    def num_known(self) -> int:
        """The number of answers that are known before their points are evaluated."""
        return sum(map(len, self._earlier.answers.values()))

    def append(
        self, records: Sequence[Record], labels: Iterable[tuple[Evaluator, Sequence[Label | None]]] = ()
    ) -> None:
        """Add the answers and verdicts of the next point, and write them to disk.

        Arguments:
            records: a line for each prompt.
            labels: the labels that are to be kept, with the evaluators that gave them.
        """
        self._add(records)
        if self._out is None:
            self._unwritten.append([dict(record) for record in records])
        else:
            append_json_lines(self._out[1], records)
        for evaluator, given in labels:
            self.labels.append(evaluator, given)
        self.save()

    def save(self) -> None:
        """Write `landscape.json`, if the run has a directory."""
        if self._out is not None:
            self.landscape().save(self._out[0])

    def records(self, start: int) -> list[list[dict[str, Any]]]:
        """The lines of `generations.jsonl`, point by point, from the evaluated point number `start` on."""
        if self._out is None:
            return self._unwritten[start:]
        lines, size = whole_lines(self._out[1]), len(self.prompts)
        return [list(map(json.loads, lines[size * i : size * (i + 1)])) for i in range(start, self.num_done)]

    def landscape(self) -> Landscape:
        """The landscape of the points that are evaluated so far."""
        done, complied = slice(self.num_done), self.labels.complied()
        evaluated = self._evaluated()
        is_finished = self.is_whole and self.num_done == len(self.points)
        return Landscape.from_outcomes(
            self.axes,
            refused=self._filled(self.refused[done].astype(np.float64)),
            nonfinite=self._counts(~self.finite),
            evaluated=evaluated if self.adaptive is None else evaluated | is_finished,
            unanswered=self._counts(self.unanswered),
            abandoned=self._counts(self.abandoned) if self.abandoned.any() else None,
            measures={name: self._filled_rates(rates) for name, rates in self.labels.measures().items()},
            shares=self._filled_rates(self.labels.shares()),
            complied=self._filled(complied.astype(np.float64)) if len(complied) == len(self.points) > 0 else None,
            disagreement={
                pair: self._filled_rates(rates)
                for pair, rates in self.labels.disagreement(self.evaluator, self.refused[done]).items()
            },
            points=self.coords,
            directions=self.directions,
            filled=~evaluated if self.adaptive and is_finished else None,
        )

    def _evaluated(self) -> Bool[np.ndarray, " directions *grid"]:
        """Which points are evaluated."""
        evaluated = np.zeros(len(self._all), bool)
        evaluated[self._places(self.num_done)] = True
        return evaluated.reshape(self._shape)

    def _places(self, count: int) -> list[int]:
        """The numbers of the first `count` points among all points of the grid or list."""
        if self.adaptive is None:
            return list(range(self._start, self._start + count))
        places = {point: place for place, point in enumerate(self._all)}
        return [places[point] for point in self.points[:count]]

    def _counts(self, happened: Bool[np.ndarray, "points prompts"]) -> Int[np.ndarray, " directions *grid"]:
        """At how many prompts something happened; 0 where nothing was evaluated."""
        counts = np.zeros(len(self._all), np.int64)
        counts[self._places(self.num_done)] = happened[: self.num_done].sum(axis=1)
        return counts.reshape(self._shape)

    def _on_grid(self, values: Float[np.ndarray, " points *rest"]) -> Float[np.ndarray, " *grid_and_rest"]:
        """Values at the first evaluated points, in the shape of the landscape's arrays; NaN at all other points."""
        arranged = np.full((len(self._all), *values.shape[1:]), np.nan)
        arranged[self._places(len(values))] = values
        return arranged.reshape(*self._shape, *values.shape[1:])

    def _filled(self, values: Float[np.ndarray, " points *rest"]) -> Float[np.ndarray, " *grid_and_rest"]:
        """The same; in a finished adaptive scan, points that are not evaluated are interpolated."""
        arranged = self._on_grid(values)
        if self.adaptive is None or not self.is_whole or len(values) < len(self.points):
            return arranged
        return interpolated(arranged, self._evaluated(), self.axes)

    def _filled_rates(self, rates: Rates) -> dict[str, Float[np.ndarray, " directions *grid"]]:
        """Rates and the ends of their intervals in the shape of the landscape's arrays. A rate that is interpolated has
        Wilson's interval at that rate, as an interpolated ASR has."""
        filled = {name: self._filled(values) for name, values in rates.items()}
        if self.adaptive is not None and self.is_whole:
            skipped = ~self._evaluated()
            for name in rates.keys() - {f"{name}{end}" for name in rates for end in ("_low", "_high")}:
                ends = wilson_interval(filled[name][skipped], len(self.prompts))
                filled[f"{name}_low"][skipped], filled[f"{name}_high"][skipped] = ends
        return filled

    def outcomes(self) -> dict[str, Any]:
        """The outcomes of the evaluated points."""
        earlier = self.labels.earlier.items()
        return {
            "arrays": [array[: self.num_done].tolist() for array in self._arrays],
            "labels": [self.labels.rows, self.labels.checksums],
            "points": self.points if self.adaptive else None,
            "answers": list(self._earlier.answers.items()),
            "earlier": [(name, point, *said) for name, points in earlier for point, said in points.items()],
        }

    def set_outcomes(self, outcomes: dict[str, Any]) -> None:
        """Replace the outcomes by those that `outcomes` returned in another process."""
        self.num_done = len(outcomes["arrays"][0])
        self.labels.rows, self.labels.checksums = outcomes["labels"]
        if self.adaptive:
            self.points[:] = map(_as_point, outcomes["points"])
        self._earlier = Earlier({_as_point(point): records for point, records in outcomes["answers"]})
        for name, point, checksum, labels in outcomes["earlier"]:
            self.labels.earlier.setdefault(name, {})[_as_point(point)] = (checksum, labels)
        if self.num_done:
            for array, values in zip(self._arrays, outcomes["arrays"], strict=True):
                array[: self.num_done] = values

    @property
    def _arrays(self) -> tuple[Bool[np.ndarray, "points prompts"], ...]:
        """The outcomes of all points."""
        return self.refused, self.finite, self.unanswered, self.abandoned

    def _add(self, records: Sequence[Record]) -> None:
        self.refused[self.num_done] = [record["refused"] for record in records]
        self.finite[self.num_done] = [record.get("finite", True) for record in records]
        self.unanswered[self.num_done] = [record.get("unanswered", False) for record in records]
        self.abandoned[self.num_done] = [record.get("abandoned", False) for record in records]
        self.num_done += 1

    def _restore(self, directory: Path, file: BinaryIO) -> None:
        """Read the points whose lines are all in the file, and cut off what follows them."""
        lines, num_prompts = whole_lines(file), len(self.prompts)
        num_whole = len(lines) // num_prompts
        lines = lines[: num_whole * num_prompts]
        try:
            records = [json.loads(line) for line in lines]
            if self.adaptive:
                self.points += self._chosen(records[::num_prompts])
            expected = itertools.product(self.points[:num_whole], self.prompts)
            for record, ((index, coords), prompt) in zip(records, expected, strict=True):
                if (record["direction"], record["coords"], record["prompt"]) != (index, list(coords), prompt):
                    raise ValueError(
                        f"a line that should be for {list(coords)} is for {record['coords']}, "
                        f"or for another direction or prompt"
                    )
            for start in range(0, len(records), num_prompts):
                self._add(records[start : start + num_prompts])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{directory / GENERATIONS} is damaged ({reason(error)}): start over with --overwrite."
            ) from error
        cut_after(file, lines)

    def _chosen(self, records: Sequence[Record]) -> list[Point]:
        """The points of an adaptive scan that these lines are for.

        Raises:
            ValueError: one is no point of the grid, or is there twice.
        """
        chosen = list(map(point_of, records))
        if len({*chosen} & {*self._all}) < len(chosen):
            raise ValueError("a point is there twice, or is not on the grid")
        return chosen


def point_of(record: Record) -> Point:
    """The point that a line of `generations.jsonl` is for."""
    return record["direction"], tuple(record["coords"])


def answers_by_point(lines: Sequence[bytes], prompts: Sequence[str]) -> dict[Point, list[Record]]:
    """The lines of `generations.jsonl` for each point, in their order, one for each prompt. Those of a last point that
    are not all there are left out.

    Raises one of several exceptions if a line is damaged, or is not that of its point and prompt.
    """
    answers: dict[Point, list[Record]] = {}
    size = len(prompts)
    for start in range(0, len(lines) - size + 1, size):
        records = [json.loads(line) for line in lines[start : start + size]]
        point = point_of(records[0])
        if [(point_of(record), record["prompt"]) for record in records] != [(point, prompt) for prompt in prompts]:
            raise ValueError(f"lines that should be for one point, {list(point[1])}, are for other points or prompts")
        answers[point] = records
    return answers


def _as_point(values: Sequence[Any]) -> Point:
    """A point from the lists that it becomes in JSON."""
    index, coords = values
    return index, tuple(coords)


def points_of(config: Mapping[str, Any]) -> list[Point]:
    """All points that a scan with this configuration may evaluate, in their order; those of a shard are a part of them.

    Raises one of several exceptions if it is no configuration of a scan.
    """
    grid = config.get("points") or itertools.product(*(axis["values"] for axis in config["axes"]))
    coords = [tuple(map(float, values)) for values in grid]
    return list(itertools.product(range(len(config["directions"])), coords))


def records_of(
    point: Point,
    prompts: Sequence[str],
    completions: Sequence[Completion],
    refused: Sequence[bool],
    unanswered: Sequence[bool],
) -> list[dict[str, Any]]:
    """The lines of `generations.jsonl` for the answers to prompts at a point.

    Arguments:
        unanswered: whether each text has thinking in it and no answer.
    """
    index, coords = point
    return [
        {
            "direction": index,
            "coords": list(coords),
            "prompt": prompt,
            "generation": completion.text,
            "refused": verdict,
            **({} if completion.finite else {"finite": False}),
            **({"unanswered": True} if has_no_answer else {}),
            **({"cut": True} if completion.cut else {}),
            **({"abandoned": True} if completion.abandoned else {}),
        }
        for prompt, completion, verdict, has_no_answer in zip(prompts, completions, refused, unanswered, strict=True)
    ]


@contextmanager
def open_run(
    directory: Path | None,
    config: Mapping[str, Any],
    axes: Sequence[Axis],
    num_sets: int,
    prompts: Sequence[str],
    sent: Sequence[str],
    overwrite: bool = False,
    coords: Sequence[tuple[float, ...]] = (),
    adaptive: Adaptive | None = None,
    earlier: Earlier | None = None,
    advice: str = "",
) -> Iterator[Run]:
    """Start a run in a directory, or resume the one that is there; see `rundir.open_run_directory`.

    Arguments:
        directory: None keeps the run in memory only.
        sent: for each prompt, the text that the model is given.
        coords, adaptive: see `Run`.
        earlier: what is known already; None if the run extends no other one.
        advice: see `rundir.open_run_directory`.
    """
    start = partial(
        Run,
        axes,
        num_sets,
        prompts,
        evaluator=config.get("evaluator", DEFAULT_EVALUATOR),
        coords=coords,
        adaptive=adaptive,
        directions=_shown_names(config),
        earlier=earlier,
        shard=Shard.read(config),
    )
    config = config if earlier is None else {**config, rundir.SOFTWARE: earlier.software}
    with rundir.open_run_directory(directory, config, SCAN, overwrite, advice) as file:
        if directory is None or file is None:
            run = start()
        else:
            pairs = ({"prompt": prompt, "sent": text} for prompt, text in zip(prompts, sent, strict=True))
            write_whole(directory / PROMPTS, to_json_lines(pairs))
            run = start(out=(directory, file))
            run.save()
        run.set_outcomes(from_first(run.outcomes))
        yield run


@contextmanager
def reopen_run(directory: Path) -> Iterator[tuple[Run, list[str]]]:
    """A finished run, to which nothing but labels is added, and the texts that the model was given for its prompts.

    Raises:
        UserError: the directory holds no finished scan, or another process is running in it.
    """
    with rundir.reopen_run_directory(directory, SCAN) as (config, file):
        try:
            pairs = read_prompts(directory)
            prompts, sent = ([pair[key] for pair in pairs] for key in ("prompt", "sent"))
            axes = list(map(Axis.read, config["axes"]))
            coords = [tuple(point) for point in config.get("points", ())]
            num_sets, evaluator = len(config["directions"]), str(config.get("evaluator", DEFAULT_EVALUATOR))
            shard = Shard.read(config)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"The run in {directory} cannot be read ({reason(error)}).") from error
        run = Run(
            *(axes, num_sets, prompts, (directory, file), evaluator, coords, config.get("adaptive")),
            directions=_shown_names(config),
            shard=shard,
        )
        # An adaptive scan by shares chooses its next points from the labels of `coherence`, so it needs all of them.
        is_judged = run.adaptive != "shares" or len(run.labels.complied()) == run.num_done
        if not is_judged or run.extend():
            raise UserError(f"The run in {directory} is not finished; run its command again to finish it first.")
        yield run, sent


def read_prompts(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's `prompts.jsonl`. Raises an `OSError` or a `ValueError` if it cannot be read."""
    return [json.loads(line) for line in (directory / PROMPTS).read_bytes().split(b"\n")[:-1]]


def _shown_names(config: Mapping[str, Any]) -> list[list[str]]:
    """The names of the directions of each set, if one of them says more than that it is random or was given."""
    names = [list(map(str, item)) for item in config.get("direction_names", [])]
    is_shown = any(name != Given.name and not name.startswith(f"{Random.kind}:") for item in names for name in item)
    return names if is_shown else []
