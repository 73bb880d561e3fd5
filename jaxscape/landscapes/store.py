"""The directory of a scan: each finished point is on disk before the next one begins.

`generations.jsonl` is the only state of a run. Each of its lines is the answer to one prompt at one point. It grows by
whole points in a fixed order. When a run is resumed, the points whose lines are all there are kept, and what a killed
process wrote after them is cut off. Every other file is computed from it.

`labels-NAME.jsonl` keeps what an evaluator said of each answer, so that no answer is judged twice. What
is missing there is judged from the generations.
"""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxscape.engine.scheduler import Completion
from jaxscape.evaluate.base import Evaluator, Label
from jaxscape.evaluate.evaluators import DEFAULT_EVALUATOR
from jaxscape.finetuning import trajectory
from jaxscape.landscapes import landscape
from jaxscape.landscapes.axes import Axis
from jaxscape.landscapes.labels import LABEL_FILES, LabelBook
from jaxscape.landscapes.landscape import Landscape
from jaxscape.runtime import rundir
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import cut_after, to_json_lines, whole_lines, write_whole
from jaxscape.runtime.processes import from_first

GENERATIONS, PROMPTS, FIGURE = "generations.jsonl", "prompts.jsonl", "landscape.png"
COHERENCE_FILE = "coherence.json"
SCAN = rundir.RunKind(
    "scan",
    state=GENERATIONS,
    marks=frozenset({"weights", "directions", "axes"}),
    computed=(
        landscape.FILE_NAME,
        FIGURE,
        "landscape-*.png",
        trajectory.FILE_NAME,
        "output*.jsonl",
        LABEL_FILES,
        COHERENCE_FILE,
    ),
    descriptive=frozenset({"direction_names", "direction_files", "interpolate_to"}),  # checksums identify directions,
)

Point = tuple[int, tuple[float, ...]]
"""The index of a direction set, and coordinates along its directions."""


