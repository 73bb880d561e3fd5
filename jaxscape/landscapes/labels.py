"""The labels of a run's answers: for each evaluator, a file in the run's directory with a line for each point.

A run that was extended may have labels that an evaluator gave before, of some of its points or for the first prompts
only. They are kept in a file of their own until that evaluator has judged the rest.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxscape.evaluate.base import LABELS, REFUSALS, Evaluator, Label, checksum_of
from jaxscape.evaluate.coherence import COHERENCE
from jaxscape.evaluate.statistics import wilson_interval
from jaxscape.landscapes.landscape import SHARES
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import append_json_lines, cut_after, to_json_lines, whole_lines, write_whole

LABEL_FILES, EARLIER_LABEL_FILES = "labels-*.jsonl", "earlier-labels-*.jsonl"
UNJUDGED = "unjudged"
"""What stands in measures for answers that an evaluator could not judge. In the label files they are null."""

Rates = dict[str, Float[np.ndarray, " _"]]
"""Shares in percent and the ends of their 95 % intervals, by name, at the first evaluated points."""

Point = tuple[int, tuple[float, ...]]
"""The index of a direction set, and coordinates along its directions."""

EarlierLabels = dict[str, dict[Point, tuple[str | None, list[Label | None]]]]
"""For evaluators, by name, and points: the evaluator's checksum, and its labels of the answers to the first prompts."""


class LabelBook:
    """What evaluators said of the answers at a run's points, in the order of the points.

    Attributes:
        earlier: what evaluators said before the run was extended.
        rows: for each evaluator, by name, the labels at the first points: a list for each point. None stands for an
            answer that the evaluator could not judge.
        checksums: for each evaluator, by name, its checksum; None if it has none.
    """

    def __init__(self, points: Sequence[Point], num_prompts: int, directory: Path | None = None) -> None:
        self.rows: dict[str, list[list[Label | None]]] = {}
        self.earlier: EarlierLabels = {}
        self._points, self._num_prompts, self._directory = points, num_prompts, directory
        self.checksums: dict[str, str | None] = {}

    def restore(self, num_points: int, cut: bool = True) -> None:
        """Read the files of all evaluators. What lies behind the first `num_points` points, or is half a line, is cut
        off.

        Arguments:
            cut: whether it is also cut off in the files; if not, the files stay as they are, and are only read.

        Raises:
            UserError: a file cannot be read or is damaged.
        """
        if self._directory is None:
            return
        self.earlier = read_labels(self._directory, EARLIER_LABEL_FILES)
        for path in sorted(self._directory.glob(LABEL_FILES)):
            try:
                with path.open("r+b" if cut else "rb") as file:
                    lines = whole_lines(file)[:num_points]
                    for index, record in enumerate(map(json.loads, lines)):
                        self._check(path, index, record)
                        version = record.get("checksum")
                        if self.checksums.setdefault(record["evaluator"], version) != version:
                            raise ValueError("its lines are from two versions of the evaluator")
                        self.rows.setdefault(record["evaluator"], []).append(record["labels"])
                    if cut:
                        cut_after(file, lines)
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise _damaged(path, error) from error

    def count(self, evaluator: Evaluator) -> int:
        """At how many points the evaluator has judged the answers; they are the first ones.

        Raises:
            UserError: what is there was given by another version of the evaluator.
        """
        name = evaluator.name
        if name in self.rows and self.checksums.get(name) != checksum_of(evaluator):
            raise UserError(
                f"{self._path(name)} has labels from another version of {name!r}: delete it to judge again."
            )
        return len(self.rows.get(name, ()))

    def known(self, evaluator: Evaluator, number: int) -> list[Label | None]:
        """What this version of the evaluator said, before the run was extended, of the answers to the first prompts at
        the point of this number."""
        checksum, labels = self.earlier.get(evaluator.name, {}).get(self._points[number], (None, []))
        return labels if checksum == checksum_of(evaluator) else []

    def missing(self, evaluator: Evaluator, num_points: int) -> list[int]:
        """The numbers of those of the first `num_points` points at which the evaluator has answers left to judge."""
        numbers = range(self.count(evaluator), num_points)
        return [number for number in numbers if len(self.known(evaluator, number)) < self._num_prompts]

    def append(self, evaluator: Evaluator, labels: Sequence[Label | None]) -> None:
        """Add an evaluator's labels at the next point, one for each prompt, and write them to disk."""
        point = self._points[self.count(evaluator)]
        checksum = checksum_of(evaluator)
        self.checksums[evaluator.name] = checksum
        self.rows.setdefault(evaluator.name, []).append(list(labels))
        if self._directory is not None:
            with self._path(evaluator.name).open("ab") as file:
                append_json_lines(file, [_line(evaluator.name, checksum, point, labels)])

    def keep_earlier(self, num_points: int) -> None:
        """Write the earlier labels of evaluators that have not judged all of the first `num_points` points yet to
        files, and delete such files of the others."""
        assert self._directory is not None
        for name, points in self.earlier.items():
            path = self._directory / label_file(name, EARLIER_LABEL_FILES)
            if len(self.rows.get(name, ())) < num_points:
                lines = [_line(name, checksum, point, labels) for point, (checksum, labels) in points.items()]
                write_whole(path, to_json_lines(lines))
            else:
                path.unlink(missing_ok=True)

    def measures(self) -> dict[str, Rates]:
        """For each evaluator, by name, the share of each label at the points that it has judged, and as `unjudged` that
        of the answers which it could not judge. What an evaluator never gave is left out, apart from `refused` and
        `complied`. What `coherence` gave is in `shares` instead.
        """
        return {name: self._measure(rows) for name, rows in sorted(self.rows.items()) if name != COHERENCE}

    def shares(self) -> Rates:
        """The shares of `refused`, `complied` and `incoherent` answers at the points that `coherence` has judged; empty
        if it has judged nothing."""
        rows = self.rows.get(COHERENCE, [])
        shares: Rates = {}
        sizes = np.full(len(rows), self._num_prompts)
        for kind in SHARES if rows else ():
            shares |= _rates(kind, np.array([row.count(kind) for row in rows]), sizes)
        return shares

    def complied(self) -> Bool[np.ndarray, "points prompts"]:
        """Whether each answer complies, as `coherence` sees it, at the points that it has judged."""
        rows = self.rows.get(COHERENCE, [])
        return (np.array(rows, object) == "complied").reshape(len(rows), self._num_prompts)

    def _measure(self, rows: Sequence[Sequence[Label | None]]) -> Rates:
        measure: Rates = {}
        for label in (*LABELS, None):
            counts = np.array([row.count(label) for row in rows], int)
            if label in ("refused", "complied") or counts.any():
                measure |= _rates(label or UNJUDGED, counts, np.full_like(counts, self._num_prompts))
        return measure

    def disagreement(self, first: str, refused: Bool[np.ndarray, "points prompts"]) -> dict[str, Rates]:
        """For each pair of evaluators, `A / B`: the share of the answers that one of them takes for a refusal and the
        other does not, as `differ`, with its 95 % interval, at the points that both have judged. Answers that one of
        them could not judge do not count.

        Arguments:
            first: name of the evaluator that decides the ASR.
            refused: bool[evaluated points, prompts], what it said.
        """
        said = {first: np.where(refused, 1.0, 0.0)}
        said |= {name: _refusals(rows) for name, rows in self.rows.items() if name != COHERENCE}
        result = {}
        for a, b in itertools.combinations([first, *sorted(said.keys() - {first})], 2):
            num_points = min(len(said[a]), len(said[b]))
            difference = np.abs(said[a][:num_points] - said[b][:num_points])
            counts, sizes = (difference == 1).sum(axis=1), (~np.isnan(difference)).sum(axis=1)
            result[f"{a} / {b}"] = _rates("differ", counts, sizes)
        return result

    def _path(self, name: str) -> Path:
        return (self._directory or Path()) / label_file(name)

    def _check(self, path: Path, index: int, record: Mapping[str, Any]) -> None:
        """Raise a `ValueError` if a line is not that of the point of this number, in the file of its evaluator."""
        if path != self._path(record["evaluator"]):
            raise ValueError(f"a line is of the evaluator {record['evaluator']!r}")
        direction, coords = self._points[index]
        if (record["direction"], record["coords"]) != (direction, list(coords)):
            raise ValueError(f"a line that should be for {list(coords)} is for {record['coords']}")
        if len(record["labels"]) != self._num_prompts or not set(record["labels"]) <= {*LABELS, None}:
            raise ValueError(f"{len(record['labels'])} labels for {self._num_prompts} prompts, or unknown ones")


