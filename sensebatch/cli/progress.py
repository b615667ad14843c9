"""What a person sees of a run: a live display on a terminal, plain lines elsewhere; on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sensebatch.cli.eta import RemainingTime
from sensebatch.cli.messages import counted, say, warn
from sensebatch.cli.signals import FINISHING, StopSignals
from sensebatch.contract import Progress
from sensebatch.jobs import Batch, EngineInfo
from sensebatch.plan.batches import Plan
from sensebatch.session import Model, RunObserver
from sensebatch.store.attempts import DONE, Attempt
from sensebatch.store.ingest import Changes
from sensebatch.store.state import Counts
from sensebatch.units import duration

BAR_WIDTH = 32


class Tracker(RunObserver):
    """Knows where a run is and says how it begins; what is shown of the rest is a child's.

    Args:
        stop: Lets the run end after the current images, once there are any to come.
        clock: Seconds that only grow.
    """

    def __init__(self, stop: StopSignals, clock: Callable[[], float] = time.monotonic) -> None:
        self._stop = stop
        self._clock = clock
        self._remaining: RemainingTime | None = None
        self._batch_start = 0.0
        self._share = 1.0
        self.num_jobs = self.num_done = self.num_failed = 0
        self.batch: Batch | None = None
        self.step = Progress(phase=None, step=0, num_steps=0)
        self._root = Path()

    def warning(self, text: str) -> None:
        """Something is allowed but deserves a look."""
        warn(text)

    def jobs_read(self, root: Path, changes: Changes) -> None:
        """The run's folder is open and has the jobs of this run."""
        self._root = root
        for line in change_lines(changes):
            say(line)

    def loading(self, counts: Counts, model: Model) -> None:
        """There are jobs to run, and the weights are loaded for them."""
        say(f"{counts.remaining:,} of {counted(counts.jobs, 'job')} to run in {self._root}")
        how = ", ".join(filter(None, (model.identity.dtype, model.identity.precision)))
        say(f"loading {model.name} on {model.device} ({how})")

    def loaded(self, info: EngineInfo) -> None:
        """The weights are loaded."""
        self._stop.finish_images()
        say(loaded_line(info))

    def run_started(self, counts: Counts, plan: Plan) -> None:
        """The first batch is next."""
        self.num_jobs, self.num_done, self.num_failed = counts.jobs, counts.done, counts.failed
        self._remaining = RemainingTime(plan)

    def batch_started(self, batch: Batch) -> None:
        """A batch goes into the engine; the one before is through."""
        now = self._clock()
        assert self._remaining is not None
        if self.batch is not None:
            self._remaining.measured(self.batch, now - self._batch_start, self._share)
        self._remaining.started(batch)
        self.batch, self._batch_start, self._share = batch, now, 1.0
        self.step = Progress(phase=None, step=0, num_steps=0)

    def progress(self, progress: Progress) -> None:
        """The batch in the engine advanced."""
        if progress.phase == "denoise" != self.step.phase:
            # What an interrupted run has drawn says nothing of the speed of this one.
            self._share = 1 - (progress.step - 1) / progress.num_steps
        self.step = progress

    def batch_split(self, batch: Batch) -> None:
        """The batch in the engine made nothing; its jobs go into smaller ones."""
        assert self._remaining is not None
        self._remaining.put_back(batch)
        self._share = 0.0

    def batch_finished(self, batch: Batch, attempts: Sequence[Attempt]) -> None:  # noqa: ARG002
        """A batch is committed."""
        self.num_done += sum(attempt.status == DONE for attempt in attempts)

    def job_failed(self, attempt: Attempt, will_retry: bool) -> None:
        """A job failed."""
        self.num_failed += not will_retry
        if attempt.batch_id is None and self._remaining is not None:
            self._remaining.gone(attempt.job_id)

    def remaining_s(self) -> float | None:
        """Returns the seconds the run still needs, or None before a batch was measured."""
        if self._remaining is None or self.batch is None:
            return None
        to_come, of_batch = self._remaining.to_come(), self._remaining.of_batch(self.batch)
        if to_come is None or of_batch is None:
            return None
        elapsed = self._clock() - self._batch_start
        return to_come + max(0.0, of_batch * self._share - elapsed)

    def batch_words(self) -> str:
        """Returns what the batch is: `t2i 256x256, 8 jobs`."""
        if self.batch is None:
            return ""
        group, num_jobs = self.batch.group, len(self.batch.jobs)
        return f"{group}, {counted(num_jobs, 'job')}"


