"""The progress of a scan, shown and reported: answers as they are finished, and a line for each point."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import Progress

from jaxscape.landscapes.axes import point_text
from jaxscape.landscapes.store import Run
from jaxscape.runtime.progress import progress_display
from jaxscape.runtime.reporting import Reporter
from jaxscape.runtime.texts import printable


class ScanProgress:
    """The progress of a run.

    Where many points decode together, most answers are finished long before the first point is. So the bar and the time
    left count answers, not points.
    """

    def __init__(self, run: Run, bar: Progress, reporter: Reporter) -> None:
        self._run, self._bar, self._reporter = run, bar, reporter
        self._resumed, self._started, self._finished = run.num_done, time.monotonic(), 0
        self._num_points, self._num_missing = 0, 0  # of the run, when they were last counted
        self._task = bar.add_task("scan", total=None)
        self._show()

    def answers(self, count: int) -> None:
        """Show that `count` more answers are finished, at whichever points."""
        self._finished += count
        self._show()

    def point(self) -> None:
        """Write a line for the point that was finished last: its coordinates, its ASR and the time left."""
        run, done, total = self._run, self._run.num_done, len(self._run.points)
        index, coords = run.points[done - 1]
        position, asr = point_text(run.axes, coords), 100 * (1 - run.refused[done - 1].mean())
        line = f"{done:>{len(str(total))}}/{total}  direction {index}  {position}  ASR {asr:5.1f} %"
        if self._finished:
            seconds = (time.monotonic() - self._started) / self._finished * self._num_left()
            line += f"  {timedelta(seconds=round(seconds))} left{'' if run.is_whole else ' in this round'}"
        nonfinite, unanswered = int((~run.finite[done - 1]).sum()), int(run.unanswered[done - 1].sum())
        if nonfinite:
            line += f"  ({nonfinite} of {len(run.prompts)} prompts met NaN or infinite logits)"
        if unanswered:
            line += f"  ({unanswered} of {len(run.prompts)} texts have thinking and no answer)"
        for name, rows in run.labels.rows.items():
            if unjudged := rows[done - 1].count(None) if len(rows) == done else 0:
                line += f"  ({printable(name)} could not judge {unjudged} of {len(run.prompts)} answers)"
        self._show()
        self._bar.print(line)
        place = {"direction": index, **{f"coord_{axis}": value for axis, value in enumerate(coords)}}
        self._reporter.log(done, {"asr": asr, "nonfinite": nonfinite, "unanswered": unanswered, **place})

    def _num_left(self) -> int:
        """The number of answers that must still be generated: those that the run does not know from one that it
        extends."""
        run = self._run
        if len(run.points) > self._num_points:  # at first, and when an adaptive scan has chosen its next points
            self._num_points = len(run.points)
            self._num_missing = sum(len(run.prompts) - len(run.known(point)) for point in run.points[self._resumed :])
        return self._num_missing - self._finished

    def _show(self) -> None:
        total = len(self._run.points) * len(self._run.prompts)
        self._bar.update(self._task, completed=total - self._num_left(), total=total or None)


@contextmanager
def scan_progress(
    run: Run, lines: Sequence[str], dtype: str, reporter: Reporter, enabled: bool
) -> Iterator[ScanProgress]:
    """A context with the progress of a run.

    Arguments:
        lines: what is shown first, if points are left.
        dtype: that of the model.
        reporter: is given the numbers of each point too. A step is the number of points that are evaluated.
    """
    resumed = run.num_done
    with progress_display(enabled) as bar:
        if resumed < len(run.points) or not run.is_whole:
            for line in lines:
                bar.print(line)
        if resumed:
            bar.print(f"resuming after {resumed} {f'of {len(run.points)} ' if run.is_whole else ''}points")
        if run.num_known:
            # Float32 leaves few ties that the rounding of another batch could decide.
            doubt = "" if dtype == "float32" else f" (in {dtype}, a single run may give some other texts)"
            bar.print(f"{run.num_known} answers are taken over from the run that this one extends{doubt}")
        yield ScanProgress(run, bar, reporter)