def label_file(name: str, pattern: str = LABEL_FILES) -> str:
    """The name of the file with the labels of the evaluator of this name, among the files of a pattern."""
    return pattern.replace("*", quote(name, safe=" "))


def read_labels(directory: Path, pattern: str) -> EarlierLabels:
    """What evaluators said of a run's answers, from those files of its directory whose names have this pattern.

    Raises:
        UserError: a file cannot be read or is damaged.
    """
    labels: EarlierLabels = {}
    for path in sorted(directory.glob(pattern)):
        try:
            with path.open("rb") as file:
                for record in map(json.loads, whole_lines(file)):
                    if not set(record["labels"]) <= {*LABELS, None}:
                        raise ValueError("unknown labels")
                    point = int(record["direction"]), tuple(map(float, record["coords"]))
                    said = record.get("checksum"), list(record["labels"])
                    labels.setdefault(str(record["evaluator"]), {})[point] = said
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(path, error) from error
    return labels


def _line(name: str, checksum: str | None, point: Point, labels: Sequence[Label | None]) -> dict[str, Any]:
    """The line of a file of labels that says what an evaluator said at a point."""
    version = {} if checksum is None else {"checksum": checksum}
    return {"evaluator": name, **version, "direction": point[0], "coords": list(point[1]), "labels": list(labels)}


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({reason(error)}): delete it, and answers are judged again.")


def _refusals(rows: Sequence[Sequence[Label | None]]) -> Float[np.ndarray, "points prompts"]:
    """1 for a label that is a refusal, 0 for another one, NaN for none."""
    number = {None: np.nan} | {label: float(label in REFUSALS) for label in LABELS}
    return np.array([[number[label] for label in row] for row in rows])


def _rates(name: str, counts: Int[np.ndarray, " points"], sizes: Int[np.ndarray, " points"]) -> Rates:
    """Shares in percent at the first points, with the ends of their 95 % intervals; NaN where there is nothing to take
    a share of.

    Arguments:
        name: the key of the shares; `_low` and `_high` are added for the ends.
        counts, sizes: numerator and denominator at each point.
    """
    rates = np.full((3, len(counts)), np.nan)
    for size in set(sizes.tolist()) - {0}:
        points = np.flatnonzero(sizes == size)
        percent = 100 * counts[points] / size
        rates[:, points] = percent, *wilson_interval(percent, size)
    return {name + end: rate for end, rate in zip(("", "_low", "_high"), rates, strict=True)}
