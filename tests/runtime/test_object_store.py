"""Runs in an S3 server, over connections that are refused, slow and cut."""

import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import fsspec
import pytest
import s3fs
from object_store import Proxy, contents, new_process, s3_server

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.runtime import remote

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


def test_a_scan_over_bad_connections_ends_with_the_bytes_of_one_on_disk(
    tiny: js.Model, unbroken: Path, bucket: str, proxy: Proxy
) -> None:
    faults = ["reset", "lose", "cut", "slow", "full"]
    proxy.fault = lambda number, line: faults[number // 6 % 5] if number % 6 == 0 else ""
    js.scan(tiny, [0, 1], out=f"{bucket}/run", **OPTIONS)
    proxy.fault = lambda number, line: ""
    assert contents(f"{bucket}/run") == contents(unbroken)
    assert {line.rpartition(": ")[2] for line in proxy.log} == {*faults}


def test_a_scan_that_ends_at_any_request_goes_on_and_loses_no_point(
    tiny: js.Model, unbroken: Path, bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """The connection is cut for good at random requests, and what has been reported by then is in the store."""
    monkeypatch.setattr(remote, "PATIENCE", 0.0)
    generator, whole = random.Random(1), (unbroken / "generations.jsonl").read_bytes()
    for fault in ("reset", "lose", "cut", "deny", "reset", "lose"):
        new_process()
        last = proxy.count + generator.randrange(4, 14)
        proxy.fault = lambda number, line, last=last, fault=fault: fault if number >= last else ""  # type: ignore[misc]
        with pytest.raises(js.UserError, match=f"^{bucket}/run cannot be used"):
            js.scan(tiny, [0, 1], out=f"{bucket}/run", **OPTIONS | {"progress": True})
        proxy.fault = lambda number, line: ""
        num_reported = max([0, *map(int, re.findall(r"\b(\d+)/10\b", capfd.readouterr().err))])
        new_process()
        state = remote.run_directory(f"{bucket}/run") / "generations.jsonl"
        kept = state.read_bytes() if state.exists() else b""
        assert whole.startswith(kept)
        assert kept.count(b"\n") >= 3 * num_reported
    new_process()
    js.scan(tiny, [0, 1], out=f"{bucket}/run", **OPTIONS)
    assert contents(f"{bucket}/run") == contents(unbroken)


def test_a_killed_process_goes_on_where_it_was(tiny_dir: Path, bucket: str, proxy: Proxy, tmp_path: Path) -> None:
    """It is killed when the server is told to store its third point, and the server does so."""
    command = ["scan", "--model", str(tiny_dir), "--num-prompts", "3", "--steps", "4", "--max-new-tokens", "6"]
    command += ["--no-shares", "--out"]
    program = [sys.executable, "-m", "jaxscape", *command, f"{bucket}/run"]
    num_parts = 0

    def kill(number: int, line: str) -> str:
        nonlocal num_parts
        num_parts += line.startswith("PUT") and ".parts/" in line
        if num_parts < 3:
            return ""
        process.send_signal(signal.SIGKILL)
        process.wait()
        return "lose"

    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        proxy.fault = kill
    proxy.fault = lambda number, line: ""
    assert process.returncode == -signal.SIGKILL, "it was killed, not finished"
    main([*command, f"{bucket}/run"])
    main([*command, str(tmp_path / "run")])
    assert contents(f"{bucket}/run") == contents(tmp_path / "run")


def test_a_second_writer_is_noticed(bucket: str, tmp_path: Path) -> None:
    first, second = (remote.Mirror(f"{bucket}/run", ("*",), tmp_path / name) for name in ("first", "second"))
    conflict = f"^Another process has written to {bucket}/run; wait for it, or choose another --out"

    def append(mirror: remote.Mirror, line: str) -> None:
        with (mirror.directory / "state.jsonl").open("a") as file:
            file.write(f"{line}\n")
        mirror.push()

    def write(mirror: remote.Mirror, name: str, content: str) -> None:
        (mirror.directory / name).write_text(content)
        mirror.push()

    fsspec.filesystem("s3").touch(f"{bucket}/run/")  # what marks a folder in the web page of S3
    first.open()
    append(first, "1")
    append(first, "2")
    second.open()
    append(second, "3")
    with pytest.raises(js.UserError, match=conflict):
        append(first, "3")  # although it is the same line
    (first.directory / "state.jsonl").write_text("1\n2\n")
    second.push()
    second.join_parts()
    with pytest.raises(js.UserError, match=conflict):
        first.join_parts()
    assert contents(f"{bucket}/run")["state.jsonl"] == b"1\n2\n3\n"
    write(second, "config.json", "second")
    with pytest.raises(js.UserError, match=conflict):
        write(first, "config.json", "first")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("deny", "cannot be used .*PermissionError: The server says AccessDenied.*: check the credentials"),
        ("full", "cannot be used .*The server says XMinioStorageFull"),
        ("slow", "cannot be used .*Read timeout on endpoint"),
        ("reset", "cannot be used .*: check the address, the credentials and the network"),
    ],
)
def test_a_store_that_does_not_answer_at_first_is_an_error_at_once(
    bucket: str, proxy: Proxy, fault: str, message: str
) -> None:
    proxy.fault = lambda number, line: fault
    with pytest.raises(js.UserError, match=f"^{bucket}/run {message}"):
        remote.run_directory(f"{bucket}/run")


def test_a_bucket_that_is_missing_and_credentials_that_are_missing(
    bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(js.UserError, match=r"^s3://no-such-bucket/run cannot be used .*bucket does not exist"):
        remote.run_directory("s3://no-such-bucket/run")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "none")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(js.UserError, match=r"NoCredentialsError.*: check the address, the credentials"):
        remote.fetched(f"{bucket}/prompts.csv")


def test_a_server_that_is_away_for_a_while_is_waited_for(
    bucket: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = remote.Mirror(f"{bucket}/run", ("*",), tmp_path)
    mirror.open()
    proxy.close()
    (mirror.directory / "a.txt").write_text("a")
    Timer(0.3, proxy.open).start()
    mirror.push()
    assert contents(f"{bucket}/run") == {"a.txt": b"a"}
    proxy.close()
    monkeypatch.setattr(remote, "PATIENCE", 0.1)
    (mirror.directory / "a.txt").write_text("other")
    with pytest.raises(js.UserError, match="What was reported is there: run the same command again to go on"):
        mirror.push()
    proxy.open()
    mirror.push()
    assert contents(f"{bucket}/run") == {"a.txt": b"other"}
