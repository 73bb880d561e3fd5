"""Extending a run: more prompts, points or directions, without generating again what is there.

The run with the larger settings grows in a directory of its own, inside that of the run that it extends. It takes each
answer and each label that it needs from there, and generates the others. The former run stays as it is until the larger
one is finished and takes its place, so whatever kills an extension loses nothing.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxscape.landscapes.labels import EARLIER_LABEL_FILES, LABEL_FILES, EarlierLabels, Point, read_labels
from jaxscape.landscapes.store import COHERENCE_FILE, GENERATIONS, SCAN, Earlier, Run, answers_by_point, points_of
from jaxscape.runtime import rundir
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import checksum, whole_lines, write_whole
from jaxscape.runtime.processes import from_first, is_first
from jaxscape.runtime.texts import printable, shown_text

MAY_GROW = frozenset(
    {"axes", "points", "adaptive", "directions", "num_prompts", "prompts", "tokens", "prompt_source", "prompt_column"}
)
"""The keys of a scan's configuration whose values an extension may change."""

OpenRun = Callable[..., AbstractContextManager[Run]]
"""`store.open_run` with the arguments that say what the run is: a function of a directory, and of `overwrite`,
`earlier` and `advice`."""


@contextmanager
def open_scan(
    directory: Path | None,
    config: Mapping[str, Any],
    prompts: Sequence[str],
    tokens: Sequence[Sequence[int]],
    open_run: OpenRun,
    *,
    overwrite: bool = False,
    extend: bool = False,
) -> Iterator[Run]:
    """Start a run in a directory, resume the one that is there, or extend it.

    Arguments:
        directory: None keeps the run in memory only.
        config: what `config.json` records of the run.
        tokens: the token ids of each prompt.
        open_run: opens the run in a directory.
        extend: if the directory holds a run with smaller settings, go on with it.

    Raises:
        UserError: the directory cannot be used, or its run is another one, which cannot be extended or is not to be.
            Nothing is written then.
    """
    if extend and overwrite:
        raise UserError("--extend keeps the run that is there, and --overwrite removes it: give only one of them.")
    if extend and directory is None:
        raise UserError("There is no run to extend: name its directory.")
    found = None
    if directory is not None and not overwrite:
        found = from_first(partial(obstacle, directory, config, prompts, tokens))
    if extend and found:
        raise UserError(f"The run in {directory} cannot be extended: {found}; choose another --out.")
    opened: AbstractContextManager[Run]
    if extend and found == "" and directory is not None:
        opened = _open_extension(directory, config, prompts, open_run)
    else:
        advice = "continue it with --extend, " if found == "" else ""
        opened = open_run(directory, overwrite=overwrite, advice=advice)
    with opened as run:
        yield run


@contextmanager
def _open_extension(
    directory: Path, config: Mapping[str, Any], prompts: Sequence[str], open_run: OpenRun
) -> Iterator[Run]:
    """Start or resume the extension of the run in a directory, and let it take that run's place when it is finished."""
    place = directory / rundir.EXTENSION
    if not is_first():
        with open_run(place) as run:
            yield run
        return
    with rundir.reopen_run_directory(directory, SCAN) as (recorded, file):
        earlier = _read_earlier(directory, file, recorded, config, prompts)
        advice = f"finish this extension with its own command, or remove {place}; or "
        with open_run(place, earlier=earlier, advice=advice) as run:
            if (directory / COHERENCE_FILE).exists() and not (place / COHERENCE_FILE).exists():
                write_whole(place / COHERENCE_FILE, (directory / COHERENCE_FILE).read_bytes())
            yield run
            run.labels.keep_earlier(run.num_done)
            rundir.replace_by_extension(directory, SCAN)


