"""Export of a run in the format of the paper's code."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxscape.landscapes.landscape import Landscape
from jaxscape.landscapes.store import GENERATIONS
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import to_json_lines, write_whole


def export_reference(directory: str | Path) -> list[Path]:
    """Write a run's generations in the format that the tools of the paper's code read.

    There is one file for each direction set: `output.jsonl` if there is one set, or else `output-0.jsonl`,
    `output-1.jsonl`, … Each line is one point, `{"step": i, "output": [{"prompt", "generation"}, …]}`. Steps count the
    points from 0 in the order of their coordinates; the last axis varies fastest.

    Returns:
        The files written.

    Raises:
        UserError: the directory holds no finished run, or cannot be written.
    """
    directory = Path(directory)
    landscape = Landscape.load(directory)
    if landscape.filled is not None:
        raise UserError(f"The adaptive scan in {directory} has no answers at some points: export a scan of all points.")
    try:
        lines = (directory / GENERATIONS).read_bytes().split(b"\n")[:-1]
        if not landscape.complete or len(lines) != landscape.asr.size * landscape.num_prompts:
            raise UserError(f"The run in {directory} is not finished; run its command again to finish it, then export.")
        records = [json.loads(line) for line in lines]
        sets = [list(group) for _, group in itertools.groupby(records, lambda record: record["direction"])]
        paths = []
        for index, group in enumerate(sets):
            paths.append(directory / ("output.jsonl" if len(sets) == 1 else f"output-{index}.jsonl"))
            write_whole(paths[-1], to_json_lines(_steps(group)))
        return paths
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"The run in {directory} cannot be exported ({reason(error)}).") from error


def _steps(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A record for each point of a direction set, with all its answers, from records that have one answer each."""
    points = itertools.groupby(records, lambda record: record["coords"])
    return [
        {"step": step, "output": [{key: record[key] for key in ("prompt", "generation")} for record in point]}
        for step, (_, point) in enumerate(points)
    ]
