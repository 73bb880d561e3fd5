"""The runs below a directory, with their states and numbers. They are read without JAX, and nothing is written."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxscape.landscapes.landscape import Landscape
from jaxscape.landscapes.radii import CERTIFICATE_FILE, RADII_FILE, Certificate, Radii
from jaxscape.landscapes.shards import Shard
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import is_locked, read_json, whole_lines
from jaxscape.runtime.remote import is_remote, run_directory


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        done, total: how many of its parts are finished, and how many it has; None if that is not known yet.
        unit: what the parts are, such as `points`.
        is_finished: whether the run's result is there.
        numbers: its result in a few words; empty if there is none yet.
    """

    done: int
    total: int | None
    unit: str
    is_finished: bool
    numbers: str = ""


@dataclass(frozen=True)
class FoundRun:
    """A run on disk.

    Attributes:
        directory: where it is.
        kind: `scan`, `radius`, `certificate`, `measures` or `finetuning`.
        model: what `--model` was; empty if that cannot be read.
        state: `finished`, `running`, `stopped` or `damaged`; `unfinished` at a URL, where it cannot be told whether a
            run is running.
        progress: how much of it is done, such as `3 of 11 points`; empty if that cannot be read.
        result: its numbers in a few words, or what is damaged; empty while there are no numbers.
        changed: when its state was last written, in seconds since 1970.
    """

    directory: Path
    kind: str
    model: str
    state: str
    progress: str
    result: str
    changed: float


def find_runs(directory: str | Path) -> list[FoundRun]:
    """The runs in a directory, which may be a URL, and in the directories below it, those that changed last first.
    Hidden directories, those inside a run, and those that cannot be read are left out.

    Raises:
        UserError: there is no such directory.
    """
    directory = run_directory(directory, RESULTS)
    if not directory.is_dir():
        raise UserError(f"There is no directory {directory}: give one that holds runs; jaxscape scan makes runs/.")
    runs = []
    for path, names, files in os.walk(directory):
        run = _run_in(Path(path)) if CONFIG in files else None
        if run is not None:
            runs.append(run)
        names[:] = [] if run is not None else [name for name in names if not name.startswith(".")]
    return sorted(runs, key=lambda run: (-run.changed, run.directory))


def _run_in(directory: Path) -> FoundRun | None:
    """The run in a directory that has a configuration, or None if that is of something else."""
    config: dict[str, Any] = {}
    problem = ""
    try:
        config = read_json(directory / CONFIG)
        kind = next((name for name, kind in KINDS.items() if kind.marks <= config.keys()), None)
    except UserError as error:
        kind = next((name for name, kind in KINDS.items() if (directory / kind.state).is_file()), None)
        problem = str(error)
    if kind is None:
        return None
    state_file = directory / KINDS[kind].state
    progress = None
    if not problem:
        try:
            progress = KINDS[kind].progress(directory, config)
        except Exception as error:  # whatever a damaged run has in its files, the others are to be listed
            problem = reason(error)
    changed = max((path.stat().st_mtime for path in (state_file, directory / CONFIG) if path.is_file()), default=0.0)
    return FoundRun(
        directory=directory,
        kind="certificate" if "sigma" in config else kind,
        model=str(config.get("model", "")),
        state=_state(progress, state_file),
        progress="" if progress is None else progress_text(progress),
        result=problem if progress is None else progress.numbers,
        changed=changed,
    )


def _state(progress: Progress | None, state_file: Path) -> str:
    if progress is None:
        return "damaged"
    if is_locked(state_file):
        return "running"
    if progress.is_finished:
        return "finished"
    return "unfinished" if is_remote(state_file) else "stopped"


def progress_text(progress: Progress) -> str:
    """How far a run is, such as `3 of 11 points`."""
    return f"{progress.done} {'' if progress.total is None else f'of {progress.total} '}{progress.unit}"


def _scan(directory: Path, config: Mapping[str, Any]) -> Progress:
    try:
        land = Landscape.load(directory)
    except UserError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        return Progress(0, None if "adaptive" in config else _num_points(config), "points", False)
    if (shard := Shard.read(config)) is not None:
        return _shard(land, shard)
    if not land.complete:
        total = None if "adaptive" in config else land.asr.size
        return Progress(int((land.asr == land.asr).sum()), total, "points", False)
    judges = [*config.get("further_evaluators", ()), *([COHERENCE] if land.shares else [])]
    if not _have_judged(judges, land, land.num_evaluated):
        return Progress(land.num_evaluated, land.num_evaluated, "points", False)
    visage = land.visage_values
    if visage is None:
        numbers = f"mean ASR {land.asr.mean():.1f} %"
    else:
        numbers = f"VISAGE {visage['paper']:.2f} ({visage['interval'][0]:.2f} to {visage['interval'][1]:.2f})"
    return Progress(land.num_evaluated, land.num_evaluated, "points", True, numbers)


