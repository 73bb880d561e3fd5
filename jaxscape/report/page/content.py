"""What the page shows of runs, as lists, numbers and texts that JSON can hold.

Arrays of a landscape become a list for each direction set, with a number for each point. Points are counted with the
last axis varying fastest. What is not known is None.
"""

import itertools
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxscape.directions.kinds import Given
from jaxscape.landscapes.landscape import Landscape
from jaxscape.landscapes.store import Record
from jaxscape.report.figures import GREEK, axis_label, by_set, horizontal, is_interpolation, radius_marks
from jaxscape.report.markup import MINUS
from jaxscape.report.run import KeptRun
from jaxscape.report.tables import landscape_cells, number_cells, visage_cells

CHECKSUM = re.compile(r"^[0-9a-f]{64}$")
NOT_FACTS = {"axes", "points", "directions"}
"""What `config.json` holds beside the facts that the page lists: the figures show the points, and the names of the
directions say more than what identifies them."""
REMARKS = {
    "cut": "ended where its outcome was decided",
    "abandoned": "ended because its beginning makes no sense",
    "unanswered": "thinking without an answer",
    "not finite": "ended at a NaN or infinite logit",
}
"""What else a run records of an answer, and how the page says it."""


def page_content(runs: Mapping[str, KeptRun]) -> dict[str, Any]:
    """All that the page shows, apart from the answers.

    Arguments:
        runs: by names that tell them apart.

    Returns:
        `runs`, see `run_content`; `numbers`, the rows of the table of numbers, see `number_rows`; and `remarks`, what
        the remarks on answers mean.
    """
    return {
        "runs": list(itertools.starmap(run_content, runs.items())),
        "numbers": [row | {"run": index} for index, run in enumerate(runs.values()) for row in number_rows(run)],
        "remarks": REMARKS,
    }


def run_content(name: str, run: KeptRun) -> dict[str, Any]:
    """What the page shows of a run.

    Returns:
        `name`; `summary`, a few facts in words; `axes`, each with its `name`, `label` and `values`, and whether it is
        an `interpolation` (none for listed points); `x`, the points of a line or list on the horizontal axis, and
        `xLabel`; `points`, what each point is called; `origin`, the number of the point that is the model, or None;
        `models`, the models that are marked in the figure of a line, each with its `x` and `name`; `sets`, for each
        direction set its `name`, whether it is a `control`, and `radii`, where its ASR rises above 50 %; `panels`, the
        direction sets that share a figure; `rates`, see `rates`; `evaluated`, for each direction set whether a point is
        evaluated; `prompts`; `facts`, what determines the run, as pairs; and `trajectories`, each with `name`, `coords`
        and `residual`.
    """
    land = run.landscape
    x, label = horizontal(land) if len(land.axes) != 2 else (np.zeros(0), "")
    evaluated = np.isfinite(land.asr) if land.filled is None else ~land.filled
    return {
        "name": name,
        "summary": summary(run),
        "axes": [
            {
                "name": GREEK.get(axis.name, axis.name),
                "label": axis_label(axis),
                "values": list(axis.values),
                "interpolation": is_interpolation(axis.name),
            }
            for axis in land.axes
        ],
        "x": x.tolist(),
        "xLabel": label,
        "points": point_names(land),
        "origin": None if land.origin is None else int(np.ravel_multi_index(land.origin, land.asr[0].shape)),
        "models": _models(land, x),
        "sets": [
            {"name": set_name, "control": bool(control), "radii": radii}
            for set_name, control, radii in zip(set_names(run), land.is_control, _radii(land), strict=True)
        ],
        "panels": panels(land),
        "rates": rates(land),
        "evaluated": evaluated.reshape(len(evaluated), -1).tolist(),
        "prompts": list(run.prompts),
        "facts": facts(run.config),
        "trajectories": [
            {"name": path.name, "coords": path.coords.tolist(), "residual": path.residual.tolist()}
            for path in run.trajectories
        ],
    }


