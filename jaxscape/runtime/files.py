"""Files that are written whole or not at all, and files that are fetched once, checked and kept."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from jaxscape.runtime.errors import UserError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that at every moment either the old or the new content is there, also after a crash."""
    temporary = temporary_name(path)
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def to_json_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """The text of a JSONL file: one line for each record."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def whole_lines(file: BinaryIO) -> list[bytes]:
    """The lines of a file without their newlines. A last line without a newline, which a killed process left, is not
    returned."""
    file.seek(0)
    return file.read().split(b"\n")[:-1]


def cut_after(file: BinaryIO, lines: Sequence[bytes]) -> None:
    """Cut a file off after its first lines, which are given."""
    file.truncate(sum(len(line) + 1 for line in lines))


def temporary_name(path: Path) -> Path:
    """Where `write_whole` prepares a file: always the same name, so that a crash leaves nothing that stays."""
    return path.with_name(f".{path.name}.tmp")


def cache_dir() -> Path:
    """`$JAXSCAPE_CACHE`, or `jaxscape` in the user's cache directory."""
    if override := os.environ.get("JAXSCAPE_CACHE"):
        return Path(override)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxscape"
    except RuntimeError as error:
        raise UserError("There is no home directory to keep downloads in; set JAXSCAPE_CACHE.") from error


def cached_file(name: str, sha256: str, fetch: Callable[[Path], None]) -> Path:
    """The cached file `name`, fetched first if it is missing or damaged.

    Arguments:
        sha256: what the file's bytes must hash to, checked at every call.
        fetch: writes the file to the path that it is given; raises `UserError` where it cannot.

    Raises:
        UserError: the cache cannot be written, or what was fetched has another checksum.
    """
    path = cache_dir() / name
    try:
        if path.exists() and _sha256(path) == sha256:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            fetched = Path(directory) / path.name
            fetch(fetched)
            if (found := _sha256(fetched)) != sha256:
                raise UserError(f"What was downloaded as {name} has SHA-256 {found}, not {sha256}; it was discarded.")
            os.replace(fetched, path)
    except OSError as error:
        raise UserError(f"The cache directory {path.parent} cannot be used ({error}); set JAXSCAPE_CACHE.") from error
    return path


def checksum(value: Any) -> str:
    """SHA-256 of a value's `repr`: of numbers, texts, and tuples and lists of them."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