def _shard(land: Landscape, shard: Shard) -> Progress:
    """How far a part of a scan is."""
    done, total = int((~np.isnan(land.asr)).sum()), shard.num_points
    is_finished = done == total and _have_judged(shard.labels, land, total)
    return Progress(done, total, "points", is_finished, str(shard))


def _have_judged(names: Iterable[str], land: Landscape, num_points: int) -> bool:
    """Whether each of these evaluators has judged the answers at this number of points."""
    judged = [land.shares if name == COHERENCE else land.measures.get(name, {}) for name in names]
    return all((~np.isnan(measure.get("complied", np.nan))).sum() == num_points for measure in judged)


def _num_points(config: Mapping[str, Any]) -> int:
    """The number of points of a grid or a list, or of a part of it, from a run's configuration."""
    if (shard := Shard.read(config)) is not None:
        return shard.num_points
    points = config.get("points")
    grid = math.prod(len(axis["values"]) for axis in config["axes"]) if points is None else len(points)
    return len(config["directions"]) * grid


def _radius(directory: Path, config: Mapping[str, Any]) -> Progress:
    if "sigma" in config:
        if not (directory / CERTIFICATE_FILE).exists():
            return Progress(0, None, "draws", False)
        proof = Certificate.load(directory)
        numbers = f"kept with probability at least {proof.probability:.3f} at {proof.sigma:g}" if proof.complete else ""
        return Progress(len(proof.exceeded), proof.num_draws, "draws", proof.complete, numbers)
    if not (directory / RADII_FILE).exists():
        return Progress(0, None, "rays", False)
    radii, numbers = Radii.load(directory), ""
    if radii.complete and radii.rays:
        mean = radii.mean()
        interval = "" if math.isnan(mean.low) else f" ({mean.low:.3g} to {mean.high:.3g})"
        numbers = f"radius {'at least ' if radii.is_bound else ''}{mean.value:.3g}{interval}"
    return Progress(len(radii.rays), radii.num_rays, "rays", radii.complete, numbers)


def _measures(directory: Path, config: Mapping[str, Any]) -> Progress:
    points = len(config["directions"]) * math.prod(len(axis["values"]) for axis in config["grid"])
    if not (directory / MEASURES_FILE).exists():
        return Progress(0, points, "points", False)
    content = read_json(directory / MEASURES_FILE)
    nonfinite = next(iter(content["measures"].values()))["nonfinite"]
    done = sum(value is not None for value in np.array(nonfinite, object).flat)
    numbers = ", ".join(content["measures"]) if content["complete"] else ""
    return Progress(done, points, "points", bool(content["complete"]), numbers)


def _finetuning(directory: Path, config: Mapping[str, Any]) -> Progress:
    checkpoints = directory / "checkpoints"
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    done = max((int(name) for name in names if name.isdecimal()), default=0)
    is_finished = any((directory / result).is_dir() for result in ("adapter", "model"))
    losses = []
    if is_finished:
        with (directory / KINDS["finetuning"].state).open("rb") as log:
            losses = [record["loss"] for record in map(json.loads, whole_lines(log)) if "loss" in record]
    return Progress(done, config["epochs"], "epochs", is_finished, f"loss {losses[-1]:.3g}" if losses else "")


@dataclass(frozen=True)
class Kind:
    """How runs of a kind are recognised and read. A test compares it with their `RunKind`s, whose modules import JAX.

    Attributes:
        marks, state: as in `jaxscape.runtime.rundir.RunKind`.
        progress: how far a run is, from its directory and configuration.
    """

    marks: frozenset[str]
    state: str
    progress: Callable[[Path, Mapping[str, Any]], Progress]


CONFIG, MEASURES_FILE, COHERENCE = "config.json", "measures.json", "coherence"
RESULTS = ("*.json", "log.jsonl")
"""Patterns of the files that are read here."""
KINDS = {
    "scan": Kind(frozenset({"weights", "directions", "axes"}), "generations.jsonl", _scan),
    "radius": Kind(frozenset({"weights", "directions", "threshold"}), "generations.jsonl", _radius),
    "measures": Kind(frozenset({"weights", "directions", "grid", "measures"}), "measures.jsonl", _measures),
    "finetuning": Kind(frozenset({"weights", "chats", "learning_rate"}), "log.jsonl", _finetuning),
}