class LiveDisplay(Tracker):
    """Two lines at the foot of a terminal, with failures and notes scrolling above them.

    Args:
        console: Of stderr.
        stop: Says whether the run is about to stop.
    """

    def __init__(self, console: Console, stop: StopSignals) -> None:
        super().__init__(stop)
        self._console = console
        self._live = Live(self, console=console, transient=True)

    def run_started(self, counts: Counts, plan: Plan) -> None:
        """The first batch is next."""
        super().run_started(counts, plan)
        # A terminal may close while the run continues; then there is nothing to show or tidy up.
        self._stop.notice = False
        with suppress(OSError):
            self._live.start()

    def close(self) -> None:
        """Ends the display."""
        with suppress(OSError):
            self._live.stop()
        self._stop.notice = True

    def job_failed(self, attempt: Attempt, will_retry: bool) -> None:
        """A job failed."""
        super().job_failed(attempt, will_retry)
        self._console.print(Text(failure_line(attempt, will_retry), style="red"))

    def note(self, text: str) -> None:
        """Something a person may want to know."""
        self._console.print(Text(text, style="dim"))

    def __rich__(self) -> RenderableType:
        if self.batch is None:
            return Text()
        lines: list[RenderableType] = [self._grid()]
        if self._stop.is_set():
            lines.append(Text(FINISHING, style="yellow"))
        return Group(*lines)

    def _grid(self) -> Table:
        settled = self.num_done + self.num_failed
        remaining = self.remaining_s()
        words = [f"{settled:,} of {counted(self.num_jobs, 'job')}"]
        if remaining is not None:
            words.append(f"{duration(remaining)} left")
        figures = Text(", ".join(words))
        if self.num_failed:
            figures.append(f", {self.num_failed:,} failed", style="red")
        grid = Table.grid(padding=(0, 2))
        grid.add_row(_bar(settled, self.num_jobs), figures)
        grid.add_row(
            _bar(self.step.step, self.step.num_steps),
            Text(f"{self.batch_words()}: {step_words(self.step)}", style="dim"),
        )
        return grid


class PlainLines(Tracker):
    """One line for each batch, for files and pipes.

    Args:
        stop: As of `Tracker`.
        say: Prints a line.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        stop: StopSignals,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(stop, clock)
        self._say = say

    def batch_finished(self, batch: Batch, attempts: Sequence[Attempt]) -> None:
        """A batch is committed."""
        super().batch_finished(batch, attempts)
        words = [
            f"{self.num_done:,} of {self.num_jobs:,} done",
            f"{batch.group}, {counted(len(batch.jobs), 'job')} in {attempts[0].total_s:.1f} s",
        ]
        remaining = self.remaining_s()
        if remaining is not None and self.num_done + self.num_failed < self.num_jobs:
            words.append(f"about {duration(remaining)} left")
        self._say("; ".join(words))

    def job_failed(self, attempt: Attempt, will_retry: bool) -> None:
        """A job failed."""
        super().job_failed(attempt, will_retry)
        self._say(failure_line(attempt, will_retry))

    def note(self, text: str) -> None:
        """Something a person may want to know."""
        self._say(text)


@contextmanager
def watch(stop: StopSignals) -> Iterator[Tracker]:
    """Shows a run on stderr while the block runs, and yields what to tell of it."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        yield PlainLines(stop, say)
        return
    display = LiveDisplay(console, stop)
    try:
        yield display
    finally:
        display.close()


def change_lines(changes: Changes) -> Iterator[str]:
    """Yields a line for each way in which the manifests changed since they were last read."""
    for count, what in (
        (changes.changed, "with a changed definition, run again"),
        (changes.restored, "done before, without its files now; run again"),
        (changes.returned, "with a former definition whose files are still there; not run again"),
        (changes.removed, "no longer in the manifest; files are kept"),
        (changes.unread, "not read because of --limit; left as they are"),
    ):
        if count:
            yield f"{counted(count, 'job')} {what}"


def loaded_line(info: EngineInfo) -> str:
    """Returns how long loading took, and how much of it compiling kernels."""
    compiling = f", {info.compile_s:.1f} s of it for kernels" if info.compile_s is not None else ""
    return f"loaded in {info.load_s:.1f} s{compiling}"


def failure_line(attempt: Attempt, will_retry: bool) -> str:
    """Returns the line about a failed attempt: job, error, traceback file."""
    what = "failed, to be tried again" if will_retry else "failed"
    first = (attempt.error_message or "").partition("\n")[0]
    return f"{what}: {attempt.job_id}: {attempt.error_type}: {first} ({attempt.error_file})"


def step_words(progress: Progress) -> str:
    """Returns where a batch is: `denoise 7 of 50`, `think 212`."""
    if progress.phase is None:
        return "starting"
    if progress.num_steps:
        return f"{progress.phase} {progress.step} of {progress.num_steps}"
    return f"{progress.phase} {progress.step}"


def _bar(completed: int, total: int) -> ProgressBar:
    style = "cyan"
    return ProgressBar(
        total=max(total, 1),
        completed=completed,
        width=BAR_WIDTH,
        complete_style=style,
        finished_style=style,
    )
