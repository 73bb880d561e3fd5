"""Atomic file writes, lines of JSON, and the cache of downloaded files."""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from jaxscape.runtime.errors import UserError, reason

_LFS_POINTER = b"version https://git-lfs.github.com"

watchers: list[Callable[[Path], None]] = []
"""What is called with the path of each file that was written, appended to or cut; see `jaxscape.runtime.remote`."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically: at any moment, also after a crash, it has either the old or the new content."""
    temporary = temporary_path(path)
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _tell_watchers(path)


def temporary_path(path: Path) -> Path:
    """The file that `write_whole` writes first and then renames to `path`. Its name is always the same, so that the
    next write replaces what a crash left."""
    return path.with_name(f".{path.name}.tmp")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        UserError: the file is missing or damaged, or holds something else.
    """
    try:
        check_not_pointer(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}; pass a complete directory.") from error
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({reason(error)}); fix it, or download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; fix it, or download it again.")
    return content


def check_not_pointer(path: Path) -> None:
    """Raise a `UserError` if Git LFS left its pointer in place of the file, as a clone without Git LFS does."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(
                f"{path} is not the file itself, but a pointer of Git LFS: run 'git lfs pull' in {path.parent}, or "
                f"download the file with 'hf download'."
            )


def to_json_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """The text of a JSONL file with one line for each record."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def append_json_lines(file: BinaryIO, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a line for each record at the end of a JSONL file, and wait until they are on disk."""
    file.write(to_json_lines(records).encode())
    file.flush()
    os.fsync(file.fileno())
    _tell_watchers(file.name)


def whole_lines(file: BinaryIO) -> list[bytes]:
    """The complete lines of a file, without their newlines. A last line without a newline, which a killed process may
    have left, is ignored."""
    file.seek(0)
    return file.read().split(b"\n")[:-1]


def cut_after(file: BinaryIO, lines: Sequence[bytes]) -> None:
    """Truncate a file after `lines`, which are its first lines without their newlines."""
    file.truncate(sum(len(line) + 1 for line in lines))
    _tell_watchers(file.name)


def _tell_watchers(path: str | Path) -> None:
    for watcher in watchers:
        watcher(Path(path))


def is_locked(path: Path) -> bool:
    """Whether another process holds a lock of the file; False if that cannot be found out."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no such file, or its file system has no locks
        pass
    return False


def cache_dir() -> Path:
    """`$JAXSCAPE_CACHE`, or `jaxscape` in the user's cache directory.

    Raises:
        UserError: neither the variable nor a home directory is set.
    """
    if override := os.environ.get("JAXSCAPE_CACHE"):
        return Path(override)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxscape"
    except RuntimeError as error:
        raise UserError("There is no home directory to keep downloads in; set JAXSCAPE_CACHE.") from error


def cached_file(name: str, sha256: str, fetch: Callable[[Path], None]) -> Path:
    """The path of the file `name` in the cache. It is fetched first if it is missing or damaged.

    Arguments:
        sha256: the SHA-256 of the file in hexadecimal, which is checked at every call.
        fetch: writes the file to the path that it is called with, or raises a `UserError`.

    Raises:
        UserError: the cache cannot be written, or the fetched file has another checksum.
    """
    path = cache_dir() / name
    try:
        if path.exists() and file_checksum(path) == sha256:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            fetched = Path(directory) / path.name
            fetch(fetched)
            if (actual := file_checksum(fetched)) != sha256:
                raise UserError(
                    f"The download of {name} has SHA-256 {actual}, not {sha256}, and was discarded: try again."
                )
            os.replace(fetched, path)
    except OSError as error:
        raise UserError(
            f"The cache directory {path.parent} cannot be used ({reason(error)}); set JAXSCAPE_CACHE to another one."
        ) from error
    return path


def checksum(value: Any) -> str:
    """SHA-256 of a value's `repr`, in hexadecimal.

    Every process must get the same `repr`, so the value may consist only of numbers, texts, tuples and lists.
    """
    return hashlib.sha256(repr(value).encode()).hexdigest()


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
