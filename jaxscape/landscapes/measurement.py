"""Measures of weights on a grid of points, and their file, `measures.json`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxscape.evaluate.measure import WeightMeasure
from jaxscape.landscapes.axes import Axis
from jaxscape.landscapes.landscape import each_array
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import write_whole
from jaxscape.runtime.remote import run_directory

FILE_NAME = "measures.json"

Values = Mapping[str, Float[np.ndarray, " directions *grid"]]


@dataclass(frozen=True, eq=False)
class Measurement:
    """Measures of a model's weights at each point of a grid, for each direction set.

    Attributes:
        axes: one for each dimension of the grid.
        measures: what each measure gives, by its name: `value`, and the ends `low` and `high` of its 95 % interval;
            each float64[directions, *grid], NaN for points that are not evaluated yet. A measure may have more
            numbers, such as `score`, `score_low` and `score_high`. `nonfinite` is the number of prompts or questions
            whose logits were NaN or infinite; the other numbers are without them.
        labels: what the value of each measure is, with its unit.
        settings: what each measure was made from.
    """

    axes: tuple[Axis, ...]
    measures: Mapping[str, Values]
    labels: Mapping[str, str]
    settings: Mapping[str, Any]

    @classmethod
    def from_samples(
        cls,
        axes: Sequence[Axis],
        num_sets: int,
        made: Sequence[WeightMeasure],
        samples: Sequence[Mapping[str, Float[np.ndarray, "samples columns"]]],
    ) -> "Measurement":
        """The measurement from what `WeightMeasure.samples` gave at the first points, by the measure's name."""
        shape = (num_sets, *(len(axis.values) for axis in axes))
        measures = {}
        for measure in made:
            points = [_point_values(measure, point[measure.name]) for point in samples]
            keys = points[0] if points else ("value", "low", "high", "nonfinite")
            values = {}
            for key in keys:
                flat = np.full(int(np.prod(shape)), np.nan)
                flat[: len(points)] = [point[key] for point in points]
                values[key] = flat.reshape(shape)
            measures[measure.name] = values
        labels = {measure.name: measure.label for measure in made}
        return cls(tuple(axes), measures, labels, {measure.name: dict(measure.settings) for measure in made})

    @property
    def complete(self) -> bool:
        """Whether every point is evaluated."""
        return not any(np.isnan(values["nonfinite"]).any() for values in self.measures.values())

    def to_json(self) -> str:
        """The text of `measures.json`."""

        def nested(values: np.ndarray) -> list[Any]:
            cells = values.astype(object)
            cells[~np.isfinite(values)] = None
            return cells.tolist()

        content = {
            "axes": [axis.described() for axis in self.axes],
            "measures": each_array(nested, self.measures),
            "labels": self.labels,
            "settings": self.settings,
            "complete": self.complete,
        }
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, directory: str | Path) -> None:
        """Write `measures.json` into a directory, which is created if it is missing.

        Raises:
            UserError: the file cannot be written.
        """
        directory = run_directory(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_whole(directory / FILE_NAME, self.to_json())
        except OSError as error:
            raise UserError(
                f"The measures cannot be written to {directory} ({reason(error)}): choose another directory."
            ) from error

    @classmethod
    def load(cls, directory: str | Path) -> "Measurement":
        """Read `measures.json` from the directory of a run of `jaxscape measure`, which may be unfinished.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = run_directory(directory) / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            axes = tuple(map(Axis.read, content["axes"]))
            measures = each_array(lambda values: np.array(values, np.float64), content["measures"])
            arrays = [values for measure in measures.values() for values in measure.values()]
            if {array.shape[1:] for array in arrays} != {tuple(len(axis.values) for axis in axes)}:
                raise ValueError("arrays of other shapes than the axes")
            return cls(axes, measures, dict(content["labels"]), dict(content["settings"]))
        except OSError as error:
            raise UserError(f"{directory} holds no measures: {path} cannot be read ({reason(error)}).") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is not a file of measures ({reason(error)}).") from error


def _point_values(measure: WeightMeasure, samples: Float[np.ndarray, "samples columns"]) -> dict[str, float]:
    """A measure's numbers at one point, from its samples there."""
    is_finite = np.isfinite(samples).all(axis=1)
    # Where nothing is finite, the names of the numbers are still those of the measure.
    summary = measure.summary(samples[is_finite] if is_finite.any() else np.zeros_like(samples))
    values: dict[str, float] = {}
    for key, interval in summary.items():
        names = ("value", "low", "high") if key == "value" else (key, f"{key}_low", f"{key}_high")
        values |= zip(names, interval if is_finite.any() else (np.nan,) * 3, strict=True)
    return values | {"nonfinite": float((~is_finite).sum())}