def answers_content(run: KeptRun, index: int) -> dict[str, Any]:
    """What the page shows of a point when it is opened.

    Arguments:
        index: that of the point in `run.points`.

    Returns:
        For each prompt, `texts`, what the model answered, with what it thought before; `labels`, what each evaluator
        that has judged the point said, by the evaluator's name; and `remarks`, keys of `REMARKS`.
    """
    records = run.answers[index]
    return {
        "texts": [record["generation"] for record in records],
        "labels": {name: list(rows[index]) for name, rows in run.labels.items() if index < len(rows)},
        "remarks": list(map(_remarks, records)),
    }


def _remarks(record: Record) -> list[str]:
    happened = {
        "cut": record.get("cut", False) and not record.get("abandoned", False),
        "abandoned": record.get("abandoned", False),
        "unanswered": record.get("unanswered", False),
        "not finite": not record.get("finite", True),
    }
    return [name for name, is_so in happened.items() if is_so]


def summary(run: KeptRun) -> list[str]:
    """The model, the number of prompts, points and directions, and how much of the run is there, in words."""
    land = run.landscape
    num_sets, num_points = len(land.asr), land.asr[0].size
    num_controls = int(land.is_control.sum())
    parts = [str(run.config.get("model", "a model without a name")), _counted(land.num_prompts, "prompt")]
    parts.append(_counted(num_points, "point"))
    what = "plane" if len(land.axes) == 2 else "direction"
    if not land.points:
        parts.append(_counted(num_sets - num_controls, what))
    if num_controls:
        parts.append(_counted(num_controls, "control"))
    if not land.complete:
        state = "a shard of a scan" if "shard" in run.config else "unfinished"
        parts.append(f"{state}: {int(np.isfinite(land.asr).sum())} of {land.asr.size} points")
    elif land.filled is not None:
        parts.append(f"{land.num_evaluated} of {land.asr.size} points evaluated, the others interpolated")
    return [*parts, *filter(None, [land.abandoned_text])]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def set_names(run: KeptRun) -> list[str]:
    """What each direction set is called: by the names of its directions, or by its number where a program gave them."""
    names = run.landscape.directions or run.direction_names
    if len(names) == len(run.landscape.asr) and not any(Given.name in item for item in names):
        return [" and ".join(item) for item in names]
    return [f"direction set {index}" for index in range(len(run.landscape.asr))]


def panels(land: Landscape) -> list[list[int]]:
    """The direction sets that share a figure, as in the figure that a scan leaves: a plane has one of its own, and so
    have lines of special directions that have shares, so that a control stands beside its direction."""
    sets = list(range(len(land.asr)))
    is_apart = len(land.axes) == 2 or (land.shares and land.directions)
    return [[index] for index in sets] if is_apart else [sets]


def point_names(land: Landscape) -> list[str]:
    """What each point is called, such as `α = +0.1, β = −0.2`, or `(+0.1, −0.2, 0)` where points are a list."""
    if land.points:
        return [f"({', '.join(map(_coordinate, point))})" for point in land.points]
    names = [GREEK.get(axis.name, axis.name) for axis in land.axes]
    grid = itertools.product(*(axis.values for axis in land.axes))
    return [
        ", ".join(f"{name} = {_coordinate(value)}" for name, value in zip(names, point, strict=True)) for point in grid
    ]


def _coordinate(value: float) -> str:
    return f"{value:+.4g}".replace("-", MINUS) if value else "0"


def _models(land: Landscape, x: Float[np.ndarray, " points"]) -> list[dict[str, Any]]:
    """The models that lie on a line, or in a list of points."""
    if len(land.axes) == 1:
        ends = {0.0: "the model"} | ({1.0: "the other model"} if is_interpolation(land.axes[0].name) else {})
        return [{"x": coord, "name": name} for coord, name in ends.items()]
    return [{"x": float(x[land.origin])} | {"name": "the model"}] if land.points and land.origin else []


