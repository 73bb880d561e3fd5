"""Measures of weights along the directions and axes of a landscape, and the run that keeps them.

`measures.jsonl` is the only state of a run. Its first line has the model's own answers, if a measure is made from them.
Each further line has what every measure gives for each prompt or question at one point. It grows in a fixed order, as
the generations of a scan do, and every other file is computed from it.
"""

import itertools
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from jaxtyping import Float

from jaxscape.directions.base import Recipe
from jaxscape.directions.kinds import DirectionLike, make_directions, prepare
from jaxscape.directions.point import materialise, materialise_by_tensor
from jaxscape.directions.storage import Direction
from jaxscape.evaluate.measure import Subject, WeightMeasure
from jaxscape.evaluate.measures import check_names, make_measures
from jaxscape.landscapes import measurement
from jaxscape.landscapes.axes import Axis, point_text
from jaxscape.landscapes.choice import choose_grid
from jaxscape.landscapes.measurement import Measurement
from jaxscape.landscapes.scan_settings import ScanSettings
from jaxscape.models.checkpoint import Params
from jaxscape.models.model import Model
from jaxscape.prompts.sets import load_prompts
from jaxscape.runtime import rundir
from jaxscape.runtime.errors import UserError, as_list, as_texts, reason
from jaxscape.runtime.files import append_json_lines, checksum, cut_after, whole_lines
from jaxscape.runtime.preemption import postponed
from jaxscape.runtime.processes import from_first
from jaxscape.runtime.progress import progress_display
from jaxscape.runtime.remote import run_directory

STATE, FIGURE = "measures.jsonl", "measures.png"
MEASURE = rundir.RunKind(
    "run of measures",
    state=STATE,
    marks=frozenset({"weights", "directions", "grid", "measures"}),
    computed=(measurement.FILE_NAME, FIGURE),
    descriptive=frozenset({"direction_names", "like"}),
)
DEFAULT_MEASURES = ("first-token", "damage")
DEFAULT_HARMLESS, NUM_HARMLESS = "benign", 40

Samples = dict[str, Float[np.ndarray, "samples columns"]]
"""What each measure gives at a point, by its name."""


