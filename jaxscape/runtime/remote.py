"""Runs and files at the URLs of object stores, such as `s3://BUCKET/RUN`, through fsspec.

Everything else in the package works on files of a disk. The directory of a run at a URL is therefore copied to a
temporary directory of this process when it is opened, and whatever is written there is pushed to the store before the
writer goes on. The store is the truth: no copy outlives its process, and each one begins with what the store has.

Object stores can neither append to a file nor rename one, so a run lies in the store like this:

- `NAME` is a file of the run, or its beginning.
- `NAME.parts/OFFSET` is what was appended to a JSONL file of OFFSET bytes, after a first line that names the writer. A
  part is only ever created, so of two processes that append to one run the second one fails. When the run ends, the
  whole file takes the place of its parts.
- `.pushing/WRITER` names files that a process is pushing together. Readers see none of them until all are there.
"""

import atexit
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.extras import import_extra
from jaxscape.runtime.files import cache_dir, checksum, temporary_path, watchers

PATIENCE = 300.0
"""For how many seconds a request to a store that has answered before is repeated, beyond fsspec's own repetitions."""
FIRST_WAIT = 1.0
"""Seconds until a request is repeated for the first time; then twice as long each time, up to half a minute."""
LAST = "finished"
"""The name of a file that says what is still to be done. Its deletion is pushed after everything else."""

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/{1,3}(?=[^/])")  # `Path` leaves one slash of several
_PARTS, _PUSHING = ".parts/", ".pushing/"
_CREATED_SIZE = 2**23  # larger new files are not compared with those that are there
_NUM_THREADS = 16

T = TypeVar("T")
State = tuple[int, int, int]
"""Inode, size and time of a local file."""


def url_of(path: str | Path) -> str | None:
    """The URL that a path stands for, also if `Path` has taken slashes from it; None for a path on a disk."""
    match = _URL.match(str(path))
    if match is None:
        return None
    return _beginning(match[1]) + str(path)[match.end() :].rstrip("/")


def run_directory(path: str | Path, only: Iterable[str] = ("*",)) -> Path:
    """The directory of a run on this machine: a copy of what the store has at a URL, or the path itself.

    What `jaxscape.runtime.files` writes into the copy is pushed to the store before the function returns.

    Arguments:
        only: patterns of the names of files whose content is wanted. The other files are empty and never pushed.

    Raises:
        UserError: the store cannot be read.
    """
    if (url := url_of(path)) is None:
        return Path(path)
    key = (url, tuple(only))
    if key not in _MIRRORS:
        _MIRRORS[key] = Mirror(url, key[1], _temporary_directory() / str(len(_MIRRORS)))
    if push not in watchers:
        watchers.append(push)
    _MIRRORS[key].pull()
    return _MIRRORS[key].directory


def fetched(source: str | Path) -> Path:
    """A file or directory on this machine: a copy in the cache of what the store has at a URL, or the path itself. The
    copy is fetched again when the store has another content.

    Raises:
        UserError: there is nothing at the URL, or it cannot be read, or the cache cannot be written.
    """
    if (url := url_of(source)) is None:
        return Path(source)
    store = _Store(url)
    listing = store.files()
    if not listing:
        raise UserError(f"There is nothing at {url}: check the address.")
    name = Path(url).name
    place = cache_dir() / "remote" / checksum((url, sorted(map(repr, listing.items())))) / name
    _SHOWN[str(place)] = url
    if place.exists():
        return place
    try:
        place.parent.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent.parent) as directory:
            for file in listing:
                store.get(file, Path(directory) / "new" / name / file)
            os.replace(Path(directory) / "new", place.parent)
    except OSError as error:
        if place.exists():  # another process has put it there in the meantime
            return place
        raise UserError(
            f"{url} cannot be kept in {cache_dir()} ({reason(error)}): make room there, or set JAXSCAPE_CACHE."
        ) from error
    return place


def push(path: Path) -> None:
    """Push what has changed in the copy of a run that the path lies in; nothing if it lies in none.

    Raises:
        UserError: the store cannot be written, or another process has written to the run.
    """
    if (mirror := _mirror_of(path)) is not None:
        mirror.push()


def check_writable(directory: Path) -> None:
    """Raise a `UserError` if a directory is the copy of one in a store that cannot be written."""
    if (mirror := _mirror_of(directory)) is not None:
        mirror.check_writable()


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """A context in which the run in a directory is worked on. If it is a copy of what a store has, it is filled anew
    first, and afterwards whole files take the place of their parts.

    Raises:
        UserError: see `push`.
    """
    mirror = _mirror_of(directory)
    if mirror is None or mirror.is_open:
        yield
        return
    mirror.open()
    try:
        yield
        mirror.push()
        mirror.join_parts()
    finally:
        mirror.is_open = False


