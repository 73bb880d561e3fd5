"""Child processes to which this process passes on the signals that it gets."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from jaxscape.runtime.preemption import Requests


def run_child(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run a command, and pass SIGINT and SIGTERM on to it; a second SIGTERM kills it.

    The child has a process group of its own, so that a terminal's Ctrl-C does not reach it twice.

    Arguments:
        environment: variables that are added to those of this process.

    Returns:
        The exit code of the child; -N if signal N has ended it.
    """
    requests, early = Requests(), list[int]()
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: object) -> None:
        if child is None:
            early.append(number)
        else:
            child.send_signal(signal.SIGKILL if number == signal.SIGTERM and requests.is_second() else number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        child = subprocess.Popen(command, env=os.environ | dict(environment or {}), process_group=0)
        for number in early:
            pass_on(number, None)
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