def measure(
    model: Model,
    directions: Sequence[DirectionLike | Sequence[DirectionLike]] = (),
    measures: Sequence[str] = DEFAULT_MEASURES,
    *,
    like: str | Path | None = None,
    prompts: Sequence[str] = (),
    targets: Sequence[str] | None = None,
    refusal: str | None = None,
    harmless: Sequence[str] | None = None,
    num_shots: int | None = None,
    steps: int = 20,
    radius: float | None = None,
    axes: Sequence[Axis] | None = None,
    control: bool = True,
    system_prompt: str = "default",
    thinking: str = "default",
    out: str | Path | None = None,
    overwrite: bool = False,
    describe: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Measurement:
    """Measure a model's weights at each point of a grid in weight space, without decoding answers there.

    Arguments:
        directions, steps, radius, axes, control, system_prompt, thinking, out, overwrite, describe, progress: as in
            `jaxscape.scan`.
        measures: names: `first-token` (probability of refusal at the first token), `damage` (KL divergence of the first
            token on harmless prompts from the unperturbed model's), `likelihood` (log-likelihood per token of a target
            that complies, minus that of a refusal), `multiple-choice:FILE` (accuracy in percent), and
            `perplexity:SET` or `perplexity:FILE`.
        like: the directory of a scan of this model, whose directions, axes, prompts and ways to ask them are taken.
        prompts: harmful prompts, for `first-token` and `likelihood`.
        targets: for `likelihood`: for each prompt, the beginning of an answer that complies.
        refusal: for `first-token` and `likelihood`: the beginning of a refusal; by default those of the model's own
            answers to the prompts, which are generated once, at the model itself.
        harmless: for `damage`: harmless prompts; by default 40 of the set `benign`.
        num_shots: for `multiple-choice`: number of solved examples before a question; by default 5 if there is a file
            of examples, and else 0.

    Returns:
        The complete measurement. If `out` holds it already, nothing is computed again.

    Raises:
        UserError: an argument cannot be used, or `out` holds a run of another configuration. Nothing is written then.
    """
    names = as_list(measures, "measures")
    check_names(names)
    kinds = {name.partition(":")[0] for name in names}
    scanned = None if like is None else ScanSettings.load(run_directory(like))
    if scanned is not None:
        if len(as_list(directions, "directions")) or axes is not None or len(prompts):
            raise UserError(f"{like} gives the directions, the axes and the prompts: leave out your own.")
        scanned.check_weights(model)
        directions, axes, prompts = scanned.directions, scanned.axes, scanned.prompts
        system_prompt, thinking = scanned.system_prompt, scanned.thinking
    recipes, axes = choose_grid(directions, axes, steps, radius, control and scanned is None)
    texts = as_texts(prompts, "prompts")
    if not texts and kinds & {"first-token", "likelihood"}:
        raise UserError("There are no prompts: give at least one.")
    if harmless is None:
        harmless = load_prompts(DEFAULT_HARMLESS, NUM_HARMLESS)
    directory = None if out is None else run_directory(out)
    subject = Subject(
        model,
        prompts=texts,
        targets=None if targets is None else as_texts(targets, "targets"),
        refusal=refusal,
        harmless=as_texts(harmless, "harmless"),
        num_shots=num_shots,
        recorded=None if overwrite else from_first(partial(_recorded_answers, directory, len(texts))),
        system_prompt=system_prompt,
        thinking=thinking,
    )
    prepared = prepare(recipes, model)
    if scanned is not None:
        scanned.check_directions(prepared)
        if texts:
            scanned.check_tokens(subject.prompt_tokens)
    known, known_tokens = (
        None if overwrite else from_first(partial(rundir.recorded_value, directory, key))
        for key in ("directions", "tokens")
    )
    made = make_measures(names, subject)
    config = {
        **model.described(),
        "directions": [[one for direction in item for one in direction.ids_as_in(known)] for item in prepared],
        "direction_names": [[str(direction.recipe) for direction in item] for item in prepared],
        "grid": [axis.described() for axis in axes],
        "measures": {measure.name: checksum(json.dumps(measure.settings)) for measure in made},
        "prompts": checksum(texts),
        "targets": None if subject.targets is None else checksum(list(subject.targets)),
        "refusal": refusal,
        "harmless": checksum(list(subject.harmless)) if "damage" in kinds else None,
        # Runs that are older than these checksums go on without them.
        **(_asked(subject, kinds) if known is None or known_tokens is not None else {}),
        "system_prompt": system_prompt,
        "thinking": thinking,
        **({} if like is None else {"like": str(like)}),
        **(describe or {}),
    }
    with _open(directory, config, axes, len(recipes), made, subject, overwrite) as run:
        _evaluate(run, model, [[direction.recipe for direction in item] for item in prepared], made, progress)
        return run.measurement()


def _asked(subject: Subject, kinds: Collection[str]) -> dict[str, Any]:
    """Entries of `config.json`: checksums of the decoder's configuration, and of the token ids that the model is given.

    Arguments:
        kinds: the measures' names, without what follows a colon.
    """
    harmless = subject.chat_tokens(subject.harmless) if "damage" in kinds else []
    return {
        "architecture": checksum((subject.model.config, subject.model.eos_token_ids)),
        "tokens": checksum([subject.prompt_tokens if subject.prompts else [], harmless]),
    }


def _evaluate(
    run: "_Run",
    model: Model,
    sets: Sequence[Sequence[Recipe]],
    made: Sequence[WeightMeasure],
    progress: bool,
) -> None:
    """Evaluate the points that are left, and report each. SIGTERM ends this after a point."""
    done, total, started = len(run.samples), len(run.points), time.monotonic()
    with progress_display(progress) as bar, postponed() as stop_if_asked:
        task = bar.add_task("measure", total=total, completed=done)
        if done:
            bar.print(f"resuming after {done} of {total} points")
        for index, points in itertools.groupby(run.points[done:], key=lambda point: point[0]):
            drawn = params = None  # frees the previous set's directions before the next ones are made
            drawn = make_directions(sets[index], model)
            for _, coords in points:
                params = _params_at(model, drawn, coords, params)
                run.append({measure.name: measure.samples(params) for measure in made})
                bar.update(task, completed=len(run.samples))
                bar.print(run.report((time.monotonic() - started) / (len(run.samples) - done)))
                stop_if_asked()


def _params_at(
    model: Model, directions: Sequence[Direction], coords: Sequence[float], previous: Params | None
) -> Params:
    """The parameters at a point on the devices, in the buffers of the previous point's parameters."""
    is_on_host = isinstance(jax.tree.leaves(model.params)[0], np.ndarray)
    form = partial(materialise_by_tensor, shardings=model.shardings) if is_on_host else materialise
    moved: Params = form(model.params, directions, np.asarray(coords, np.float32), previous)
    return moved


class _Run:
    """The points of a run in the order in which they are evaluated, and what is known of the first ones.

    Attributes:
        points: the index of a direction set, and coordinates along its directions; the last axis varies fastest.
        samples: what each measure gives at the points that are evaluated.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        num_sets: int,
        made: Sequence[WeightMeasure],
        out: tuple[Path, BinaryIO] | None,
    ) -> None:
        grid = itertools.product(*(axis.values for axis in axes))
        self.axes, self.points = tuple(axes), list(itertools.product(range(num_sets), grid))
        self.samples: list[Samples] = []
        self._num_sets, self._made, self._out = num_sets, made, out

    def append(self, samples: Samples) -> None:
        """Add what the measures give at the next point, and write it to disk."""
        index, coords = self.points[len(self.samples)]
        self.samples.append(samples)
        record = {"direction": index, "coords": list(coords), "samples": _each(_without_nan, samples)}
        self.write(record)
        self.save()

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a line to the state."""
        if self._out is not None:
            append_json_lines(self._out[1], [record])

    def save(self) -> None:
        if self._out is not None:
            self.measurement().save(self._out[0])

    def restore(self, lines: Sequence[bytes]) -> int:
        """Take over the points that these lines of the state have; return their number."""
        names = {measure.name for measure in self._made}
        for (index, coords), line in zip(self.points, lines, strict=False):
            record = json.loads(line)
            if (record["direction"], record["coords"]) != (index, list(coords)) or record["samples"].keys() != names:
                raise ValueError(f"a line that should be for {list(coords)} is for {record['coords']}")
            self.samples.append(_each(lambda rows: np.array(rows, np.float64), record["samples"]))
        return len(self.samples)

    def measurement(self) -> Measurement:
        """The measurement of the points that are evaluated so far."""
        return Measurement.from_samples(self.axes, self._num_sets, self._made, self.samples)

    def report(self, seconds: float) -> str:
        """One line about the point that was evaluated last."""
        done, total = len(self.samples), len(self.points)
        index, coords = self.points[done - 1]
        place = point_text(self.axes, coords)
        values = (f"{name} {value['value'].flat[done - 1]:.4g}" for name, value in self.measurement().measures.items())
        left = timedelta(seconds=round(seconds * (total - done)))
        return f"{done:>{len(str(total))}}/{total}  direction {index}  {place}  {'  '.join(values)}  {left} left"


@contextmanager
def _open(
    directory: Path | None,
    config: Mapping[str, Any],
    axes: Sequence[Axis],
    num_sets: int,
    made: Sequence[WeightMeasure],
    subject: Subject,
    overwrite: bool,
) -> Iterator[_Run]:
    """Start a run in a directory, or resume the one that is there; see `rundir.open_run_directory`."""
    with rundir.open_run_directory(directory, config, MEASURE, overwrite) as file:
        run = _Run(axes, num_sets, made, None if directory is None or file is None else (directory, file))
        if directory is not None and file is not None:
            lines = whole_lines(file)
            try:
                cut_after(file, lines[: 1 + run.restore(lines[1:])] if lines else [])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f"{directory / STATE} is damaged ({reason(error)}): start over with --overwrite."
                ) from error
            if not lines:
                run.write({"answers": vars(subject).get("own_answers")})  # None if no measure asked for them
            run.save()
        run.samples = from_first(lambda: [_each(np.ndarray.tolist, samples) for samples in run.samples])
        run.samples = [_each(lambda rows: np.array(rows, np.float64), samples) for samples in run.samples]
        yield run