def _radii(land: Landscape) -> list[list[float]]:
    """See `radius_marks`; none for planes and lists of points."""
    return radius_marks(land) if len(land.axes) == 1 else [[] for _ in land.asr]


def rates(land: Landscape) -> list[dict[str, Any]]:
    """What can be drawn: the ASR, the shares, what each other evaluator says, and on how many answers two of them
    differ.

    Returns:
        For each rate its `key`, which is the same in all runs; what it is, `label`; and `value`, `low` and `high`, in
        percent, for each direction set and point.
    """
    found = [_rate("asr", "attack success rate (ASR)", {"": land.asr, "_low": land.asr_low, "_high": land.asr_high})]
    groups = [("shares", "", land.shares)]
    groups += [(f"by {name}", f", by {name}", measure) for name, measure in land.measures.items()]
    groups += [(f"of {pair}", f": {pair}", measure) for pair, measure in land.disagreement.items()]
    for group, suffix, measure in groups:
        for kind in (key for key in measure if not key.endswith(("_low", "_high"))):
            label = "judges disagree" if kind == "differ" else kind
            values = {end: measure[kind + end] for end in ("", "_low", "_high")}
            found.append(_rate(f"{kind} {group}", f"{label}{suffix}", values))
    return found


def _rate(key: str, label: str, values: Mapping[str, Float[np.ndarray, " directions *grid"]]) -> dict[str, Any]:
    value, low, high = (_listed(values[end]) for end in ("", "_low", "_high"))
    return {"key": key, "label": label, "value": value, "low": low, "high": high}


def _listed(values: Float[np.ndarray, " directions *grid"]) -> list[list[float | None]]:
    rows = values.reshape(len(values), -1).tolist()
    return [[round(value, 3) if np.isfinite(value) else None for value in row] for row in rows]


def number_rows(run: KeptRun) -> list[dict[str, Any]]:
    """The rows of the table of a run's numbers.

    Returns:
        For the mean over the directions, for the mean over the controls, and for each direction set if there are
        several: what the row is `of`, and its `cells`, texts with 95 % intervals by the titles of their columns.
    """
    land, names = run.landscape, set_names(run)
    all_sets = "all directions but controls" if land.control else "all directions"
    cells = {"prompts": str(land.num_prompts)} | landscape_cells(land)
    rows = [{"of": all_sets if len(names) > 1 else names[0], "cells": cells}]
    if land.control:
        rows.append(
            {
                "of": "all controls",
                "cells": visage_cells(land.control["visage"]) | number_cells(land.control["numbers"]),
            }
        )
    if len(names) > 1 and land.numbers is not None:
        own = [_numbers_by_set(numbers) for numbers in (land.numbers, land.control.get("numbers", {}))]
        for name, numbers in zip(names, by_set(land, *own), strict=True):
            rows.append({"of": name, "cells": number_cells(numbers or {})})
    return rows


def _numbers_by_set(numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers of each direction set, from `numbers` of `landscape.json`, in the same form."""
    count = max((len(of["volume"]["directions"]) for of in numbers.values()), default=0)
    return [
        {
            rate: {name: None if number is None else number["directions"][i] for name, number in of.items()}
            for rate, of in numbers.items()
        }
        for i in range(count)
    ]


def facts(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What determines a run, as pairs of what it is called and a text. Checksums are cut to twelve digits."""
    is_shown = {key: key not in NOT_FACTS and value not in ([], "") for key, value in config.items()}
    return [(key.replace("_", " "), _fact(value)) for key, value in config.items() if is_shown[key]]


def _fact(value: Any) -> str:
    match value:
        case str():
            return f"{value[:12]}…" if CHECKSUM.match(value) else value
        case bool():
            return "yes" if value else "no"
        case None:
            return "none"
        case list():
            return ", ".join(map(_fact, value))
        case dict():
            return ", ".join(f"{key}: {_fact(item)}" for key, item in value.items())
        case _:
            return json.dumps(value)