def obstacle(
    directory: Path, config: Mapping[str, Any], prompts: Sequence[str], tokens: Sequence[Sequence[int]]
) -> str | None:
    """Why the run in a directory cannot be extended to a configuration: the second half of a sentence, which is empty
    if it can. None if there is no run, or it has this configuration already.

    Arguments:
        prompts, tokens: those of the configuration.

    Raises:
        UserError: the run's configuration is damaged.
    """
    path = directory / rundir.CONFIG
    rundir.finish_replacing(directory, SCAN)
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # whoever opens the directory says what is wrong
    if not isinstance(recorded, dict) or not recorded.keys() >= SCAN.marks:
        return None
    wanted = json.loads(json.dumps(config))
    if not (differing := rundir.differing_keys(recorded, wanted, SCAN)):
        return None
    if "shard" in recorded:
        return "it is a shard of a scan, and the merged run can be extended"
    try:
        return (
            _changed_setting(recorded, wanted, differing)
            or _left_out_prompts(recorded, prompts, tokens)
            or _left_out_points(recorded, wanted)
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is damaged ({reason(error)}); start over with --overwrite.") from error


def _changed_setting(recorded: Mapping[str, Any], config: Mapping[str, Any], differing: Sequence[str]) -> str:
    """The first setting that has changed although the answers depend on it; empty if there is none."""
    for key in dict.fromkeys([*config, *recorded]):
        if key in differing and key not in MAY_GROW:
            was, now = (_shown(values[key]) if key in values else "not set" for values in (recorded, config))
            return f"{key} was {was} and is {now} now, and its answers depend on it"
    return ""


def _shown(value: Any) -> str:
    """The value of a setting for messages."""
    return shown_text(value) if isinstance(value, str) else printable(json.dumps(value)[:80])


def _left_out_prompts(recorded: Mapping[str, Any], prompts: Sequence[str], tokens: Sequence[Sequence[int]]) -> str:
    """Why the run's prompts are not the first ones of these; empty if they are."""
    size = recorded["num_prompts"]
    if size > len(prompts):
        return f"it has {size} prompts, and only {len(prompts)} are given"
    if checksum(list(prompts[:size])) != recorded["prompts"]:
        return f"its {size} prompts are not the first {size} of the {len(prompts)} that are given, in the same order"
    if checksum(list(tokens[:size])) != recorded["tokens"]:
        return "its prompts are other tokens now, because the model's chat template or tokenizer has changed"
    return ""


def _left_out_points(recorded: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Which directions or points of the run the configuration leaves out; empty if it has them all."""
    sizes = [len(values["directions"][0]) for values in (recorded, config)]
    if sizes[0] != sizes[1]:
        return f"its sets of directions have {sizes[0]} each, and those that are given have {sizes[1]}"
    names = recorded.get("direction_names", recorded["directions"])
    for ids, name in zip(recorded["directions"], names, strict=True):
        if ids not in config["directions"]:
            shown = " and ".join(map(str, name))
            return f"its direction {shown} is not among those that are given, or is another one now"
    moved = moves(recorded, config)
    if left_out := [point for point, place in moved.items() if place is None]:
        return (
            f"{len(left_out)} of its {len(moved)} points, such as {list(left_out[0][1])}, are not among those that are "
            f"given"
        )
    return ""


def moves(recorded: Mapping[str, Any], config: Mapping[str, Any]) -> dict[Point, Point | None]:
    """For each point of one configuration, the same point in another one; None if it is not there.

    Points are the same if they lie at the same coordinates along the same directions. Models are computed from
    coordinates in float32, so the last bits of a float64 may differ.
    """

    def place(values: Mapping[str, Any], point: Point) -> tuple[str, tuple[float, ...]]:
        return json.dumps(values["directions"][point[0]]), tuple(np.array(point[1], np.float32).tolist())

    places = {place(config, point): point for point in reversed(points_of(config))}
    return {point: places.get(place(recorded, point)) for point in points_of(recorded)}


def _read_earlier(
    directory: Path,
    file: BinaryIO,
    recorded: Mapping[str, Any],
    config: Mapping[str, Any],
    prompts: Sequence[str],
) -> Earlier:
    """The answers and labels of the run in a directory, at the points of another configuration.

    Arguments:
        file: the run's state file.
        recorded: the run's configuration.
    """
    try:
        moved = moves(recorded, config)
        former = answers_by_point(whole_lines(file), prompts[: recorded["num_prompts"]])
        answers = {
            place: [{**record, "direction": place[0], "coords": list(place[1])} for record in records]
            for point, records in former.items()
            if (place := moved[point]) is not None
        }
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{directory / GENERATIONS} is damaged ({reason(error)}): start over with --overwrite."
        ) from error
    labels: EarlierLabels = {}
    for pattern in (EARLIER_LABEL_FILES, LABEL_FILES):
        for name, points in read_labels(directory, pattern).items():
            kept = {place: said for point, said in points.items() if (place := moved.get(point)) in answers}
            labels[name] = labels.get(name, {}) | kept
    return Earlier(answers, labels, recorded.get(rundir.SOFTWARE))