def load_samples(directory: str | Path) -> dict[str, Float[np.ndarray, " directions *grid samples columns"]]:
    """What each measure gave for each prompt or question at the points of a finished run, by the measure's name.

    NaN stands for what was not finite.

    Raises:
        UserError: the directory holds no finished run of measures, or its state is damaged.
    """
    measurement, path = Measurement.load(directory), run_directory(directory) / STATE
    if not measurement.complete:
        raise UserError(f"The run in {directory} is not finished; run its command again to finish it first.")
    try:
        points = [json.loads(line)["samples"] for line in path.read_bytes().split(b"\n")[1:-1]]
        arrays = {
            name: np.array([point[name] for point in points], np.float64).reshape(
                *values["value"].shape, *np.shape(points[0][name])
            )
            for name, values in measurement.measures.items()
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({reason(error)}): start over with --overwrite.") from error
    return arrays


def _recorded_answers(directory: Path | None, num_prompts: int) -> list[str] | None:
    """The model's own answers in the state of a run that is there; None if there are none that can be used."""
    try:
        if directory is None:
            return None
        with (directory / STATE).open("rb") as file:
            line = file.readline()
        answers = json.loads(line)["answers"] if line.endswith(b"\n") else None
        return answers if isinstance(answers, list) and len(answers) == num_prompts else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _without_nan(samples: Float[np.ndarray, "samples columns"]) -> list[list[float | None]]:
    """The samples as JSON can hold them, in which None stands for what is not finite."""
    cells = samples.astype(object)
    cells[~np.isfinite(samples)] = None
    rows: list[list[float | None]] = cells.tolist()
    return rows


def _each(function: Any, samples: Mapping[str, Any]) -> dict[str, Any]:
    return {name: function(values) for name, values in samples.items()}
