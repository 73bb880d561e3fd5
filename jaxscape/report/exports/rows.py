"""The two tables of a run, `points` and `generations`, as rows.

The exports to CSV, Parquet, Inspect and the Hub have these columns.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxscape.landscapes.store import Point
from jaxscape.report.run import KeptRun

Row = dict[str, Any]
"""The cells of a row by the names of their columns: numbers, texts, booleans, or None where there is nothing."""


def point_rows(run: KeptRun) -> list[Row]:
    """A row for each point of the landscape, those that an adaptive scan interpolated among them.

    The columns are `direction`, `point` and the coordinates, see `place`; `direction_name`; and what `landscape.json`
    has for each point: `asr` with its interval, `nonfinite`, `unanswered`, `abandoned`, and the share of each label in
    percent with its interval, such as `coherence_refused`, `coherence_refused_low` and `coherence_refused_high`.
    """
    land = run.landscape
    names = run.direction_names
    measures = {"coherence": land.shares} if land.shares else {}
    columns = {
        "asr": land.asr,
        "asr_low": land.asr_low,
        "asr_high": land.asr_high,
        "num_prompts": np.full(land.asr.shape, land.num_prompts),
        "nonfinite": land.nonfinite,
        "unanswered": land.unanswered,
        "abandoned": np.zeros_like(land.nonfinite) if land.abandoned is None else land.abandoned,
        "interpolated": np.zeros(land.asr.shape, bool) if land.filled is None else land.filled,
        **{
            f"{evaluator}_{key}": values
            for evaluator, measure in (measures | dict(land.measures)).items()
            for key, values in measure.items()
        },
    }
    flat = {name: values.reshape(-1).tolist() for name, values in columns.items()}
    return [
        {
            **place(point, number),
            "direction_name": " and ".join(names[point[0]]) if names else None,
            **{name: _known(values[index]) for name, values in flat.items()},
        }
        for index, (point, number) in enumerate(run.numbers.items())
    ]


def answer_rows(run: KeptRun) -> Iterator[Row]:
    """A row for each answer, in the order of `generations.jsonl`.

    The columns are `direction`, `point` and the coordinates, see `place`; `prompt_number`, counted from 0; `prompt`;
    `generation`; `refused`; for each evaluator its label, such as `label_keywords`, or None if it could not judge; and
    `finite`, `unanswered`, `cut` and `abandoned`, as in `generations.jsonl`.
    """
    numbers = run.numbers
    for index, (point, records) in enumerate(zip(run.points, run.answers, strict=True)):
        for prompt_number, record in enumerate(records):
            yield {
                **place(point, numbers[point]),
                "prompt_number": prompt_number,
                "prompt": record["prompt"],
                "generation": record["generation"],
                "refused": record["refused"],
                **{f"label_{name}": rows[index][prompt_number] for name, rows in run.labels.items()},
                "finite": record.get("finite", True),
                "unanswered": record.get("unanswered", False),
                "cut": record.get("cut", False),
                "abandoned": record.get("abandoned", False),
            }


def place(point: Point, number: int) -> Row:
    """The columns that say which point a row is of: `direction`, the index of the direction set; `point`, the number of
    the point in the grid, with the last axis varying fastest, or in the list of points; and `coord_0`, `coord_1`, …,
    its coordinates. All numbers count from 0."""
    direction, coords = point
    return {"direction": direction, "point": number, **{f"coord_{axis}": value for axis, value in enumerate(coords)}}


def _known(value: Any) -> Any:
    """The value, or None in place of NaN."""
    return None if value != value else value
