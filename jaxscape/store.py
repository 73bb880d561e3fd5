"""Run directories: what is evaluated is on disk, and what is on disk need not be evaluated again.

`generations.jsonl` is a run's only state. It grows by whole points, in a fixed order; whatever follows the last whole
point is what a killed run left, and is cut off. Every other file is computed from it.
"""

import fcntl
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxscape import landscape
from jaxscape.decode import Completion
from jaxscape.errors import UserError
from jaxscape.evaluate import is_refusal
from jaxscape.files import temporary_name, write_whole
from jaxscape.landscape import Axis, Landscape

CONFIG, GENERATIONS, FIGURE = "config.json", "generations.jsonl", "landscape.png"
RUN_FILES = (CONFIG, GENERATIONS, landscape.FILE_NAME, FIGURE)

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
            records.append(record if completion.finite else record | {"finite": False})
        self._add(records)
        if self._out is not None:
            directory, file = self._out
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
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
                f"{directory / GENERATIONS} is damaged ({type(error).__name__}: {error}); start over with --overwrite."
            ) from error
        file.truncate(sum(len(line) + 1 for line in lines[: whole * num_prompts]))


@contextmanager
def open_run(
    directory: Path | None,
    config: Mapping[str, Any],
    axes: Sequence[Axis],
    num_sets: int,
    prompts: Sequence[str],
    overwrite: bool = False,
) -> Iterator[Run]:
    """Start a run in a directory, or go on with the one that is there; None keeps it in memory.

    Raises:
        UserError: the directory cannot be used: see `check_directory`; or it holds a run of another configuration, a
            damaged one, or one that is going on.
    """
    if directory is None:
        yield Run(axes, num_sets, prompts)
        return
    check_directory(directory, overwrite)
    text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
    if not overwrite:
        _check_config(directory / CONFIG, json.loads(text))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / GENERATIONS).open("a+b")
    except OSError as error:
        raise UserError(f"The run cannot be written to {directory} ({error}).") from error
    with file:
        _lock(file, directory)
        if overwrite:  # first what is computed from the generations, so that nothing ever stands without them
            for path in (directory / landscape.FILE_NAME, directory / FIGURE, *directory.glob("output*.jsonl")):
                path.unlink(missing_ok=True)
            file.truncate(0)
        else:
            _check_config(directory / CONFIG, json.loads(text))  # again: another process may have come first
        write_whole(directory / CONFIG, text)
        run = Run(axes, num_sets, prompts, (directory, file))
        run.landscape().save(directory)
        yield run


def check_directory(directory: Path, overwrite: bool = False) -> None:
    """Raise a `UserError` if no run could be kept in the directory: it is a file, is not writable, or holds other
    files and no run. Nothing is made or changed."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{directory} cannot be a run's directory, because {existing} is a file.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{directory} cannot be written, because {existing} is read-only; choose another --out.")
    if not directory.is_dir():
        return
    if (directory / CONFIG).exists():
        if not _is_run_config(directory / CONFIG):
            raise UserError(f"{directory} holds something else than a run (see its {CONFIG}); choose another --out.")
        return
    # A run that was killed before it had its configuration leaves an empty file and half of another.
    started = {temporary_name(directory / CONFIG).name}
    if (directory / GENERATIONS).exists() and not (directory / GENERATIONS).stat().st_size:
        started.add(GENERATIONS)
    if others := sorted(path.name for path in directory.iterdir() if path.name not in started):
        raise UserError(
            f"{directory} has files in it ({others[0]}, for example) and is no run's directory; choose another --out."
        )


def _is_run_config(path: Path) -> bool:
    """Whether the file is a run's configuration, or a damaged file that may have been one."""
    try:
        return {"weights", "directions", "axes"} <= json.loads(path.read_text(encoding="utf-8")).keys()
    except (ValueError, AttributeError, RecursionError):
        return (path.parent / GENERATIONS).exists()


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise a `UserError` that names what differs, if the directory's run was configured otherwise."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(key for key in found.keys() | config.keys() if found.get(key) != config.get(key))
    except FileNotFoundError:
        return
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); start over with --overwrite.") from error
    if differing:
        raise UserError(
            f"{path.parent} holds a run with another configuration (different: {', '.join(differing)}); choose "
            f"another --out, or start over with --overwrite."
        )


def _lock(file: BinaryIO, directory: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"Another process is running in {directory}; wait for it, or choose another --out.") from error
    except OSError:
        pass  # some network drives have no locks; a run there is better than none


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
            write_whole(paths[-1], "".join(json.dumps(step, ensure_ascii=False) + "\n" for step in steps))
        return paths
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"The run in {directory} cannot be exported ({type(error).__name__}: {error}).") from error
