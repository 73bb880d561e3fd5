"""Run directories: what is evaluated is on disk, and what is on disk need not be evaluated again.

`generations.jsonl` is a run's only state. It grows by whole points, in a fixed order; whatever follows the last whole
point is what a killed run left, and is cut off. Every other file is computed from it.
"""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxscape import landscape, rundir, trajectory
from jaxscape.engine import Completion
from jaxscape.errors import UserError, reason
from jaxscape.evaluate import is_refusal
from jaxscape.files import write_whole
from jaxscape.landscape import Axis, Landscape
from jaxscape.processes import from_first

GENERATIONS, PROMPTS, FIGURE = "generations.jsonl", "prompts.jsonl", "landscape.png"
SCAN = rundir.Kind(
    "scan",
    state=GENERATIONS,
    marks=frozenset({"weights", "directions", "axes"}),
    computed=(landscape.FILE_NAME, FIGURE, trajectory.FILE_NAME, "output*.jsonl"),
)

Point = tuple[int, tuple[float, ...]]
"""A direction set's index, and coordinates along its directions."""


class Run:
    """The points of a run, those evaluated first.

    Attributes:
        points: all of them, direction set by direction set, the last axis fastest.
        num_done: how many are evaluated: the first ones.
        refused, finite: bool[points, prompts], of those that are evaluated.
    """

    def __init__(
        self, axes: Sequence[Axis], num_sets: int, prompts: Sequence[str], out: tuple[Path, BinaryIO] | None = None
    ) -> None:
        grid = itertools.product(*(axis.values for axis in axes))
        self.axes, self.prompts = tuple(axes), tuple(prompts)
        self.points: list[Point] = list(itertools.product(range(num_sets), grid))
        self.num_done = 0
        self.refused = np.zeros((len(self.points), len(prompts)), bool)
        self.finite = np.ones((len(self.points), len(prompts)), bool)
        self._shape = (num_sets, *(len(axis.values) for axis in axes))
        self._out = out
        if out is not None:
            self._restore(*out)

    def append(self, completions: Sequence[Completion]) -> None:
        """Add the next point's completions, one a prompt. When this returns, the point is on disk."""
        index, coords = self.points[self.num_done]
        records = []
        for prompt, completion in zip(self.prompts, completions, strict=True):
            record = {
                "direction": index,
                "coords": list(coords),
                "prompt": prompt,
                "generation": completion.text,
                "refused": is_refusal(completion.text),
            }
            record |= {"finite": False} if not completion.finite else {}
            records.append(record | ({"cut": True} if completion.cut else {}))
        self._add(records)
        if self._out is not None:
            directory, file = self._out
            file.write(_json_lines(records).encode())
            file.flush()
            os.fsync(file.fileno())
            self.landscape().save(directory)

    def landscape(self) -> Landscape:
        """The landscape as far as it is evaluated."""
        return Landscape.from_outcomes(
            self.axes,
            refused=self.refused.reshape(*self._shape, -1),
            nonfinite=(~self.finite).sum(axis=1).reshape(self._shape),
            evaluated=(np.arange(len(self.points)) < self.num_done).reshape(self._shape),
        )

    def outcomes(self) -> tuple[list[list[bool]], list[list[bool]]]:
        """`refused` and `finite` of the points that are evaluated."""
        return self.refused[: self.num_done].tolist(), self.finite[: self.num_done].tolist()

    def take(self, refused: list[list[bool]], finite: list[list[bool]]) -> None:
        """Have the outcomes that another process's run has."""
        self.num_done = len(refused)
        if refused:
            self.refused[: self.num_done], self.finite[: self.num_done] = refused, finite

    def _add(self, records: Sequence[Mapping[str, Any]]) -> None:
        self.refused[self.num_done] = [record["refused"] for record in records]
        self.finite[self.num_done] = [record.get("finite", True) for record in records]
        self.num_done += 1

    def _restore(self, directory: Path, file: BinaryIO) -> None:
        """Take over the whole points of the file, and cut off what follows them."""
        file.seek(0)
        lines = file.read().split(b"\n")[:-1]  # what follows the last newline is half a line
        num_prompts = len(self.prompts)
        whole = len(lines) // num_prompts
        try:
            records = [json.loads(line) for line in lines[: whole * num_prompts]]
            expected = itertools.product(self.points[:whole], self.prompts)
            for record, ((index, coords), prompt) in zip(records, expected, strict=True):
                if (record["direction"], record["coords"], record["prompt"]) != (index, list(coords), prompt):
                    raise ValueError(f"a line for {record['coords']} where one for {list(coords)} belongs")
            for group in range(whole):
                self._add(records[group * num_prompts : (group + 1) * num_prompts])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{directory / GENERATIONS} is damaged ({reason(error)}); start over with --overwrite."
            ) from error
        file.truncate(sum(len(line) + 1 for line in lines[: whole * num_prompts]))


@contextmanager
def open_run(
    directory: Path | None,
    config: Mapping[str, Any],
    axes: Sequence[Axis],
    num_sets: int,
    prompts: Sequence[str],
    sent: Sequence[str],
    overwrite: bool = False,
) -> Iterator[Run]:
    """Start a run in a directory, or go on with the one that is there; None keeps it in memory. See `rundir.opened`.

    `sent` is what the model is given for each prompt.
    """
    with rundir.opened(directory, config, SCAN, overwrite) as file:
        if directory is None or file is None:
            run = Run(axes, num_sets, prompts)
        else:
            pairs = ({"prompt": prompt, "sent": text} for prompt, text in zip(prompts, sent, strict=True))
            write_whole(directory / PROMPTS, _json_lines(pairs))
            run = Run(axes, num_sets, prompts, (directory, file))
            run.landscape().save(directory)
        run.take(*from_first(run.outcomes))
        yield run


def _json_lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


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
            write_whole(paths[-1], _json_lines(steps))
        return paths
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"The run in {directory} cannot be exported ({reason(error)}).") from error
