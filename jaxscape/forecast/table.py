"""What a run would take on TPUs that are not here: its programs, compiled by the TPU compiler from shapes alone."""

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


def as_json(found: Sequence[Forecast | ProgramCost]) -> list[dict[str, Any]]:
    """For programs; what is not finite is None."""
    return [_finite(asdict(each)) for each in found]


def describe(found: Sequence[Forecast], step: ProgramCost | None, title: str) -> str:
    """For people: a table of the programs of each form, and what it comes to, the better form first.

    Arguments:
        step: a finetuning's, if there is one.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    heads = ("form", "program", "arguments GB", "temporaries GB", "TFLOP", "moved GB", "sent MB", "ms", "compiler ms")
    for head in heads:
        table.add_column(head, justify="left" if head in ("form", "program") else "right")
    lines = []
    for number, each in enumerate(found):
        best = " *" if number == 0 and each.fits else ""
        for name, program in each.programs.items():
            table.add_row(each.form + best, name, *_cells(program))
        lines.append(_verdict(each))
    if step is not None:
        table.add_row("finetune --remat", "step", *_cells(step))
        if step.missing is not None:
            lines.append(f"finetune: does not fit, {_by(step)}")
    text = io.StringIO()
    Console(file=text, width=120).print(table)
    note = (
        "GB and ms are a chip's, and of one pass: decode is a step of all rows.\nms is the roofline of what the "
        "compiled program computes, moves and sends."
    )
    if any(p.compiler_seconds is None and p.missing is None for each in found for p in each.programs.values()):
        note += "\nThe compiler's own estimate is left out where it is negative."
    return f"{text.getvalue().rstrip()}\n\n" + "\n".join([*lines, note])


def _cells(program: ProgramCost) -> list[str]:
    if program.missing is not None and not program.arguments:
        return ["does not fit", *[""] * 6]
    return [
        f"{program.arguments / 1e9:.2f}",
        f"{program.temporaries / 1e9:.2f}",
        f"{program.flops / 1e12:.2f}",
        f"{program.memory_bytes / 1e9:.2f}",
        f"{program.sent_bytes / 1e6:.1f}",
        f"{1e3 * program.seconds:.2f}",
        "unusable" if program.compiler_seconds is None else f"{1e3 * program.compiler_seconds:.2f}",
    ]


def _verdict(found: Forecast) -> str:
    plan = found.plan
    if not found.fits:
        largest = max(found.programs.values(), key=lambda program: program.missing or 0.0)
        return (
            f"{found.form}: does not fit, {_by(largest)}; a scan may still run with --form streamed, at the speed of "
            f"its host"
        )
    layout = plan.layout
    rows = f"{layout.batch} rows"
    if layout.points_in_flight > 1:
        rows = f"{layout.points_in_flight} points x {layout.rows_per_point} rows"
    given = "" if found.slots is None else f" with --slots {found.slots}"
    return (
        f"{found.form}: {rows} at a time{given} (at most {found.most_rows}), {found.point_seconds:.2f} s a point, "
        f"{found.landscape_seconds:.0f} s in all; decoding is at {100 * found.decode_share:.0f} % of its roofline"
    )


def _by(program: ProgramCost) -> str:
    """By how much a program does not fit; at least, of one that the compiler refused, perhaps with few layers."""
    least = "" if program.arguments else "at least "
    return f"by {least}{(program.missing or 0.0) / 1e9:.2f} GB a chip"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
