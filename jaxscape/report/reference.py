"""Run directories: what is evaluated is on disk, and what is on disk need not be evaluated again.

`generations.jsonl` is a run's only state. It grows by whole points, in a fixed order; whatever follows the last whole
point is what a killed run left, and is cut off. Every other file is computed from it.
"""

import itertools
import json
from pathlib import Path

from jaxscape.landscapes.landscape import Landscape
from jaxscape.landscapes.store import GENERATIONS
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import to_json_lines, write_whole


def export_reference(directory: str | Path) -> list[Path]:
    """Write a run's generations in the format of the paper's code, whose tools can then read them.

    One file for each direction set, `output.jsonl` if there is one set, else `output-0.jsonl`, `output-1.jsonl`, …;
    one line a point: `{"step": i, "output": [{"prompt", "generation"}, …]}`, with i counting the points from the most
    negative coordinates on, the last axis fastest.

    Returns:
        The files written.

    Raises:
        UserError: the directory holds no finished run, or cannot be written.
    """
    directory = Path(directory)
    land = Landscape.load(directory)
    try:
        lines = (directory / GENERATIONS).read_bytes().split(b"\n")[:-1]
        if not land.complete or len(lines) != land.asr.size * land.num_prompts:
            raise UserError(f"The run in {directory} is not finished; run its command again to finish it, then export.")
        records = [json.loads(line) for line in lines]
        sets = [list(group) for _, group in itertools.groupby(records, lambda record: record["direction"])]
        paths = []
        for index, group in enumerate(sets):
            paths.append(directory / ("output.jsonl" if len(sets) == 1 else f"output-{index}.jsonl"))
            points = itertools.groupby(group, lambda record: record["coords"])
            steps = [
                {"step": i, "output": [{key: record[key] for key in ("prompt", "generation")} for record in point]}
                for i, (_, point) in enumerate(points)
            ]
            write_whole(paths[-1], to_json_lines(steps))
        return paths
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"The run in {directory} cannot be exported ({reason(error)}).") from error
