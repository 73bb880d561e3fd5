"""Helpers for tests of runs in object stores: a real S3 server in a process of its own, a TCP proxy in front of it that
injects faults, and a function that reads all files of a store."""

import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec

from jaxscape.runtime import remote

ANSWER = b"HTTP/1.1 %d Refused\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"
ERROR = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>The server says %s</Message></Error>"
REQUEST = re.compile(rb"(GET|PUT|POST|DELETE|HEAD) (\S+) HTTP")
ANSWERS = {"deny": (403, b"AccessDenied"), "full": (507, b"XMinioStorageFull")}


def contents(directory: str | Path) -> dict[str, bytes]:
    """The files below a URL or a directory, as they lie there."""
    filesystem, root = fsspec.url_to_fs(str(directory))
    filesystem.invalidate_cache()
    return {name[len(root) + 1 :]: filesystem.cat_file(name) for name in filesystem.find(root)}


def new_process() -> None:
    """Forget the copies of runs, as the end of a process does."""
    remote._MIRRORS.clear()
    remote._temporary = None


class Proxy:
    """A TCP proxy on this machine. Connections go to `port`, and come to grief as `fault` says.

    Attributes:
        address: the URL of the proxy.
        fault: is called with the number of each request, from 1, and its first line, and returns what happens to it:
            nothing if empty; `reset` (the connection is reset before the server has the request), `lose` (after the
            server has answered), `cut` (in the middle of the answer), `slow` (the request comes late), or `deny` and
            `full`, which are answers.
        log: each request that something happened to.
    """

    def __init__(self, port: int, delay: float = 0.0) -> None:
        self.fault: Callable[[int, str], str] = lambda number, line: ""
        self.log: list[str] = []
        self.count = 0
        self._port, self._delay, self._lock = port, delay, threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._own_port = self._listener.getsockname()[1]
        self.address = f"http://127.0.0.1:{self._own_port}"
        self._start()

    def close(self) -> None:
        """Refuse connections from now on."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def open(self) -> None:
        """Accept connections again."""
        self._listener = socket.create_server(("127.0.0.1", self._own_port))
        self._start()

    def _start(self) -> None:
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # it was closed
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _choose(self, line: str) -> str:
        with self._lock:
            self.count += 1
            fault = self.fault(self.count, line)
            if fault:
                self.log.append(f"request {self.count}, {line}: {fault}")
            return fault

    def _serve(self, client: socket.socket) -> None:
        fault = ""
        with suppress(OSError), client, socket.create_connection(("127.0.0.1", self._port)) as server:
            while True:
                for source in select.select([client, server], [], [])[0]:
                    content = source.recv(2**16)
                    if not content:
                        return
                    if source is server:
                        is_answer = not content.startswith(b"HTTP/1.1 100")
                        if fault in ("lose", "cut") and is_answer:
                            client.sendall(content[: len(content) // 2] if fault == "cut" else b"")
                            return _reset(client)
                        client.sendall(content)
                        continue
                    if match := REQUEST.match(content):
                        fault = self._choose(f"{match[1].decode()} {match[2].decode()}")
                        if fault == "reset":
                            return _reset(client)
                        if fault == "slow":
                            time.sleep(self._delay)
                        if fault in ANSWERS:
                            status, code = ANSWERS[fault]
                            text = ERROR % (code, code)
                            return client.sendall(ANSWER % (status, len(text), text))
                    server.sendall(content)


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@contextmanager
def s3_server(log: Path) -> Iterator[int]:
    """The port of moto's S3 server, which runs in another process and writes its requests to the log."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            while process.poll() is None:
                with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.05)
            assert process.poll() is None, log.read_text()
            yield port
        finally:
            process.kill()