def is_remote(directory: Path) -> bool:
    """Whether a directory is the copy of one in a store."""
    return _mirror_of(directory) is not None


def shown(text: str) -> str:
    """A text for the user, with the URLs of copies instead of where they lie on this machine, and with the slashes that
    `Path` has taken from URLs."""
    for place, url in _SHOWN.items():
        text = text.replace(place, url)
    for protocol in {url.partition(":")[0] for url in _SHOWN.values()}:
        text = re.sub(rf"(?<![\w/]){re.escape(protocol)}:/(?=[^/\s])", _beginning(protocol), text)
    return text


class _Store:
    """The files below a URL. Names are relative to it; a URL of one file has the name ``.

    Requests that fail are repeated: by the library of the store, and once the store has answered, for `PATIENCE`.
    """

    def __init__(self, url: str) -> None:
        self.url, self._has_answered = url, False
        core = import_extra("fsspec.core", "cloud")
        protocol = url.partition(":")[0]
        try:
            self.fs, root = core.url_to_fs(url, **({"auto_mkdir": True} if protocol in ("file", "local") else {}))
        except ImportError as error:
            raise UserError(f"{url} cannot be opened ({reason(error)}): run pip install 'jaxscape[cloud]'.") from error
        except Exception as error:  # each library has its own errors of addresses and credentials
            raise UserError(f"{url} cannot be opened ({reason(error)}): check the address.") from error
        self._root = root.rstrip("/")

    def path(self, name: str) -> str:
        """What fsspec calls a file."""
        return f"{self._root}/{name}" if name else self._root

    def files(self) -> dict[str, dict[str, Any]]:
        """For each file, what the store says of it, by name."""

        def find() -> Any:
            self.fs.invalidate_cache()
            return self.fs.find(self._root, detail=True)

        files = {
            str(path)[len(self._root) + 1 :]: dict(info)
            for path, info in self.tried(find).items()
            if str(path)[-1:] != "/" and info.get("type") != "directory"  # some stores mark folders by empty objects
        }
        if bad := next((name for name in files if name and {"", ".", ".."} & {*name.split("/")}), None):
            raise UserError(f"{self.url} has a file {bad!r}, which cannot be one of a directory: delete it.")
        return files

    def get(self, name: str, path: Path) -> None:
        """Fetch a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.tried(lambda: self.fs.get_file(self.path(name), str(path)))

    def read(self, names: Iterable[str]) -> list[bytes]:
        """The contents of files."""
        return self.each(lambda name: self.tried(lambda: self.fs.cat_file(self.path(name))), names)

    def put(self, name: str, path: Path) -> None:
        """Write a file whole."""
        self.tried(lambda: self.fs.put_file(str(path), self.path(name)))

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        self.tried(lambda: self.fs.pipe_file(self.path(name), content))

    def create(self, name: str, content: bytes) -> None:
        """Write a small file that is not there yet.

        Raises:
            UserError: it is there, with another content.
        """
        path = self.path(name)

        def attempt() -> None:
            try:
                self.fs.pipe_file(path, content, mode="create")
            except Exception as error:  # perhaps only the answer to an earlier attempt was lost
                try:
                    found = self.fs.cat_file(path)
                except FileNotFoundError:
                    raise error from None
                if found != content:
                    raise self.conflict() from error

        self.tried(attempt)

    def remove(self, names: Iterable[str]) -> None:
        """Delete files, some of which may not be there."""

        def attempt(name: str) -> None:
            with suppress(FileNotFoundError):
                self.fs.rm_file(self.path(name))

        self.each(lambda name: self.tried(lambda: attempt(name)), names)

    def each(self, function: Callable[[str], T], names: Iterable[str]) -> list[T]:
        """What a function returns for each name; requests run at the same time."""
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            return [*pool.map(function, names)]

    def conflict(self) -> UserError:
        """The error for a run that another process has written to."""
        return UserError(
            f"Another process has written to {self.url}; wait for it, or choose another --out. What was reported is "
            f"there."
        )

    def tried(self, action: Callable[[], T]) -> T:
        """What the action returns. It is repeated while the store, which has answered before, does not answer.

        Raises:
            UserError: the store refuses, or does not answer.
            FileNotFoundError: the store has answered before, and says that there is no such file.
        """
        start, wait = time.monotonic(), FIRST_WAIT
        while True:
            try:
                result = action()
            except UserError:
                raise
            except PermissionError as error:
                raise UserError(f"{self.url} cannot be used ({reason(error)}): check the credentials.") from error
            except Exception as error:  # libraries of stores have many types for what is slow, cut or full
                if not self._has_answered:
                    raise UserError(
                        f"{self.url} cannot be used ({reason(error)}): check the address, the credentials and the "
                        f"network."
                    ) from error
                if isinstance(error, FileNotFoundError):
                    raise
                if time.monotonic() + wait > start + PATIENCE:
                    raise UserError(
                        f"{self.url} cannot be used any more ({reason(error)}). What was reported is there: run the "
                        f"same command again to go on."
                    ) from error
                time.sleep(wait)
                wait = min(2 * wait, 30.0)
            else:
                self._has_answered = True
                return result


class _Copy(NamedTuple):
    """What is known of a file of the store.

    Attributes:
        token: what the store said of it and its parts when it was read; empty since this process has pushed it.
        state: the local file with its content.
        parts: the names of its parts.
    """

    token: str
    state: State
    parts: tuple[str, ...] = ()


class Mirror:
    """The directory of a run in a store, and its copy on this machine.

    Attributes:
        directory: the copy.
        is_open: whether this process works on the run.
    """

    def __init__(self, url: str, only: tuple[str, ...], place: Path) -> None:
        self._store, self._only, self.is_open = _Store(url), only, False
        self.directory = place.joinpath(*(part for part in url.split("/")[1:] if part not in ("", ".", "..")))
        self.directory.mkdir(parents=True, exist_ok=True)
        _SHOWN[str(self.directory)] = url
        self._copies: dict[str, _Copy] = {}
        self._hidden: set[str] = set()
        self._writer = secrets.token_hex(16)

    def pull(self) -> None:
        """Make the copy what the store has, unless this process works on the run: then it is already."""
        if self.is_open:
            return
        for _ in range(3):
            with suppress(FileNotFoundError):  # another process has deleted a file since it was listed
                return self._pull()
        raise UserError(f"{self._store.url} is being changed by another process: try again.")

    def open(self) -> None:
        """Begin to work on the run: make the copy what the store has, and delete what a killed process has not pushed
        to the end."""
        self.pull()
        self._store.remove(sorted(self._hidden))
        self._hidden.clear()
        self.is_open = True

    def check_writable(self) -> None:
        """Raise a `UserError` if the store cannot be written."""
        self._store.write(_PUSHING + self._writer, b"[]")
        self._store.remove([_PUSHING + self._writer])

    def push(self) -> None:
        """Make the store what the copy is."""
        local = {name: state for name, state in self._local_files().items() if self._is_wanted(name)}
        known = {name: copy.state for name, copy in self._copies.items() if self._is_wanted(name)}
        changed = [name for name, state in local.items() if known.get(name) != state]
        new = [name for name in changed if name not in known]
        marker = _PUSHING + self._writer
        if len(new) > 1:
            self._store.write(marker, json.dumps(new).encode())
        # What has become shorter comes first: the answers of a run that is started over, before its configuration.
        for name in sorted(changed, key=lambda name: (name not in known or known[name][1] <= local[name][1], name)):
            self._push_file(name, local[name])
        if len(new) > 1:
            self._store.remove([marker])
        gone = known.keys() - local.keys()
        for names in ([name for name in gone if Path(name).name != LAST], [*gone]):
            self._store.remove(file for name in names if name in self._copies for file in self._files_of(name))
            for name in names:
                self._copies.pop(name, None)

    def join_parts(self) -> None:
        """Replace files in parts by whole ones.

        Raises:
            UserError: another process has written parts.
        """
        in_parts = {name: copy for name, copy in self._copies.items() if copy.parts}
        if not in_parts:
            return
        listed = {name for name in self._store.files() if name.partition(_PARTS)[0] in in_parts and _PARTS in name}
        if listed != {part for copy in in_parts.values() for part in copy.parts}:
            raise self._store.conflict()
        for name, copy in in_parts.items():
            self._put(name, copy.state)

    def _pull(self) -> None:
        listing = self._store.files()
        if "" in listing:
            raise UserError(f"{self._store.url} is a file, and no directory of a run: give the directory.")
        markers = [name for name in listing if name.startswith(_PUSHING)]
        self._hidden = {*markers, *(name for text in self._store.read(markers) for name in _names(text))} & {*listing}
        parts: dict[str, list[str]] = {}
        for name in sorted(listing.keys() - self._hidden):
            base, is_part, _ = name.partition(_PARTS)
            parts.setdefault(base, []).extend([name] if is_part else [])
        local = self._local_files()
        for name in self._copies.keys() | local.keys():
            if name not in parts:
                self._copies.pop(name, None)
                (self.directory / name).unlink(missing_ok=True)
        for name, pieces in parts.items():
            token = repr([listing.get(file) for file in (name, *pieces)])
            known = self._copies.get(name)
            if known is None or known.token != token or local.get(name) != known.state:
                used = self._fetch(name, name in listing, pieces)
                self._copies[name] = _Copy(token, _state(self.directory / name), used)
            self._hidden |= {*pieces} - {*self._copies[name].parts}

    def _fetch(self, name: str, has_beginning: bool, parts: list[str]) -> tuple[str, ...]:
        """Write a file of the store into the copy: its beginning, if there is one, and the parts that continue it.
        Return these parts; others are left from before a cut."""
        path, used = self.directory / name, []
        temporary = temporary_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        is_wanted = self._is_wanted(name)
        if has_beginning and is_wanted:
            self._store.get(name, temporary)
        else:
            temporary.write_bytes(b"")
        with temporary.open("ab") as file:
            for part, content in zip(parts, self._store.read(parts if is_wanted else []), strict=False):
                if part.endswith(_PARTS + f"{file.tell():015d}"):
                    file.write(content.partition(b"\n")[2])
                    used.append(part)
        os.replace(temporary, path)
        return tuple(used)

    def _is_wanted(self, name: str) -> bool:
        return any(fnmatch(Path(name).name, pattern) for pattern in self._only)

    def _local_files(self) -> dict[str, State]:
        """The files of the copy and their states, by name, but for those that are not written to the end."""
        files = {}
        for directory, _, names in os.walk(self.directory):
            for path in (Path(directory) / name for name in names if not fnmatch(name, ".*.tmp")):
                with suppress(FileNotFoundError):  # a file of a library that writes in the background
                    files[path.relative_to(self.directory).as_posix()] = _state(path)
        return files

    def _push_file(self, name: str, state: State) -> None:
        known, path = self._copies.get(name), self.directory / name
        if known is None and name not in self._hidden and state[1] < _CREATED_SIZE:
            self._store.create(name, path.read_bytes())
            self._copies[name] = _Copy("", state)
        elif known and path.suffix == ".jsonl" and known.state[0] == state[0] and known.state[1] <= state[1]:
            self._append(name, known, state)
        else:
            self._put(name, state)

    def _append(self, name: str, known: _Copy, state: State) -> None:
        """Push what was appended to a file in place."""
        start, stop = known.state[1], state[1]
        if start == stop:
            self._copies[name] = known._replace(state=state)
            return
        with (self.directory / name).open("rb") as file:
            file.seek(start)
            content = file.read(stop - start)
        part = f"{name}{_PARTS}{start:015d}"
        self._store.create(part, f"{self._writer}\n".encode() + content)
        self._copies[name] = _Copy("", state, (*known.parts, part))

    def _put(self, name: str, state: State) -> None:
        """Push a whole file, and delete its parts."""
        self._store.put(name, self.directory / name)
        if name in self._copies:
            self._store.remove(self._copies[name].parts)
        self._copies[name] = _Copy("", state)

    def _files_of(self, name: str) -> tuple[str, ...]:
        """The names under which a file and its parts lie in the store."""
        return (name, *self._copies[name].parts)


_MIRRORS: dict[tuple[str, tuple[str, ...]], Mirror] = {}
_SHOWN: dict[str, str] = {}


def _mirror_of(path: Path) -> Mirror | None:
    return next((mirror for mirror in _MIRRORS.values() if path.is_relative_to(mirror.directory)), None)


def _beginning(protocol: str) -> str:
    """What the URLs of a protocol begin with. Those of files are paths from the root."""
    return f"{protocol}:///" if protocol in ("file", "local") else f"{protocol}://"


def _names(text: bytes) -> list[str]:
    """The names in the list of files that a process uploads together; none if the list is damaged."""
    try:
        return [str(name) for name in json.loads(text)]
    except (ValueError, TypeError, RecursionError):
        return []


def _state(path: Path) -> State:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _temporary_directory() -> Path:
    """The directory of this process's copies, which is deleted when it ends."""
    global _temporary
    if _temporary is None:
        _temporary = Path(tempfile.mkdtemp(prefix="jaxscape-"))
        atexit.register(shutil.rmtree, _temporary, ignore_errors=True)
    return _temporary


_temporary: Path | None = None
