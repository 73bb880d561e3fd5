"""Runs in an S3 server, over connections that are refused, slow and cut."""

import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs
from object_store import Proxy, s3_server

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.runtime import remote, rundir
from jaxscape.runtime.files import append_json_lines

KIND = rundir.RunKind("scan", "state.jsonl", frozenset({"a"}))
PROMPTS = js.load_prompts("harmful", 3)
OPTIONS: dict[str, Any] = {"prompts": PROMPTS, "steps": 4, "max_new_tokens": 6, "progress": False, "shares": False}
TIMEOUT = 0.5


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with s3_server(tmp_path_factory.mktemp("s3") / "server.log") as port:
        yield port


@pytest.fixture
def proxy(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The way to the server. The libraries of the store hardly repeat requests themselves, so that faults arrive."""
    proxy = Proxy(port, 2 * TIMEOUT)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": proxy.address,
        "AWS_CONFIG_FILE": "none",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    config = {"retries": {"max_attempts": 0}, "connect_timeout": TIMEOUT, "read_timeout": TIMEOUT}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": config})
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    s3fs.S3FileSystem.clear_instance_cache()
    yield proxy
    proxy.close()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(proxy: Proxy) -> str:
    name = f"bucket-{random.randrange(10**9)}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="module")
def unbroken(tiny: js.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unbroken")
    js.scan(tiny, [0, 1], out=directory, **OPTIONS)
    return directory


def contents(directory: str | Path) -> dict[str, bytes]:
    """The files below a URL or a directory, as they lie there."""
    filesystem, root = fsspec.url_to_fs(str(directory))
    filesystem.invalidate_cache()
    return {name[len(root) + 1 :]: filesystem.cat_file(name) for name in filesystem.find(root)}


def num_parts(run: str) -> int:
    filesystem = fsspec.filesystem("s3")
    filesystem.invalidate_cache()
    return sum(".parts/" in name for name in filesystem.find(run))


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the copies of runs, as the end of a process does."""
    monkeypatch.setattr(remote, "_MIRRORS", {})
    monkeypatch.setattr(remote, "_temporary", None)


def test_a_scan_over_bad_connections_ends_with_the_bytes_of_one_on_disk(
    tiny: js.Model, unbroken: Path, bucket: str, proxy: Proxy
) -> None:
    faults = ["reset", "lose", "cut", "slow", "full"]
    proxy.fault = lambda number, line: faults[number // 6 % 5] if number % 6 == 0 else ""
    js.scan(tiny, [0, 1], out=f"{bucket}/run", **OPTIONS)
    proxy.fault = lambda number, line: ""
    print("\n".join(proxy.log))
    assert contents(f"{bucket}/run") == contents(unbroken)
    assert {line.rpartition(": ")[2] for line in proxy.log} == {*faults}


def test_a_scan_that_ends_at_any_request_goes_on_and_loses_no_point(
    tiny: js.Model, unbroken: Path, bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """The connection is cut for good at random requests, and what has been reported by then is in the store."""
    monkeypatch.setattr(remote, "PATIENCE", 0.0)
    generator, whole = random.Random(1), (unbroken / "generations.jsonl").read_bytes()
    for fault in ("reset", "lose", "cut", "deny", "reset", "lose"):
        new_process(monkeypatch)
        last = proxy.count + generator.randrange(4, 14)
        proxy.fault = lambda number, line, last=last, fault=fault: fault if number >= last else ""  # type: ignore[misc]
        with pytest.raises(js.UserError, match=f"^{bucket}/run cannot be used"):
            js.scan(tiny, [0, 1], out=f"{bucket}/run", **OPTIONS | {"progress": True})
        proxy.fault = lambda number, line: ""
        num_reported = max([0, *map(int, re.findall(r"\b(\d+)/10\b", capfd.readouterr().err))])
        new_process(monkeypatch)
        state = remote.run_directory(f"{bucket}/run") / "generations.jsonl"
        kept = state.read_bytes() if state.exists() else b""
        assert whole.startswith(kept)
        assert kept.count(b"\n") >= 3 * num_reported
    new_process(monkeypatch)
    js.scan(tiny, [0, 1], out=f"{bucket}/run", **OPTIONS)
    assert contents(f"{bucket}/run") == contents(unbroken)


def test_a_killed_process_goes_on_where_it_was(
    tiny_dir: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["scan", "--model", str(tiny_dir), "--num-prompts", "3", "--steps", "40", "--max-new-tokens", "6"]
    run = f"{bucket}/run"
    program = [sys.executable, "-m", "jaxscape", *command, "--out", run]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while num_parts(run) < 3 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it was killed, not finished"
    main([*command, "--out", run])
    main([*command, "--out", str(tmp_path / "run")])
    assert contents(run) == contents(tmp_path / "run")


def test_a_second_writer_is_noticed(tiny: js.Model, bucket: str, unbroken: Path, monkeypatch: Any) -> None:
    out = f"{bucket}/run"
    first = rundir.open_run_directory(remote.run_directory(out), {"a": 1}, KIND)
    with first as file:
        assert file is not None
        append_json_lines(file, [{"line": 1}])
        mirrors = remote._MIRRORS
        new_process(monkeypatch)
        with (
            pytest.raises(js.UserError, match=f"^Another process has written to {out}; wait for it"),
            rundir.open_run_directory(remote.run_directory(out), {"a": 1}, KIND) as second,
        ):
            assert second is not None
            second.seek(0)
            assert second.read() == b'{"line": 1}\n'
            monkeypatch.setattr(remote, "_MIRRORS", mirrors)
            append_json_lines(file, [{"line": 2}])
