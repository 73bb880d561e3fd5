"""How SIGTERM ends a program: after the work in hand, with an exit code upon which schedulers run it again.

Schedulers send SIGTERM to a program whose machine they need, and kill it some seconds later. Importing this module does
not import JAX.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 75
"""EX_TEMPFAIL of `sysexits.h`: the program did not fail, and is to be run again."""
SUPERVISED = "JAXSCAPE_SUPERVISED"
"""The environment variable that tells a process that it has a supervisor, see `jaxscape.runtime.processes`."""
_SAME_SECONDS = 1.0  # signals that come within this time are one request: some launchers signal a process twice


class Preempted(BaseException):
    """SIGTERM has ended the program. What was finished is on disk.

    Attributes:
        is_agreed: whether all processes of the run end now.
    """

    def __init__(self, is_agreed: bool = False) -> None:
        super().__init__("ended by SIGTERM")
        self.is_agreed = is_agreed


class Requests:
    """The requests to end that a process has received."""

    def __init__(self) -> None:
        self._first: float | None = None

    def __bool__(self) -> bool:
        return self._first is not None

    def is_second(self) -> bool:
        """Take a signal; return whether it is not part of the first request."""
        now = time.monotonic()
        self._first = now if self._first is None else self._first
        return now - self._first >= _SAME_SECONDS


_requests = Requests()
_num_postponing = 0  # how many contexts of `postponed` the program is in


@contextmanager
def preemptible() -> Iterator[None]:
    """A context for a whole program, in which SIGTERM raises `Preempted`: at once, or after the work in hand where that
    is `postponed`. A second one ends the process as if there were no such context. Outside the main thread, which alone
    receives signals, the context does nothing."""
    global _requests
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _requests = Requests()
    before = signal.signal(signal.SIGTERM, _take)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _requests = Requests()


@contextmanager
def postponed() -> Iterator[Callable[[], None]]:
    """A context in which SIGTERM waits. It yields a function that is to be called whenever something is finished and on
    disk, in all processes of the run: it raises `Preempted` in all of them if one has received SIGTERM."""
    global _num_postponing
    _num_postponing += 1
    try:
        yield _stop_if_asked
        _stop_if_asked()
    finally:
        _num_postponing -= 1
    if _requests and not _num_postponing:
        raise Preempted  # the signal came after the last call


def _stop_if_asked() -> None:
    """Raise `Preempted` in all processes if one has received SIGTERM."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    is_asked = bool(_requests)
    if jax.process_count() > 1:
        is_asked = bool(np.any(multihost_utils.process_allgather(np.bool_(is_asked))))
    if is_asked:
        raise Preempted(is_agreed=True)


def _take(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM."""
    is_new, is_second = not _requests, _requests.is_second()
    if is_second and SUPERVISED not in os.environ:  # a supervisor counts for itself, and its signals come here too
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    if is_new and not _num_postponing:
        raise Preempted
