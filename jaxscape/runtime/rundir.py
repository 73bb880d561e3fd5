"""A directory that holds one run: its configuration, and the file that is its state, which a restart goes on with."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jaxscape.runtime.errors import UserError
from jaxscape.runtime.files import temporary_name, write_whole
from jaxscape.runtime.processes import is_first

CONFIG = "config.json"


@dataclass(frozen=True)
class RunKind:
    """What sort of run a directory holds.

    Attributes:
        state: the file that grows as the run goes on.
        marks: keys that every configuration of this kind has.
        computed: patterns of the files and folders that a new start removes.
        descriptive: keys that describe a run and do not determine it: a resumed run may have others.
    """

    name: str
    state: str
    marks: frozenset[str]
    computed: tuple[str, ...] = ()
    descriptive: frozenset[str] = frozenset()


@contextmanager
def open_run_directory(
    directory: str | Path | None, config: Mapping[str, Any], kind: RunKind, overwrite: bool = False
) -> Iterator[BinaryIO | None]:
    """Start a run in a directory, or go on with the one that is there: gives its state file, open and locked.

    None keeps nothing, and gives None; so does every process but the first.

    Raises:
        UserError: the directory cannot be used: see `check_directory`; or it holds a run of another configuration, a damaged
            one, or one that is going on.
    """
    if directory is None or not is_first():
        yield None
        return
    directory = Path(directory)
    check_directory(directory, kind, overwrite)
    text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
    if not overwrite:
        _check_config(directory / CONFIG, json.loads(text), kind)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / kind.state).open("a+b")
    except OSError as error:
        raise UserError(f"The run cannot be written to {directory} ({error}).") from error
    with file:
        _lock(file, directory)
        if overwrite:  # first what is computed from the state, so that nothing ever stands without it
            for path in (path for pattern in kind.computed for path in directory.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            file.truncate(0)
        else:
            _check_config(directory / CONFIG, json.loads(text), kind)  # again: another process may have come first
        write_whole(directory / CONFIG, text)
        yield file


def check_directory(directory: Path, kind: RunKind, overwrite: bool = False) -> None:
    """Raise a `UserError` if no run could be kept in the directory: it is a file, is not writable, or holds other
    files and no run of this kind. Nothing is made or changed."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{directory} cannot be a run's directory, because {existing} is a file.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{directory} cannot be written, because {existing} is read-only; choose another --out.")
    if not directory.is_dir():
        return
    if (directory / CONFIG).exists():
        if not _is_config(directory / CONFIG, kind):
            raise UserError(
                f"{directory} holds something else than a {kind.name} (see its {CONFIG}); choose another --out."
            )
        return
    # A run that was killed before it had its configuration leaves an empty file and half of another.
    started = {temporary_name(directory / CONFIG).name}
    if (directory / kind.state).exists() and not (directory / kind.state).stat().st_size:
        started.add(kind.state)
    if others := sorted(path.name for path in directory.iterdir() if path.name not in started):
        raise UserError(
            f"{directory} has files in it ({others[0]}, for example) and is no run's directory; choose another --out."
        )


def recorded_value(directory: Path | None, key: str) -> Any:
    """What the directory's run has under this key of its configuration; None if there is no such run or key."""
    try:
        return None if directory is None else json.loads((directory / CONFIG).read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _is_config(path: Path, kind: RunKind) -> bool:
    """Whether the file is such a run's configuration, or a damaged file that may have been one."""
    try:
        return kind.marks <= json.loads(path.read_text(encoding="utf-8")).keys()
    except (ValueError, AttributeError, RecursionError):
        return (path.parent / kind.state).exists()


def _check_config(path: Path, config: Mapping[str, Any], kind: RunKind) -> None:
    """Raise a `UserError` that names what differs, if the directory's run was configured otherwise."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        keys = (found.keys() | config.keys()) - kind.descriptive
        differing = sorted(key for key in keys if found.get(key) != config.get(key))
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
