"""Runs, models and prompt files at URLs, in a store in memory."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.runtime import remote, rundir
from jaxscape.runtime.files import append_json_lines, cut_after, whole_lines, write_whole

KIND = rundir.RunKind("scan", "state.jsonl", frozenset({"a"}), computed=("result.json",))
PROMPTS = js.load_prompts("harmful", 3)
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "progress": False, "shares": False}
RUN = "memory://bucket/run"
SCAN = ["scan", "--steps", "4", "--num-prompts", "2", "--max-new-tokens", "6"]


class Death(BaseException):
    """The process ends."""


@pytest.fixture(autouse=True)
def store() -> Iterator[Any]:
    """An empty store."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    new_process()


def new_process() -> None:
    """Forget the copies of runs, as the end of a process does."""
    remote._MIRRORS.clear()
    remote._temporary = None


def contents(directory: str | Path) -> dict[str, bytes]:
    """The files below a URL or a directory, as they lie there."""
    filesystem, root = fsspec.url_to_fs(str(directory))
    return {name[len(root) + 1 :]: filesystem.cat_file(name) for name in filesystem.find(root)}


def dying(patch: pytest.MonkeyPatch, after: int, late: bool) -> None:
    """Let the process die at a request to the store, before or after the store has done what it asks for."""
    original, count = remote._Store.tried, [0]

    def tried(self: Any, action: Callable[[], Any]) -> Any:
        count[0] += 1
        if count[0] <= after:
            return original(self, action)
        if count[0] == after + 1 and late:
            original(self, action)
        raise Death

    patch.setattr(remote._Store, "tried", tried)


LINES = st.sampled_from(["state.jsonl", "labels.jsonl"])
CHANGES = st.one_of(
    st.tuples(st.just("append"), LINES, st.integers(1, 3)),
    st.tuples(st.just("append"), LINES, st.integers(1, 3)),
    st.tuples(st.just("cut"), LINES, st.integers(0, 2)),
    st.tuples(st.just("write"), st.just("result.json"), st.integers(0, 9)),
    st.tuples(st.just("remove"), st.sampled_from(["result.json", "labels.jsonl", "one/a"]), st.just(0)),
    st.tuples(st.just("folder"), st.sampled_from(["one", "two"]), st.integers(0, 9)),
)


def change(directory: Path, what: str, name: str, number: int) -> None:
    """Change files of a run as its writers do."""
    path = directory / name
    if what == "append":
        with path.open("ab") as file:
            append_json_lines(file, [{"line": number}] * number)
    elif what == "cut" and path.exists():
        with path.open("r+b") as file:
            cut_after(file, whole_lines(file)[:number])
    elif what == "write":
        write_whole(path, f"{number}\n" * number)
    elif what == "remove":
        path.unlink(missing_ok=True)
        remote.push(path)
    elif what == "folder":
        path.mkdir(exist_ok=True)
        for part in "ab":
            (path / part).write_text(f"{number}")
        remote.push(path)


def check_between(found: dict[str, bytes], before: dict[str, bytes], after: dict[str, bytes]) -> None:
    """A process died while it made the files `after` of the files `before`."""
    for name in {*found, *before, *after}:
        content, versions = found.get(name), (before.get(name), after.get(name))
        is_half_cut = None not in (content, *versions) and before[name].startswith(found[name])
        assert content in versions or (is_half_cut and found[name].startswith(after[name]))
    for folder in ("one", "two"):  # new files come together
        if not any(name.startswith(folder) for name in before):
            assert (f"{folder}/a" in found) == (f"{folder}/b" in found)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(CHANGES, max_size=12),
    deaths=st.lists(st.tuples(st.integers(0, 25), st.booleans()), max_size=5),
)
def test_whatever_was_pushed_is_there_when_a_process_dies_at_any_request(
    store: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[Any],
    deaths: list[tuple[int, bool]],
) -> None:
    store.store.clear()
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no machine dies here
    plain, expected = tmp_path_factory.mktemp("plain"), [dict[str, bytes]()]
    for each in changes:
        change(plain, *each)
        expected.append(contents(plain))
    done = 0
    for death in [*deaths, None]:
        new_process()
        with monkeypatch.context() as patch, suppress(Death):
            if death is not None:
                dying(patch, *death)
            directory = remote.run_directory(RUN)
            found = contents(directory)
            if done < len(changes) and found == expected[done + 1]:
                done += 1
            check_between(found, expected[done], expected[min(done + 1, len(changes))])
            with remote.writing(directory):
                for number in range(done, len(changes)):
                    change(directory, *changes[number])
                    done = number + 1
    assert contents(RUN) == expected[-1]
