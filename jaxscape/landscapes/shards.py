"""The parts into which a scan is split, so that several machines share it; see `jaxscape.landscapes.merge`.

A part is a run of consecutive points, in the order in which a whole scan evaluates them: then the directions of a set
are made once for each part, and the files of the parts, one behind the other, are those of the whole scan.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxscape.runtime.errors import UserError

START_TOKENS = 16
"""What a prompt costs at any point, in tokens that take as long to decode: prefill, and the tokens of a refusal up to
its keyword."""
FAR = 0.5
"""The distance from which on answers are expected to go on to the last token, as a share of the largest coordinate."""


@dataclass(frozen=True)
class Shard:
    """A part of the points of a scan.

    Attributes:
        number: which part it is, counted from 1.
        count: the number of parts.
        start, stop: the number of its first point, and of the first point behind it, among all points, counted from 0.
        labels: the names of the evaluators whose labels the scan keeps.
    """

    number: int
    count: int
    start: int
    stop: int
    labels: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        text: str,
        coords: Sequence[Sequence[float]],
        num_sets: int,
        max_new_tokens: int,
        labels: Sequence[str] = (),
    ) -> "Shard":
        """The part that a text such as `2/4` names.

        Arguments:
            coords: the coordinates of the points of each direction set.
            num_sets: the number of direction sets.

        Raises:
            UserError: the text names no part, or there are fewer points than parts.
        """
        number, count = parse(text)
        costs = expected_costs(coords, max_new_tokens) * num_sets
        if count > len(costs):
            raise UserError(f"There are {len(costs)} points: split them into at most {len(costs)} shards, not {count}.")
        start, stop = boundaries(costs, count)[number - 1 : number + 1]
        return cls(number, count, start, stop, list(labels))

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Shard | None":
        """The part that a run with this configuration evaluates; None if it evaluates all points. Raises one of several
        exceptions if the configuration is damaged."""
        if (entry := config.get("shard")) is None:
            return None
        number, count, start, stop = (int(entry[key]) for key in ("number", "count", "start", "stop"))
        shard = cls(number, count, start, stop, list(map(str, entry["labels"])))
        if not (1 <= shard.number <= shard.count and 0 <= shard.start < shard.stop):
            raise ValueError(f"{entry} is no shard")
        return shard

    @property
    def num_points(self) -> int:
        """The number of its points."""
        return self.stop - self.start

    def described(self) -> dict[str, Any]:
        """The entry of `config.json`."""
        return asdict(self)

    def summary(self, total: int) -> str:
        """A line for the user.

        Arguments:
            total: the number of points of the whole scan.
        """
        return f"{self}: {self.num_points} of {total} points"

    def __str__(self) -> str:
        return f"shard {self.number} of {self.count}"


def parse(text: str) -> tuple[int, int]:
    """The two numbers of a text such as `2/4`.

    Raises:
        UserError: it is no such text, or the first number is not one from 1 to the second.
    """
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    number, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"Cannot parse the shard {text!r}: write I/N, such as 2/4, with I from 1 to N.")
    return number, count


def expected_costs(coords: Sequence[Sequence[float]], max_new_tokens: int) -> list[int]:
    """What a prompt is expected to cost at each point, in tokens.

    Close to the model, an answer is a refusal, which is short; far from it, it is noise that goes on to the last token.
    Where this changes is not known before the scan, so the cost rises linearly with the distance from the model, up to
    a distance of `FAR`. Along each direction, the unit of distances is the largest coordinate.

    Arguments:
        coords: the coordinates of the points of a direction set.
    """
    largest = [max(map(abs, along)) or 1.0 for along in zip(*coords, strict=True)]

    def share(point: Sequence[float]) -> float:
        distance = math.sqrt(sum((c / most) ** 2 for c, most in zip(point, largest, strict=True)))
        return min(1.0, distance / FAR)

    return [START_TOKENS + round(max_new_tokens * share(point)) for point in coords]


def boundaries(costs: Sequence[int], count: int) -> list[int]:
    """The numbers of the first points of `count` parts of about the same cost, and behind them the number of points.

    A part ends where the sum of the costs is closest to its share of the whole, but each part has at least one point.
    Integers are compared, so all machines find the same parts.
    """
    total, ends = sum(costs), [0]
    passed, point = 0, 0  # `passed` is the cost of the first `point` points
    for number in range(1, count):
        while point < len(costs) and (2 * passed + costs[point]) * count <= 2 * number * total:
            passed += costs[point]
            point += 1
        ends.append(max(ends[-1] + 1, min(point, len(costs) - (count - number))))
    return [*ends, len(costs)]