class Run:
    """The points of a scan and their outcomes, in the order in which they are evaluated.

    Attributes:
        points: all points, direction set by direction set; the last axis varies fastest.
        num_done: how many points are evaluated; they are the first ones.
        refused: bool[points, prompts], whether each answer counts as a refusal; only for evaluated points.
        finite: bool[points, prompts], False if an answer met a NaN or infinite logit; only for evaluated points.
        unanswered: bool[points, prompts], whether a text has thinking in it and no answer; only for evaluated points.
        labels: what evaluators said of the answers at the evaluated points.
        evaluator: name of the evaluator that decides the ASR.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        num_sets: int,
        prompts: Sequence[str],
        out: tuple[Path, BinaryIO] | None = None,
        evaluator: str = DEFAULT_EVALUATOR,
    ) -> None:
        grid = itertools.product(*(axis.values for axis in axes))
        self.axes, self.prompts = tuple(axes), tuple(prompts)
        self.points: list[Point] = list(itertools.product(range(num_sets), grid))
        self.num_done = 0
        self.refused = np.zeros((len(self.points), len(prompts)), bool)
        self.finite = np.ones((len(self.points), len(prompts)), bool)
        self.unanswered = np.zeros((len(self.points), len(prompts)), bool)
        self._shape = (num_sets, *(len(axis.values) for axis in axes))
        self._out, self.evaluator = out, evaluator
        self._unwritten: list[list[dict[str, Any]]] = []  # the lines of a run without a directory, point by point
        self.labels = LabelBook(self.points, len(prompts), None if out is None else out[0])
        if out is not None:
            self._restore(*out)
            self.labels.restore(self.num_done)

    def append(
        self,
        completions: Sequence[Completion],
        refused: Sequence[bool],
        unanswered: Sequence[bool],
        labels: Iterable[tuple[Evaluator, Sequence[Label | None]]] = (),
    ) -> None:
        """Add the answers and verdicts of the next point, one for each prompt, and write them to disk.

        Arguments:
            unanswered: see the attribute.
            labels: the labels that are to be kept, with the evaluators that gave them.
        """
        index, coords = self.points[self.num_done]
        records = []
        outcomes = zip(self.prompts, completions, refused, unanswered, strict=True)
        for prompt, completion, verdict, has_no_answer in outcomes:
            record = {
                "direction": index,
                "coords": list(coords),
                "prompt": prompt,
                "generation": completion.text,
                "refused": verdict,
            }
            record |= {"finite": False} if not completion.finite else {}
            record |= {"unanswered": True} if has_no_answer else {}
            records.append(record | ({"cut": True} if completion.cut else {}))
        self._add(records)
        if self._out is None:
            self._unwritten.append(records)
        else:
            file = self._out[1]
            file.write(to_json_lines(records).encode())
            file.flush()
            os.fsync(file.fileno())
        for evaluator, given in labels:
            self.labels.append(evaluator, given)
        self.save()

    def save(self) -> None:
        """Write `landscape.json`, if the run has a directory."""
        if self._out is not None:
            self.landscape().save(self._out[0])

    def records(self, start: int) -> list[list[dict[str, Any]]]:
        """The lines of `generations.jsonl`, point by point, from the evaluated point number `start` on."""
        if self._out is None:
            return self._unwritten[start:]
        lines, size = whole_lines(self._out[1]), len(self.prompts)
        return [list(map(json.loads, lines[size * i : size * (i + 1)])) for i in range(start, self.num_done)]

    def landscape(self) -> Landscape:
        """The landscape of the points that are evaluated so far."""
        return Landscape.from_outcomes(
            self.axes,
            refused=self.refused.reshape(*self._shape, -1),
            nonfinite=(~self.finite).sum(axis=1).reshape(self._shape),
            evaluated=(np.arange(len(self.points)) < self.num_done).reshape(self._shape),
            unanswered=self.unanswered.sum(axis=1).reshape(self._shape),
            measures=self.labels.measures(self._shape),
            shares=self.labels.shares(self._shape),
            complied=self.labels.complied(self._shape),
            disagreement=self.labels.disagreement(self._shape, self.evaluator, self.refused[: self.num_done]),
        )

    def outcomes(self) -> dict[str, Any]:
        """The outcomes of the evaluated points."""
        arrays = (self.refused, self.finite, self.unanswered)
        return {
            "arrays": [array[: self.num_done].tolist() for array in arrays],
            "labels": [self.labels.rows, self.labels.checksums],
        }

    def set_outcomes(self, outcomes: dict[str, Any]) -> None:
        """Replace the outcomes by those that `outcomes` returned in another process."""
        self.num_done = len(outcomes["arrays"][0])
        self.labels.rows, self.labels.checksums = outcomes["labels"]
        if self.num_done:
            for array, values in zip((self.refused, self.finite, self.unanswered), outcomes["arrays"], strict=True):
                array[: self.num_done] = values

    def _add(self, records: Sequence[Mapping[str, Any]]) -> None:
        self.refused[self.num_done] = [record["refused"] for record in records]
        self.finite[self.num_done] = [record.get("finite", True) for record in records]
        self.unanswered[self.num_done] = [record.get("unanswered", False) for record in records]
        self.num_done += 1

    def _restore(self, directory: Path, file: BinaryIO) -> None:
        """Read the points whose lines are all in the file, and cut off what follows them."""
        lines, num_prompts = whole_lines(file), len(self.prompts)
        num_whole = len(lines) // num_prompts
        lines = lines[: num_whole * num_prompts]
        try:
            records = [json.loads(line) for line in lines]
            expected = itertools.product(self.points[:num_whole], self.prompts)
            for record, ((index, coords), prompt) in zip(records, expected, strict=True):
                if (record["direction"], record["coords"], record["prompt"]) != (index, list(coords), prompt):
                    raise ValueError(
                        f"a line that should be for {list(coords)} is for {record['coords']}, "
                        f"or for another direction or prompt"
                    )
            for start in range(0, len(records), num_prompts):
                self._add(records[start : start + num_prompts])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{directory / GENERATIONS} is damaged ({reason(error)}): start over with --overwrite."
            ) from error
        cut_after(file, lines)


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
    """Start a run in a directory, or resume the one that is there; see `rundir.open_run_directory`.

    Arguments:
        directory: None keeps the run in memory only.
        sent: for each prompt, the text that the model is given.
    """
    evaluator = config.get("evaluator", DEFAULT_EVALUATOR)
    with rundir.open_run_directory(directory, config, SCAN, overwrite) as file:
        if directory is None or file is None:
            run = Run(axes, num_sets, prompts, evaluator=evaluator)
        else:
            pairs = ({"prompt": prompt, "sent": text} for prompt, text in zip(prompts, sent, strict=True))
            write_whole(directory / PROMPTS, to_json_lines(pairs))
            run = Run(axes, num_sets, prompts, (directory, file), evaluator)
            run.save()
        run.set_outcomes(from_first(run.outcomes))
        yield run


@contextmanager
def reopen_run(directory: Path) -> Iterator[tuple[Run, list[str]]]:
    """A finished run, to which nothing but labels is added, and the texts that the model was given for its prompts.

    Raises:
        UserError: the directory holds no finished scan, or another process is running in it.
    """
    with rundir.reopen_run_directory(directory, SCAN) as (config, file):
        try:
            pairs = [json.loads(line) for line in (directory / PROMPTS).read_bytes().split(b"\n")[:-1]]
            prompts, sent = ([pair[key] for pair in pairs] for key in ("prompt", "sent"))
            axes = list(map(Axis.read, config["axes"]))
            num_sets, evaluator = len(config["directions"]), str(config.get("evaluator", DEFAULT_EVALUATOR))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"The run in {directory} cannot be read ({reason(error)}).") from error
        run = Run(axes, num_sets, prompts, (directory, file), evaluator)
        if run.num_done < len(run.points):
            raise UserError(f"The run in {directory} is not finished; run its command again to finish it first.")
        yield run, sent
