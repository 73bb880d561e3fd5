"""Forecasts as JSON, and as a table for the terminal."""

import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from jaxscape.forecast.compile import ProgramCost
from jaxscape.forecast.forecast import Forecast

JSON_KEYS = {
    "argument_bytes": "arguments",
    "temporary_bytes": "temporaries",
    "hbm_bytes": "memory_bytes",
    "used_bytes": "used",
    "missing_bytes": "missing",
}
"""The JSON keys of fields of `ProgramCost` that were renamed: their names in earlier versions. Other fields have their
own name as key."""

PLAN_KEYS = {
    "form": "form",
    "points_in_flight": "places",
    "rows_per_point": "rows",
    "prompts_per_group": "group",
    "groups_per_insert": "inserts",
    "num_sets": "num_sets",
    "chunk": "chunk",
    "chunks_in_flight": "ahead",
    "first_compact_slots": "few",
    "storage": "storage",
    "cache_bytes": "cache",
    "memory_bytes": "memory",
    "reason": "reason",
}
"""The JSON key of each field of a plan and of its batch layout that is written: its name in earlier versions."""

COLUMNS = ("form", "program", "arguments GB", "temporaries GB", "TFLOP", "HBM GB", "sent MB", "ms", "compiler ms")


def as_json(results: Sequence[Forecast | ProgramCost]) -> list[dict[str, Any]]:
    """A dictionary that JSON can hold for each forecast or program; numbers that are not finite become None."""
    return [_to_json(asdict(result) | _plan_under_keys(result)) for result in results]


def _plan_under_keys(result: Forecast | ProgramCost) -> dict[str, Any]:
    """The plan of a forecast, with the keys that JSON has for it. A program has no plan, so its dictionary is empty."""
    if isinstance(result, ProgramCost):
        return {}
    plan, layout = result.plan, result.plan.layout
    return {"plan": {key: getattr(plan if hasattr(plan, name) else layout, name) for name, key in PLAN_KEYS.items()}}


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {JSON_KEYS.get(key, key): _to_json(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe(forecasts: Sequence[Forecast], step: ProgramCost | None, title: str) -> str:
    """A table of the programs of each form, and a sentence for each form.

    Arguments:
        forecasts: the best form first, as `jaxscape.forecast.forecast.forecast` returns them.
        step: the cost of a finetuning step, if that was forecast.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("form", "program") else "right")
    lines = []
    for number, forecast in enumerate(forecasts):
        best = " *" if number == 0 and forecast.fits else ""
        for name, program in forecast.programs.items():
            table.add_row(forecast.form + best, name, *_cells(program))
        lines.append(_summary(forecast))
    if step is not None:
        table.add_row("finetune --remat", "step", *_cells(step))
        if step.missing_bytes is not None:
            lines.append(f"finetune: does not fit, {_shortfall(step)}")
    text = io.StringIO()
    Console(file=text, width=120).print(table)
    lines += [
        "GB, MB, TFLOP and ms are those of one chip and one pass; a pass of decode is one step of all rows.",
        "ms is the roofline estimate from the compiled program's FLOPs, HBM traffic and inter-chip traffic.",
    ]
    programs = [program for forecast in forecasts for program in forecast.programs.values()]
    if any(program.compiler_seconds is None and program.missing_bytes is None for program in programs):
        lines.append("The compiler's own estimate is left out where it is negative.")
    return f"{text.getvalue().rstrip()}\n\n" + "\n".join(lines)


def _cells(program: ProgramCost) -> list[str]:
    """A program's cells of the table, from the third column on."""
    if _was_refused(program):
        return ["does not fit", *[""] * (len(COLUMNS) - 3)]
    return [
        f"{program.argument_bytes / 1e9:.2f}",
        f"{program.temporary_bytes / 1e9:.2f}",
        f"{program.flops / 1e12:.2f}",
        f"{program.hbm_bytes / 1e9:.2f}",
        f"{program.sent_bytes / 1e6:.1f}",
        f"{1e3 * program.seconds:.2f}",
        "unusable" if program.compiler_seconds is None else f"{1e3 * program.compiler_seconds:.2f}",
    ]


def _summary(forecast: Forecast) -> str:
    if not forecast.fits:
        largest = max(forecast.programs.values(), key=lambda program: program.missing_bytes or 0.0)
        return (
            f"{forecast.form}: does not fit, {_shortfall(largest)}; a scan may still run with --form streamed, at the "
            f"speed of its host"
        )
    layout = forecast.plan.layout
    rows = f"{layout.batch} rows"
    if forecast.plan.form.batches_points and layout.points_in_flight > 1:
        rows = f"{layout.points_in_flight} points x {layout.rows_per_point} rows"
    option = "" if forecast.slots is None else f" with --slots {forecast.slots}"
    return (
        f"{forecast.form}: {rows} at a time{option} (at most {forecast.most_rows}), {forecast.point_seconds:.2f} s a "
        f"point, {forecast.landscape_seconds:.0f} s in all; decoding is at {100 * forecast.decode_share:.0f} % of its "
        f"roofline"
    )


def _shortfall(program: ProgramCost) -> str:
    """A text that says how many GB of a chip's memory a program lacks."""
    # The compiler may have refused the program for one or two layers; that for all layers would lack more.
    least = "at least " if _was_refused(program) else ""
    return f"by {least}{(program.missing_bytes or 0.0) / 1e9:.2f} GB a chip"


def _was_refused(program: ProgramCost) -> bool:
    """Whether the compiler refused the program, so that only `missing_bytes` is known."""
    return program.missing_bytes is not None and program.used_bytes is None
