"""The directory of a run: its configuration, and the state file from which an unfinished run is resumed."""

import fcntl
import json
import os
import shutil
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jaxscape.runtime import remote, reporting
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import temporary_path, write_whole
from jaxscape.runtime.processes import is_first
from jaxscape.runtime.software import software

CONFIG = "config.json"
SOFTWARE = "software"
"""The key of `config.json` under which a run lists the software and the kinds of devices that have worked on it, in the
order of their first use; see `jaxscape.runtime.software`."""
DESCRIPTIVE = frozenset({SOFTWARE, "commits"})
"""The keys that do not affect whether a run of any kind can be resumed: a checksum identifies the weights."""
EXTENSION = "extension"
"""The directory in a run's directory in which the run that extends it grows."""
EXTENDED = "extended"
"""The same directory, once that run is finished: its files replace those of the run that it extends."""


@dataclass(frozen=True)
class RunKind:
    """A kind of run, such as a scan or a finetuning, and the files of its directory.

    Attributes:
        name: the kind in messages to the user.
        state: name of the state file, to which the run appends its finished work.
        marks: configuration keys that every run of this kind has, and by which it is recognised.
        computed: glob patterns of files and folders that belong to the state; starting over removes them.
        descriptive: configuration keys that do not affect results, beside `DESCRIPTIVE`; a resumed run may differ in
            them.
    """

    name: str
    state: str
    marks: frozenset[str]
    computed: tuple[str, ...] = ()
    descriptive: frozenset[str] = frozenset()


@contextmanager
def open_run_directory(
    directory: str | Path | None,
    config: Mapping[str, Any],
    kind: RunKind,
    overwrite: bool = False,
    advice: str = "",
) -> Iterator[BinaryIO | None]:
    """A context in which a run is started in a directory, or the run that is there is resumed.

    It yields the state file, open for reading and appending and locked against other processes. It yields None if the
    directory is None, and in every process but the first.

    Arguments:
        directory: None keeps the run in memory only.
        config: what `config.json` records. A run is resumed only if it was started with the same values, apart
            from those of `RunKind.descriptive`. `SOFTWARE` is added.
        overwrite: start over if the directory holds a run.
        advice: what else a user can do about a run of another configuration, for the message.

    Raises:
        UserError: the directory cannot be used (see `check_directory`), or its run has another configuration, is
            damaged, or is still running in another process.
    """
    if directory is None or not is_first():
        yield None
        return
    directory = Path(directory)
    with remote.writing(directory), _opened(directory, config, kind, overwrite, advice) as file:
        yield file


@contextmanager
def _opened(
    directory: Path, config: Mapping[str, Any], kind: RunKind, overwrite: bool, advice: str
) -> Iterator[BinaryIO]:
    """See `open_run_directory`."""
    check_directory(directory, kind)
    finish_replacing(directory, kind)
    wanted = json.loads(json.dumps(config))
    if not overwrite:
        _check_config(directory / CONFIG, wanted, kind, advice)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / kind.state).open("a+b")
    except OSError as error:
        raise UserError(f"The run cannot be written to {directory} ({reason(error)}); choose another --out.") from error
    with file:
        _lock(file, directory)
        if overwrite:  # the state is removed last, so that no computed file ever exists without it
            _remove_computed(directory, kind)
            shutil.rmtree(directory / EXTENSION, ignore_errors=True)
            remote.push(directory)
            file.truncate(0)
        else:
            _check_config(directory / CONFIG, wanted, kind, advice)  # again, now that the directory is locked
        before = None if overwrite else recorded_value(directory, SOFTWARE)
        config = {**config, SOFTWARE: each_once(before, config.get(SOFTWARE), [software()])}
        write_whole(directory / CONFIG, config_text(config))
        yield file


@contextmanager
def reopen_run_directory(directory: Path, kind: RunKind) -> Iterator[tuple[dict[str, Any], BinaryIO]]:
    """A context in which something is added to a run that is there. It yields the run's configuration, and its state
    file, open for reading and locked against other processes.

    Raises:
        UserError: the directory holds no run of this kind, cannot be written, or is used by another process.
    """
    with remote.writing(directory), _reopened(directory, kind) as opened:
        yield opened


