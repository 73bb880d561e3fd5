"""A comparison of runs as tables: Markdown, CSV and LaTeX. Names of runs are untrusted text."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxscape.landscapes.comparison import COMPLIED, LEVEL, ComparedRun, Comparison, Difference
from jaxscape.landscapes.landscape import Landscape
from jaxscape.report.csv_text import without_formula
from jaxscape.report.markup import MINUS, Rows, latex, latex_table, markdown, markdown_table, visible

TITLES = {
    "visage": "VISAGE",
    "volume": "safety volume (%)",
    "radius": "radius",
    "complied_volume": "safety volume of complied alone (%)",
    "complied_radius": "radius of complied alone",
}
COLUMNS = TITLES | {"asr": "ASR of the model (%)", "visage_code": "VISAGE (code)"}
"""The titles of the numbers of landscapes."""
FORMATS = {"visage": ".2f", "volume": ".2f", "radius": ".3g", "complied_volume": ".2f", "complied_radius": ".3g"}


def estimate_text(number: Mapping[str, Any], spec: str, label: str = "") -> str:
    """A number of a landscape with its interval, such as `0.48 (0.45 to at least 0.5)`.

    Arguments:
        number: an entry of `numbers` in `landscape.json`.
        spec: how numbers are formatted.
        label: what stands before the interval.
    """
    values = (number["value"], *number["interval"])
    bounds = (number.get("at_least", False), *number.get("interval_at_least", (False, False)))
    value, low, high = (
        ("at least " if bound else "") + _number(float(x), spec) for x, bound in zip(values, bounds, strict=True)
    )
    return f"{value} ({label}{low} to {high})"


def to_markdown(comparison: Comparison) -> str:
    """The text of `table.md`: a table of the runs, one of the differences, and the notes."""
    return "\n\n".join(filter(None, [markdown_table(_run_rows(comparison)), difference_table(comparison)])) + "\n"


def difference_table(comparison: Comparison) -> str:
    """The differences between the runs of a comparison as a Markdown table, and its notes; empty if there are none."""
    parts = []
    if comparison.differences:
        parts += [markdown_table(_difference_rows(comparison)), markdown(_level_note(comparison))]
    return "\n\n".join([*parts, *(markdown(f"Note: {note}") for note in comparison.notes)])


def landscape_table(landscapes: Mapping[str, Landscape]) -> str:
    """The numbers of complete landscapes as a Markdown table, with 95 % intervals.

    The columns are the ASR of the model itself, VISAGE by the paper's definition and by its code, the safety volume and
    the radius, and those of complied alone, if a landscape has shares. A single point has nothing but its ASR.

    Arguments:
        landscapes: each landscape by what its row is called.
    """
    cells = {name: landscape_cells(land) for name, land in landscapes.items()}
    titles = list(dict.fromkeys(title for row in cells.values() for title in row))
    rows = [
        [
            name,
            str(land.num_prompts),
            str(int((~land.is_control).sum())),
            *(cells[name].get(title, "") for title in titles),
        ]
        for name, land in landscapes.items()
    ]
    return markdown_table([["", "prompts", "directions", *titles], *rows])


def landscape_cells(land: Landscape) -> dict[str, str]:
    """The numbers of a landscape as texts, by the titles of their columns."""
    return _cells(landscape_estimates(land))


def landscape_estimates(land: Landscape) -> dict[str, Mapping[str, Any] | None]:
    """The numbers of a landscape by their names: `asr` of the model itself, `visage` by the paper's definition and
    `visage_code` by its code's, `volume` and `radius`, and those of complied alone, `complied_volume` and
    `complied_radius`. Those that it does not have are left out.

    Each has its `value` and `interval`, and a radius has what `numbers` in `landscape.json` says of its bounds. It is
    None if the axes do not contain the model.
    """
    place = land.origin
    estimates: dict[str, Mapping[str, Any] | None] = {}
    if place is not None and np.isfinite(land.asr[(0, *place)]):
        asr, *ends = (float(rates[(0, *place)]) for rates in (land.asr, land.asr_low, land.asr_high))
        estimates["asr"] = {"value": asr, "interval": ends}
    if land.asr[0].size > 1 and land.visage_values is not None and land.numbers is not None:
        estimates |= _visage_estimates(land.visage_values) | _number_estimates(land.numbers)
    return estimates


def visage_cells(visage: Mapping[str, Any]) -> dict[str, str]:
    """VISAGE by both definitions, as `visage` in `landscape.json` has it, by the titles of its columns."""
    return _cells(_visage_estimates(visage))


def number_cells(numbers: Mapping[str, Any]) -> dict[str, str]:
    """Safety volume and radius, as `numbers` in `landscape.json` has them, by the titles of their columns."""
    return _cells(_number_estimates(numbers))


def _visage_estimates(visage: Mapping[str, Any]) -> dict[str, Mapping[str, Any] | None]:
    kinds = {"visage": ("paper", "interval"), "visage_code": ("reference", "reference_interval")}
    return {  # the first runs had no interval of the reference code's definition
        name: {"value": visage[kind], "interval": visage[interval]} if interval in visage else None
        for name, (kind, interval) in kinds.items()
    }


def _number_estimates(numbers: Mapping[str, Any]) -> dict[str, Mapping[str, Any] | None]:
    return {
        f"{prefix}{name}": numbers[rate][name]
        for rate, prefix in (("asr", ""), ("complied", "complied_"))
        for name in ("volume", "radius")
        if rate in numbers
    }


def _cells(estimates: Mapping[str, Mapping[str, Any] | None]) -> dict[str, str]:
    """Estimates as texts, by the titles of their columns."""
    return {
        COLUMNS[name]: "none" if estimate is None else estimate_text(estimate, ".3f" if "radius" in name else ".1f")
        for name, estimate in estimates.items()
    }


def to_latex(comparison: Comparison) -> str:
    """The text of `table.tex`: a `tabular` of the runs and one of the differences, which need no package, and the notes
    as comments."""
    rows = _run_rows(comparison)
    parts = [latex_table(rows, "l" + "r" * (len(rows[0]) - 1))]
    if comparison.differences:
        parts += [latex_table(_difference_rows(comparison), "llrrrrll"), f"% {latex(_level_note(comparison))}"]
    return "\n\n".join([*parts, *(f"% Note: {latex(note)}" for note in comparison.notes)]) + "\n"


def to_csv(comparison: Comparison) -> str:
    """The text of `table.csv`: a row for each run. A number that was not measured is an empty cell."""
    names = _names(comparison)
    radii = [name for name in names if name.endswith("radius")]
    head = ["run", "prompts", "directions", "points"]
    head += [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    head += [f"{name}{end}_at_least" for name in radii for end in ("", "_low", "_high")]
    return _csv([head, *(_csv_row(run, names, radii) for run in comparison.runs)])


def _csv_row(run: ComparedRun, names: Sequence[str], radii: Sequence[str]) -> list[Any]:
    numbers = run.numbers or {}
    row: list[Any] = [run.name, run.landscape.num_prompts, len(run.landscape.asr), run.landscape.asr[0].size]
    for name in names:
        row += [numbers[name]["value"], *numbers[name]["interval"]] if name in numbers else [""] * 3
    for name in radii:
        row += [numbers[name]["at_least"], *numbers[name]["interval_at_least"]] if name in numbers else [""] * 3
    return row


def _names(comparison: Comparison) -> list[str]:
    """The numbers that tables have: those of complied alone only if a run has shares."""
    has_shares = any(run.complied is not None for run in comparison.runs)
    return [name for name in TITLES if has_shares or name not in COMPLIED]


def differences_to_csv(comparison: Comparison) -> str:
    """The text of `differences.csv`: a row for each difference."""
    fields = [
        "first",
        "second",
        "number",
        "value",
        "low",
        "high",
        "bound",
        "p",
        "adjusted",
        "larger_than_noise",
        "paired",
    ]
    return _csv([fields, *([getattr(item, field) for field in fields] for item in comparison.differences)])


def _run_rows(comparison: Comparison) -> Rows:
    names = _names(comparison)
    rows = [["run", "prompts", "directions", *(TITLES[name] for name in names)]]
    for run in comparison.runs:
        numbers = run.numbers
        cells = [
            "unfinished"
            if numbers is None
            else estimate_text(numbers[name], FORMATS[name])
            if name in numbers
            else "none"
            for name in names
        ]
        rows.append([run.name, str(run.landscape.num_prompts), str(len(run.landscape.asr)), *cells])
    return rows


def _difference_rows(comparison: Comparison) -> Rows:
    head = ["difference", "number", "value", "95 % interval", "p", "p (Holm)", "larger than the noise", "paired by"]
    return [head, *map(_difference_row, comparison.differences)]


def _difference_row(item: Difference) -> list[str]:
    spec = "+" + FORMATS[item.number]
    return [
        f"{item.second} {MINUS} {item.first}",
        TITLES[item.number],
        f"{item.bound} {_number(item.value, spec)}".strip(),
        f"{_number(item.low, spec)} to {_number(item.high, spec)}",
        f"{item.p:.2g}",
        f"{item.adjusted:.2g}",
        item.larger_than_noise,
        item.paired,
    ]


def _level_note(comparison: Comparison) -> str:
    return (
        f"A difference is larger than the noise if its p-value, adjusted by Holm's method for the number of "
        f"differences ({len(comparison.differences)}), is below {LEVEL}. The intervals are not adjusted."
    )


def _number(value: float, spec: str) -> str:
    """A number with a minus sign that is as long as a plus sign, and no negative zero."""
    text = format(value, spec)
    if not text.strip("+-0."):
        text = text.replace("-", "+" if spec.startswith("+") else "")
    return text.replace("-", MINUS)


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows(
        [without_formula(visible(cell)) if isinstance(cell, str) else cell for cell in row] for row in rows
    )
    return text.getvalue()
