"""Standard streams that no locale and no closed pipe can break."""

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from jaxscape.runtime import remote

BROKEN_PIPE = 128 + signal.SIGPIPE
"""The exit code of a program that is ended because no one reads its output any more, as a shell reports it."""


@contextmanager
def safe_streams() -> Iterator[None]:
    """A context for a whole program, in which writing to the standard streams does no harm.

    A character that a stream's encoding lacks is replaced by a question mark. A stream that was closed before the
    program started leads to the null device. When the reader of a pipe has gone, the program ends without a message
    and with the exit code `BROKEN_PIPE`; a program that has finished keeps its own exit code.
    """
    _reserve_descriptors()
    sys.stdout, sys.stderr = _writable(sys.stdout), _writable(sys.stderr)
    try:
        yield
    except BrokenPipeError:
        sys.exit(BROKEN_PIPE)
    finally:
        flush_streams()


def write_line(text: str) -> None:
    """Write a line on the standard output stream. It is dropped if no one reads the stream: it says what has been
    done, which closing the pipe does not undo."""
    with suppress(BrokenPipeError):
        sys.stdout.write(remote.shown(text) + "\n")
    flush_streams()


def flush_streams() -> None:
    """Write what the standard streams still hold. What no one reads is dropped; Python would try again at its end, and
    complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            with open(os.devnull, "w", encoding="utf-8") as null:
                os.dup2(null.fileno(), stream.fileno())


def _reserve_descriptors() -> None:
    """Open the null device for each standard stream that is closed. Otherwise the next file that is opened would get
    its number, and messages of libraries would be written into that file."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one


def _writable(stream: Any) -> Any:
    if stream is None:  # it was closed when Python started
        return open(os.devnull, "w", encoding="utf-8")
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    return stream
