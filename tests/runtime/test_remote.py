"""Runs, models and prompt files at URLs, in a store in memory."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from object_store import contents, new_process

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.models.lora import load_adapter
from jaxscape.report.exports.registry import EXPORTS
from jaxscape.runtime import remote, rundir
from jaxscape.runtime.files import append_json_lines, cut_after, whole_lines, write_whole

KIND = rundir.RunKind("scan", "state.jsonl", frozenset({"a"}), computed=("result.json",))
PROMPTS = js.load_prompts("harmful", 3)
# The form is given, because the planner may choose another one for a larger run.
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 6,
    "progress": False,
    "shares": False,
    "options": js.EngineOptions(form="materialised"),
}
RUN = "memory://bucket/run"
SCAN = ["scan", "--steps", "4", "--num-prompts", "3", "--max-new-tokens", "6", "--no-shares"]


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


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


@pytest.fixture(scope="module")
def small(tiny: js.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small")
    js.scan(tiny, [0], prompts=PROMPTS, steps=2, radius=0.25, out=directory, **OPTIONS)
    return directory


@pytest.fixture(scope="module")
def large(tiny: js.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("large")
    js.scan(tiny, [0], prompts=PROMPTS, steps=4, out=directory, **OPTIONS)
    return directory


@pytest.mark.parametrize("how", ["extend", "overwrite"])
def test_a_run_is_replaced_by_another_although_the_process_dies_at_every_second_request(
    tiny: js.Model, small: Path, large: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    js.scan(tiny, [0], prompts=PROMPTS, steps=2, radius=0.25, out=RUN, **OPTIONS)
    assert contents(RUN) == contents(small)
    num_deaths = 0
    for after in [*range(2, 60, 4), 10**6]:
        new_process()
        with monkeypatch.context() as patch, suppress(Death):
            dying(patch, after, late=bool(after % 2))
            is_begun = contents(RUN)["config.json"] == contents(large)["config.json"]
            again = {} if is_begun and how == "overwrite" else {how: True}
            js.scan(tiny, [0], prompts=PROMPTS, steps=4, out=RUN, **OPTIONS | again)
            break
        num_deaths += 1
    assert num_deaths >= 5
    assert contents(RUN) == contents(large)


def test_every_verb_that_reads_a_run_takes_a_url(
    tiny_dir: Path, store: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"{RUN}-1"

    def export(kept: Any, out: Path) -> list[Path]:  # as a library does that knows nothing of stores
        (out / "points.csv").write_text("1")
        return [out / "points.csv"]

    def ran(*command: str) -> str:
        new_process()
        main(command)
        return capsys.readouterr().out

    assert ran(*SCAN, "--model", str(tiny_dir), "--out", run).endswith(f"\n{run}/landscape.png\n")
    assert ran(*SCAN, "--model", str(tiny_dir), "--seed", "1", "--out", f"{RUN}-2").endswith(f"{RUN}-2/landscape.png\n")
    assert {"config.json", "generations.jsonl", "landscape.json", "landscape.png"} < {*contents(run)}
    assert ran("report", run) == f"{run}/report.html\n"
    assert ran("plot", run) == f"{run}/landscape.png\n"
    assert ran("score", run, "--evaluator", "wei").endswith(f"\n{run}/landscape.json\n")
    monkeypatch.setitem(EXPORTS, "csv", export)
    assert ran("export", run, "--to", "csv") == f"{run}/points.csv\n"
    assert {"report.html", "labels-wei.jsonl", "points.csv"} < {*contents(run)}
    assert "wei" in js.Landscape.load(run).measures
    ran("compare", run, f"{RUN}-2", "--out", "memory://bucket/comparison")
    assert "table.md" in contents("memory://bucket/comparison")
    table = ran("runs", "memory://bucket")
    assert [line.split()[0] for line in table.splitlines()] == ["run", f"{RUN}-2", run] or run in table
    assert "finished  5 of 5 points" in table
    store.rm_file("/bucket/run-2/landscape.json")
    assert "unfinished  0 of 5 points" in ran("runs", "memory://bucket")


def test_models_directions_points_and_prompts_come_from_urls(
    tiny: js.Model, tiny_dir: Path, tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXSCAPE_CACHE", str(tmp_path / "cache"))
    store.put(str(tiny_dir), "/bucket/model", recursive=True)
    js.save_direction(js.random_direction(tiny, 3), tmp_path / "d.safetensors", tiny)
    store.put_file(str(tmp_path / "d.safetensors"), "/bucket/d.safetensors")
    store.pipe_file("/bucket/prompts.csv", b"prompt\nHi\nTell me\n")
    store.pipe_file("/bucket/points.csv", b"0.25\n0\n")
    command = ["scan", "--model", "memory://bucket/model", "--prompts", "memory://bucket/prompts.csv", "--no-shares"]
    command += ["--direction", "file:memory://bucket/d.safetensors", "--points", "memory://bucket/points.csv"]
    main([*command, "--no-control", "--max-new-tokens", "6", "--out", RUN])
    config = json.loads(contents(RUN)["config.json"])
    assert config["model"] == "memory://bucket/model"
    assert config["direction_names"] == [["file:memory://bucket/d.safetensors"]]
    assert contents(RUN)["generations.jsonl"].count(b"\n") == 4
    store.pipe_file("/bucket/prompts.csv", b"prompt\nHi\nTell them\n")  # what has changed is fetched again
    assert list(js.load_prompts("memory://bucket/prompts.csv")) == ["Hi", "Tell them"]


def test_a_finetuning_dies_and_goes_on(tiny: js.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXSCAPE_CACHE", str(tmp_path / "cache"))
    chats, training = js.load_chats("safe:4"), js.Training(epochs=2, batch_size=4)
    expected = js.finetune(tiny, chats, training, progress=False).adapter
    for after in (14, 35, 10**6):
        new_process()
        with monkeypatch.context() as patch, suppress(Death):
            dying(patch, after, late=False)
            js.finetune(tiny, chats, training, out=RUN, progress=False)
    assert expected is not None
    adapter = load_adapter(remote.fetched(f"{RUN}/adapter"))
    jax.tree.map(np.testing.assert_array_equal, adapter.factors, expected.factors)
    assert {name.partition("/")[0] for name in contents(RUN)} == {"adapter", "checkpoints", "config.json", "log.jsonl"}
    assert js.load_model(f"{RUN}/adapter").name == f"{RUN}/adapter"
    with pytest.raises(js.UserError, match=f"{RUN}/adapter lies in {RUN}, the directory that"):
        js.finetune(js.load_model(f"{RUN}/adapter"), chats, training, out=RUN, overwrite=True)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("xyz://bucket/run", "xyz://bucket/run cannot be opened .*Protocol not known: xyz.*: check the address"),
        ("gs://bucket/run", "gs://bucket/run cannot be opened .*: run pip install 'jaxscape\\[cloud\\]'"),
        ("memory://bucket/file", "memory://bucket/file is a file, and no directory of a run"),
        ("memory://bucket/up", "memory://bucket/up has a file '../x'"),
        ("memory://bucket/other", "memory://bucket/other is no run's directory and has files in it"),
    ],
)
def test_a_url_that_cannot_be_used_is_an_error_of_one_sentence(
    tiny_dir: Path, store: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch, url: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for name in ("file", "up/../x", "other/notes.txt"):
        store.pipe_file(f"/bucket/{name}", b"mine")
    with pytest.raises(SystemExit, match="2"):
        main([*SCAN, "--model", str(tiny_dir), "--out", url])
    assert re.fullmatch(f"jaxscape: {message}.*\\.\n", capsys.readouterr().err.splitlines(keepends=True)[-1])


def test_a_part_of_a_directory_is_read_and_written(store: Any) -> None:
    for name in ("table.md", "run/state.jsonl"):
        store.pipe_file(f"/bucket/{name}", b"content\n")
    directory = remote.run_directory("memory://bucket", ("table.*",))
    assert contents(directory) == {"table.md": b"content\n", "run/state.jsonl": b""}
    write_whole(directory / "table.csv", "new")
    (directory / "run" / "state.jsonl").unlink()
    write_whole(directory / "table.md", "new")
    assert contents("memory://bucket") == {"table.md": b"new", "table.csv": b"new", "run/state.jsonl": b"content\n"}


def test_there_is_nothing_at_a_url() -> None:
    for read in (js.load_prompts, js.load_model):
        with pytest.raises(js.UserError, match=r"There is nothing at memory://bucket/none\.csv: check the address"):
            read("memory://bucket/none.csv")
    with pytest.raises(js.UserError, match="holds no landscape"):
        js.Landscape.load("memory://bucket/none")


@given(url=st.from_regex(r"(s3|gs|abfs)://[a-z0-9.@-]{3,9}(/[A-Za-z0-9._ =-]{1,9}){0,3}", fullmatch=True))
def test_a_path_keeps_what_its_url_is(url: str) -> None:
    assert remote.url_of(url) == url
    if not {".", ".."} & {*url.split("/")}:
        assert remote.url_of(Path(url)) == url
        assert remote.url_of(Path(url) / "run") == f"{url}/run"


@pytest.mark.parametrize("path", ["runs/a", "/runs/s3:/x", "C:/x", "random:0", "file.csv", "a:b", ""])
def test_paths_on_a_disk_are_no_urls(path: str) -> None:
    assert remote.url_of(path) is None
    assert remote.fetched(path) == remote.run_directory(path) == Path(path)


def test_texts_for_the_user_have_urls() -> None:
    run = remote.run_directory(RUN)
    text = f"{run / 'a.png'} is neither {Path(RUN) / 'b c'} nor {RUN}/d, memory:x or /memory:/e."
    assert remote.shown(text) == f"{RUN}/a.png is neither {RUN}/b c nor {RUN}/d, memory:x or /memory:/e."


def test_urls_of_files_name_their_place() -> None:
    assert remote.url_of("file:///a/b") == remote.url_of(Path("file:///a/b")) == "file:///a/b"
