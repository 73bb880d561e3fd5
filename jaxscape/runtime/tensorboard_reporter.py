"""Reports to TensorBoard: event files in the folder `tensorboard` of the run's directory."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxscape.runtime.extras import import_extra

FOLDER = "tensorboard"


class TensorBoardReporter:
    """Writes each number as a scalar, at its step.

    A run that was killed may have reported steps that it takes again when it is resumed. The first event of each file
    therefore says that a session starts at its step: TensorBoard then drops what earlier files have from there on.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: tensorboard is not installed.
        """
        files = import_extra("tensorboard.summary.writer.event_file_writer", "tensorboard")
        self._events = import_extra("tensorboard.compat.proto.event_pb2", "tensorboard")
        self._summaries = import_extra("tensorboard.compat.proto.summary_pb2", "tensorboard")
        self._writer = files.EventFileWriter(str(directory / FOLDER))
        self._has_started = False

    def log(self, step: int, numbers: Mapping[str, int | float]) -> None:
        """Write numbers by name."""
        if not self._has_started:
            self._has_started = True
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._add(step, session_log=start)
        values = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._add(step, summary=self._summaries.Summary(value=values))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _add(self, step: int, **what: Any) -> None:
        self._writer.add_event(self._events.Event(step=step, wall_time=time.time(), **what))
