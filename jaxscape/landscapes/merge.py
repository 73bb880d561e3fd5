"""Merging: the shards of a scan become the run that one machine would have written. No model is loaded."""

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxscape.evaluate.coherence import COHERENCE
from jaxscape.finetuning import trajectory
from jaxscape.landscapes.labels import LABEL_FILES, LabelBook, label_file
from jaxscape.landscapes.landscape import Landscape
from jaxscape.landscapes.shards import Shard
from jaxscape.landscapes.store import (
    COHERENCE_FILE,
    GENERATIONS,
    PROMPTS,
    SCAN,
    answers_by_point,
    points_of,
    read_prompts,
    reopen_run,
)
from jaxscape.runtime import remote, rundir
from jaxscape.runtime.errors import UserError, as_list, reason
from jaxscape.runtime.files import is_locked, read_json, whole_lines, write_whole


def merge(directories: Sequence[str | Path], out: str | Path) -> Landscape:
    """Merge the shards of a scan into the run that one machine would have written.

    The run's files have the bytes of a scan without shards, with the same form on the same kind of machine. It can be
    extended, scored and reported like any other. The shards stay as they are.

    Arguments:
        directories: the directories of all shards, in any order.
        out: the directory of the run, which is written whole or not at all. If it holds the merged run already, that is
            left as it is: labels that shards have got since are not added.

    Returns:
        The landscape.

    Raises:
        UserError: a shard is missing, doubled, unfinished, damaged or one of another scan, or `out` cannot be used.
            Nothing is written then.
    """
    with merging(directories, out) as (landscape, _):
        return landscape


@contextmanager
def merging(directories: Sequence[str | Path], out: str | Path) -> Iterator[tuple[Landscape, Path]]:
    """A context in which shards are merged; see `merge`. It yields the landscape and the directory that holds the
    merged run, to which files may be added. At the end of the context, that directory becomes `out`."""
    out = remote.run_directory(out)
    shards = _in_order(
        [_KeptShard.read(remote.run_directory(directory)) for directory in as_list(directories, "directories")]
    )
    software = rundir.each_once(*(shard.config.get(rundir.SOFTWARE) for shard in shards))
    config = shards[0].merged_config | {rundir.SOFTWARE: software}
    if _is_merged(out, config):
        yield Landscape.load(out), out
        return
    rundir.check_directory(out, SCAN)
    contents = _contents(shards, config)
    place = out.absolute().with_name(f".{out.absolute().name}-{uuid.uuid4().hex}")
    try:
        place.mkdir(parents=True)
        for name, content in contents.items():
            write_whole(place / name, content)
        with reopen_run(place) as (run, _):
            run.save()
            yield run.landscape(), place
        os.rename(place, out)
        remote.push(out)
    except OSError as error:
        raise UserError(f"The run cannot be written to {out} ({reason(error)}); choose another --out.") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


@dataclass(frozen=True)
class _KeptShard:
    """A shard in a directory, finished or not.

    Attributes:
        config: what `config.json` holds.
        num_done: how many of its points are evaluated.
        state: the whole lines of `generations.jsonl`.
        judged: for each evaluator, by name, at how many points it has judged the answers.
        versions: for each of these evaluators, its checksum; None if it has none.
    """

    directory: Path
    shard: Shard
    config: Mapping[str, Any]
    num_done: int
    state: list[bytes]
    judged: Mapping[str, int]
    versions: Mapping[str, str | None]

    @classmethod
    def read(cls, directory: Path) -> "_KeptShard":
        """Read the shard in a directory.

        Raises:
            UserError: there is none, it is damaged, or a process is running in it.
        """
        config = read_json(directory / rundir.CONFIG)
        if not config.keys() >= SCAN.marks:
            raise UserError(f"{directory} holds something other than a {SCAN.name} (see its {rundir.CONFIG}).")
        if "shard" not in config:
            raise UserError(f"{directory} holds a whole scan and no shard of one: give directories of scan --shard.")
        if is_locked(directory / GENERATIONS):
            raise UserError(f"A process is running in {directory}: merge the shards when all of them are finished.")
        try:
            shard = Shard.read(config)
            assert shard is not None
            points = points_of(config)[shard.start : shard.stop]
            prompts = [line["prompt"] for line in read_prompts(directory)]
            with (directory / GENERATIONS).open("rb") as file:
                lines = whole_lines(file)
            done = list(answers_by_point(lines, prompts))
            if done != points[: len(done)] or len(lines) > len(points) * len(prompts):
                raise ValueError(f"{GENERATIONS} has points of another shard")
            book = LabelBook(points, len(prompts), directory)
            book.restore(len(done), cut=False)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"The shard in {directory} cannot be read ({reason(error)}): start it over with --overwrite."
            ) from error
        judged = {name: len(rows) for name, rows in book.rows.items()}
        return cls(directory, shard, config, len(done), lines, judged, book.checksums)

    @property
    def merged_config(self) -> dict[str, Any]:
        """The configuration of the whole scan."""
        return {key: value for key, value in self.config.items() if key != "shard"}

    def check_finished(self) -> None:
        """Raise a `UserError` if the scan of this shard is to go on."""
        num_points = self.shard.num_points
        if self.num_done < num_points:
            raise UserError(
                f"{self.directory}, {self.shard}, is not finished ({self.num_done} of {num_points} points): run its "
                f"command again to finish it first."
            )
        for name in self.shard.labels:
            if self.judged.get(name, 0) < num_points:
                raise UserError(
                    f"{self.directory}, {self.shard}, is not finished ({name} has not judged all answers): run its "
                    f"command again to finish it first."
                )

    def lines(self, name: str) -> bytes:
        """The lines of an evaluator's label file, one for each point."""
        with (self.directory / label_file(name)).open("rb") as file:
            return b"".join(line + b"\n" for line in whole_lines(file)[: self.num_done])


