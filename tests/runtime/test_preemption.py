"""What SIGTERM does to a program."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jaxscape.runtime import preemption
from jaxscape.runtime.preemption import Preempted, postponed, preemptible


def ask() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(100):  # Python handles a signal before one of its next steps
        pass


@contextmanager
def preempted(is_agreed: bool) -> Iterator[None]:
    with pytest.raises(Preempted) as stop:
        yield
    assert stop.value.is_agreed == is_agreed


def test_a_signal_ends_the_program_at_once_or_after_the_work_in_hand() -> None:
    done = []
    before = signal.getsignal(signal.SIGTERM)
    with preempted(is_agreed=False), preemptible():
        ask()
        done.append("never")
    with preempted(is_agreed=True), preemptible(), postponed() as stop_if_asked:
        for number in range(9):
            if number == 2:
                ask()
            done.append(number)
            stop_if_asked()
    assert done == [0, 1, 2]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_comes_with_the_last_work_is_not_forgotten() -> None:
    with preempted(is_agreed=True), preemptible():
        with postponed():
            ask()
        raise AssertionError("never")
    with preempted(is_agreed=True), preemptible(), postponed(), postponed() as stop_if_asked:
        ask()
        stop_if_asked()


def test_an_error_is_not_hidden_by_a_signal() -> None:
    def fail() -> None:
        with preemptible(), postponed():
            ask()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with preemptible(), postponed() as stop_if_asked:  # a program that begins later has received none
        stop_if_asked()


def test_other_threads_go_on_as_without_the_context() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with preemptible():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize(("seconds", "code"), [(0.0, -signal.SIGTERM), (60.0, preemption.EXIT_CODE)])
def test_a_second_signal_ends_the_process(seconds: float, code: int) -> None:
    """Signals that come together are one, because launchers signal a process and its group."""
    program = f"""
import os, signal, sys
from jaxscape.runtime import preemption
preemption._SAME_SECONDS = {seconds}
try:
    with preemption.preemptible(), preemption.postponed() as stop_if_asked:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        stop_if_asked()
except preemption.Preempted:
    sys.exit(preemption.EXIT_CODE)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == code