@contextmanager
def _reopened(directory: Path, kind: RunKind) -> Iterator[tuple[dict[str, Any], BinaryIO]]:
    """See `reopen_run_directory`."""
    try:
        if not _is_config(directory / CONFIG, kind):
            raise UserError(f"{directory} holds something other than a {kind.name} (see its {CONFIG}).")
        finish_replacing(directory, kind)
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        file = (directory / kind.state).open("r+b")
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{directory} holds no {kind.name} that can be used ({reason(error)}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{directory / CONFIG} is damaged ({reason(error)}).") from error
    with file:
        _lock(file, directory)
        yield config, file


def replace_by_extension(directory: Path, kind: RunKind) -> None:
    """Replace the run in a directory by the finished run that extends it. Both are locked by this process.

    If this is interrupted, whoever opens the directory next goes on with it.
    """
    write_whole(directory / EXTENSION / remote.LAST, b"")  # an object store cannot rename the directory
    _move_extended(directory, kind)


def finish_replacing(directory: Path, kind: RunKind) -> None:
    """Finish what `replace_by_extension` began in a directory, if it was interrupted."""
    is_begun = (directory / EXTENDED).is_dir() or (directory / EXTENSION / remote.LAST).exists()
    if is_begun and (directory / CONFIG).exists() and _is_config(directory / CONFIG, kind):
        with (directory / kind.state).open("a+b") as file:
            _lock(file, directory)
            _move_extended(directory, kind)


def _move_extended(directory: Path, kind: RunKind) -> None:
    """Move the files of the finished extension to the run's directory, and remove what was computed from its former
    state.

    The state is moved first. As long as it is not, no other file is moved either, and what is to be removed is known.
    The folders with what the two runs have reported stay.
    """
    extended = directory / EXTENDED
    if (directory / EXTENSION / remote.LAST).exists():
        os.rename(directory / EXTENSION, extended)
    if (extended / kind.state).exists():
        _remove_computed(directory, kind, kept={*reporting.FOLDERS, *(path.name for path in extended.iterdir())})
        os.replace(extended / kind.state, directory / kind.state)
    for path in extended.iterdir():
        if path.name != remote.LAST:
            os.replace(path, directory / path.name)
    (extended / remote.LAST).unlink(missing_ok=True)
    extended.rmdir()
    remote.push(directory)


def _remove_computed(directory: Path, kind: RunKind, kept: Container[str] = ()) -> None:
    """Remove what is computed from the state of a run, but the files and folders with the names `kept`."""
    for path in (path for pattern in kind.computed for path in directory.glob(pattern)):
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_directory(directory: Path, kind: RunKind) -> None:
    """Raise a `UserError` if the directory cannot hold a run of this kind: it is a file, cannot be written, holds a run
    of another kind, or has other files in it. Nothing is changed."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{directory} cannot be a run's directory, because {existing} is a file; choose another --out.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{directory} cannot be written, because {existing} is read-only; choose another --out.")
    remote.check_writable(directory)
    if not directory.is_dir():
        return
    if (directory / CONFIG).exists():
        if not _is_config(directory / CONFIG, kind):
            raise UserError(
                f"{directory} holds something other than a {kind.name} (see its {CONFIG}); choose another --out."
            )
        return
    # A run that was killed before its configuration was complete leaves an empty state file and a temporary file.
    leftovers = {temporary_path(directory / CONFIG).name}
    if (directory / kind.state).exists() and not (directory / kind.state).stat().st_size:
        leftovers.add(kind.state)
    if others := sorted(path.name for path in directory.iterdir() if path.name not in leftovers):
        raise UserError(
            f"{directory} is no run's directory and has files in it ({others[0]}, for example); choose another --out."
        )


def recorded_value(directory: Path | None, key: str) -> Any:
    """The value of a key in the configuration of the directory's run, or None if there is no run or no such key."""
    try:
        return None if directory is None else json.loads((directory / CONFIG).read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def config_text(config: Mapping[str, Any]) -> str:
    """The contents of `config.json`."""
    return json.dumps(config, indent=1, ensure_ascii=False) + "\n"


def each_once(*lists: Any) -> list[Any]:
    """What runs have recorded under `SOFTWARE`, without repetition. Runs of earlier versions have no such list."""
    items = [item for some in lists if isinstance(some, list) for item in some]
    return [item for number, item in enumerate(items) if item not in items[:number]]


def _is_config(path: Path, kind: RunKind) -> bool:
    """Whether the file is the configuration of a run of this kind, or is damaged and lies beside such a run's state."""
    try:
        return kind.marks <= json.loads(path.read_text(encoding="utf-8")).keys()
    except (ValueError, AttributeError, RecursionError):
        return (path.parent / kind.state).exists()


def differing_keys(recorded: Mapping[str, Any], config: Mapping[str, Any], kind: RunKind) -> list[str]:
    """The keys that affect results and have other values in two configurations, sorted."""
    keys = (recorded.keys() | config.keys()) - kind.descriptive - DESCRIPTIVE
    return sorted(key for key in keys if recorded.get(key) != config.get(key))


def _check_config(path: Path, config: Mapping[str, Any], kind: RunKind, advice: str) -> None:
    """Raise a `UserError` that names the differing keys if the file holds another configuration; it may be missing."""
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(recorded, dict):
            raise ValueError("no JSON object")
        differing = differing_keys(recorded, config, kind)
    except FileNotFoundError:
        return
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({reason(error)}); start over with --overwrite.") from error
    if differing:
        raise UserError(
            f"{path.parent} holds a run with another configuration (different: {', '.join(differing)}); {advice}"
            f"choose another --out, or start over with --overwrite."
        )


def _lock(file: BinaryIO, directory: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"Another process is running in {directory}; wait for it, or choose another --out.") from error
    except OSError:
        pass  # some network file systems have no locks; a run without a lock is better than no run