def _in_order(shards: Sequence[_KeptShard]) -> list[_KeptShard]:
    """The shards in the order of their points, if they are the finished shards of one scan, each of them once.

    Raises:
        UserError: they are not.
    """
    if not shards:
        raise UserError("There is no shard to merge: give the directories of all shards of a scan.")
    first, by_number = shards[0], dict[int, _KeptShard]()
    count = first.shard.count
    for other in shards:
        _check_same_scan(first, other)
        if (same := by_number.setdefault(other.shard.number, other)) is not other:
            raise UserError(f"{same.directory} and {other.directory} are both {other.shard}: give each shard once.")
    missing = [str(number) for number in range(1, count + 1) if number not in by_number]
    if missing:
        raise UserError(f"Of {count} shards, these are missing: {', '.join(missing)}; give the directories of all.")
    ordered = [by_number[number] for number in range(1, count + 1)]
    for shard in ordered:
        shard.check_finished()
    ends = [0, *(shard.shard.stop for shard in ordered)]
    if [shard.shard.start for shard in ordered] != ends[:-1] or ends[-1] != len(points_of(first.config)):
        raise UserError(
            f"The shards in {first.directory} and the other directories divide the points differently: make all of "
            f"them with the same version of jaxscape."
        )
    return ordered


def _check_same_scan(first: _KeptShard, other: _KeptShard) -> None:
    """Raise a `UserError` if two shards are not of the same scan, split in the same way."""
    differing = rundir.differing_keys(first.merged_config, other.merged_config, SCAN)
    if first.shard.labels != other.shard.labels:
        differing.append("evaluators whose labels are kept")
    if differing:
        advice = "; give all shards the same --form" if differing == ["form"] else ""
        raise UserError(
            f"{other.directory} is a shard of another scan than {first.directory} (different: {', '.join(differing)})"
            f"{advice}."
        )
    if first.shard.count != other.shard.count:
        raise UserError(
            f"{other.directory} is {other.shard}, but {first.directory} is {first.shard}: give the shards of one split."
        )


def _is_merged(out: Path, config: Mapping[str, Any]) -> bool:
    """Whether a directory holds the merged run already.

    Raises:
        UserError: it holds another run, or the same one, but unfinished.
    """
    if not (out / rundir.CONFIG).exists():
        return False
    differing = rundir.differing_keys(read_json(out / rundir.CONFIG), config, SCAN)
    if differing:
        raise UserError(
            f"{out} holds another run than the one of these shards (different: {', '.join(differing)}); choose another "
            f"--out."
        )
    if not Landscape.load(out).complete:
        raise UserError(f"{out} holds the run of these shards, but it is not finished; choose another --out.")
    return True


def _contents(shards: Sequence[_KeptShard], config: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of the merged run, by name, but those that are computed from them."""
    first = shards[0].directory
    contents = {
        rundir.CONFIG: rundir.config_text(config).encode(),
        PROMPTS: (first / PROMPTS).read_bytes(),
        GENERATIONS: b"".join(line + b"\n" for shard in shards for line in shard.state),
    }
    for name in dict.fromkeys(name for shard in shards for name in shard.judged):
        for shard in shards:
            if shard.judged.get(name, 0) < shard.num_done:
                raise UserError(
                    f"{shard.directory} has no labels of {name}, which has judged another shard: run jaxscape score "
                    f"{shard.directory} --evaluator {name}, or delete those labels there."
                )
            if shard.versions[name] != shards[0].versions[name]:
                raise UserError(
                    f"{shard.directory} has labels from another version of {name} than {first}: delete "
                    f"{label_file(name)} there, and run jaxscape score {shard.directory} --evaluator {name}."
                )
        contents[label_file(name)] = b"".join(shard.lines(name) for shard in shards)
    _check_same_thresholds(shards)
    for name in (COHERENCE_FILE, trajectory.FILE_NAME):
        kept = [shard.directory / name for shard in shards if (shard.directory / name).exists()]
        contents |= {name: kept[0].read_bytes()} if kept else {}
    return contents


def _check_same_thresholds(shards: Sequence[_KeptShard]) -> None:
    """Raise a `UserError` if coherence was judged by other thresholds in one shard than in another."""
    paths = [shard.directory / COHERENCE_FILE for shard in shards if (shard.directory / COHERENCE_FILE).exists()]
    for path in paths:
        if read_json(path) != read_json(paths[0]):
            others, then = [label_file(COHERENCE)], "judges again and generates nothing"
            if shards[0].config.get("abandon_incoherent"):  # the thresholds decided which answers were abandoned, too
                others, then = [GENERATIONS, LABEL_FILES], "generates and judges its answers again"
            names = " and ".join(str(path.parent / name) for name in others)
            raise UserError(
                f"{path} has other thresholds than {paths[0]}, because their machines round differently: copy the "
                f"latter over the former, delete {names}, and run that shard's command again, which {then}."
            )
