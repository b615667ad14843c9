"""Shows a run: as a live display on a terminal, as lines with times elsewhere."""

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
from sensebatch.cli.messages import counted
from sensebatch.cli.signals import FINISHING, StopSignals
from sensebatch.cli.voice import Level, Voice
from sensebatch.contract import Phase, Progress
from sensebatch.jobs import Batch, EngineInfo
from sensebatch.plan.batches import Plan
from sensebatch.session import Model, RunObserver
from sensebatch.store.attempts import DONE, Attempt
from sensebatch.store.ingest import Changes
from sensebatch.store.run_dir import RunDir
from sensebatch.store.state import Counts
from sensebatch.units import duration

MAX_BAR_WIDTH, MIN_BAR_WIDTH = 32, 10
FIGURES_WIDTH = 56
"""Columns for the text beside a bar, if the terminal is wide enough."""
STYLES = {Level.ALERT: "red", Level.INFO: "dim"}


class Tracker(RunObserver):
    """Keeps track of a run, and prints its progress line by line.

    Args:
        stop: Learns whether there are images to finish before the run ends.
        voice: Prints the lines.
        clock: Returns monotonic seconds.
    """

    def __init__(
        self, stop: StopSignals, voice: Voice, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stop = stop
        self._voice = voice
        self._clock = clock
        self._remaining: RemainingTime | None = None
        self._batch_start = 0.0
        self._share = 1.0
        self.num_jobs = self.num_done = self.num_failed = 0
        self.batch: Batch | None = None
        self.step = Progress(phase=None, step=0, num_steps=0)
        self._root = Path()

    def warning(self, text: str) -> None:
        """Takes a warning: something that is allowed but deserves a look."""
        self._voice.warn(text)

    def jobs_read(self, root: Path, changes: Changes) -> None:
        """The run's folder is open, and its state has the jobs of this run."""
        self._root = root
        self._voice.keep(RunDir(root).messages)
        for line in change_lines(changes):
            self._voice.info(line)

    def loading(self, counts: Counts, model: Model) -> None:
        """There are jobs to run, so the weights are about to be loaded."""
        jobs = counted(counts.jobs, "job")
        self._voice.info(f"{counts.remaining:,} of {jobs} to run in {self._root}")
        how = ", ".join(filter(None, (model.identity.dtype, model.identity.precision)))
        self._voice.tell(Level.BRIEF, f"loading {model.name} on {model.device} ({how})")

    def loaded(self, info: EngineInfo) -> None:
        """The weights are loaded."""
        self._stop.finish_images()
        self._voice.info(loaded_line(info))

    def run_started(self, counts: Counts, plan: Plan) -> None:
        """The first batch is next."""
        self.num_jobs, self.num_done, self.num_failed = counts.jobs, counts.done, counts.failed
        self._remaining = RemainingTime(plan)

    def batch_started(self, batch: Batch) -> None:
        """A batch goes into the engine; the one before has left it."""
        now = self._clock()
        assert self._remaining is not None
        if self.batch is not None:
            self._remaining.measured(self.batch, now - self._batch_start, self._share)
        self._remaining.started(batch)
        self.batch, self._batch_start, self._share = batch, now, 1.0
        self.step = Progress(phase=None, step=0, num_steps=0)

    def progress(self, progress: Progress) -> None:
        """The batch in the engine advanced."""
        if progress.phase is Phase.DENOISE is not self.step.phase:
            # What an interrupted run has drawn says nothing about the speed of this one.
            self._share = 1 - (progress.step - 1) / progress.num_steps
        self.step = progress

    def batch_split(self, batch: Batch) -> None:
        """The batch in the engine failed as a whole; its jobs will run in smaller batches."""
        assert self._remaining is not None
        self._remaining.put_back(batch)
        self._share = 0.0

    def batch_finished(self, batch: Batch, attempts: Sequence[Attempt]) -> None:
        """A batch is committed."""
        done = [attempt for attempt in attempts if attempt.status == DONE]
        self.num_done += len(done)
        for attempt in done:
            self._voice.detail(f"done: {attempt.job_id}: {', '.join(attempt.outputs)}")
        words = [
            f"{self.num_done:,} of {self.num_jobs:,} done",
            f"{batch.group}, {counted(len(batch.jobs), 'job')} in {attempts[0].total_s:.1f} s",
        ]
        remaining = self.remaining_s()
        if remaining is not None and self.num_done + self.num_failed < self.num_jobs:
            words.append(f"about {duration(remaining)} left")
        self._say_batch("; ".join(words))

    def _say_batch(self, line: str) -> None:
        self._voice.info(line)

    def job_failed(self, attempt: Attempt, will_retry: bool) -> None:
        """A job failed."""
        self.num_failed += not will_retry
        if attempt.batch_id is None and self._remaining is not None:
            self._remaining.remove(attempt.job_id)
        self._voice.alert(failure_line(attempt, will_retry))

    def note(self, text: str) -> None:
        """Takes something a person may want to know."""
        self._voice.info(text)

    def remaining_s(self) -> float | None:
        """Returns the seconds the run still needs; None until a batch has been measured."""
        if self._remaining is None or self.batch is None:
            return None
        to_come, of_batch = self._remaining.to_come(), self._remaining.of_batch(self.batch)
        if to_come is None or of_batch is None:
            return None
        elapsed = self._clock() - self._batch_start
        return to_come + max(0.0, of_batch * self._share - elapsed)

    def batch_words(self) -> str:
        """Returns a description of the current batch: `t2i 256x256, 8 jobs`."""
        if self.batch is None:
            return ""
        group, num_jobs = self.batch.group, len(self.batch.jobs)
        return f"{group}, {counted(num_jobs, 'job')}"


class LiveDisplay(Tracker):
    """Keeps two lines at the bottom of a terminal, with failures and notes scrolling above them.

    Args:
        console: Writes to the terminal.
        stop: As for `Tracker`; also says whether the run is about to stop.
        voice: As for `Tracker`; its lines appear above the display while there is one.
    """

    def __init__(self, console: Console, stop: StopSignals, voice: Voice) -> None:
        super().__init__(stop, voice)
        self._console = console
        self._live = Live(self, console=console, transient=True)
        self._before = voice.printer

    def run_started(self, counts: Counts, plan: Plan) -> None:
        """The first batch is next."""
        super().run_started(counts, plan)
        # A terminal may close while the run continues; then there is nothing to draw or clear.
        self._stop.notice = False
        self._voice.printer = self._print
        with suppress(OSError):
            self._live.start()

    def close(self) -> None:
        """Clears the display."""
        with suppress(OSError):
            self._live.stop()
        self._voice.printer = self._before
        self._stop.notice = True

    def _print(self, text: str, level: Level) -> None:
        self._console.print(Text(text, style=STYLES.get(level, "")))

    def _say_batch(self, line: str) -> None:
        # The display shows it already.
        self._voice.record(line)

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
        width = self._console.width - FIGURES_WIDTH
        width = min(max(width, MIN_BAR_WIDTH), MAX_BAR_WIDTH)
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=width)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        grid.add_row(_bar(settled, self.num_jobs), figures)
        grid.add_row(
            _bar(self.step.step, self.step.num_steps),
            Text(f"{self.batch_words()}: {step_words(self.step)}", style="dim"),
        )
        return grid


@contextmanager
def watch(stop: StopSignals, voice: Voice) -> Iterator[Tracker]:
    """Shows a run on stderr during the block, and yields the observer that does so."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        voice.timed = True
        try:
            yield Tracker(stop, voice)
        finally:
            voice.timed = False
        return
    if voice.least is Level.ALERT:
        yield Tracker(stop, voice)
        return
    display = LiveDisplay(console, stop, voice)
    try:
        yield display
    finally:
        display.close()


def change_lines(changes: Changes) -> Iterator[str]:
    """Yields one line for each way in which the manifests have changed since the last run."""
    for count, what in (
        (changes.changed, "with a changed definition, will be run again"),
        (changes.restored, "done before, but files are missing; will be run again"),
        (
            changes.returned,
            "with a former definition again, whose files are there; will not be run again",
        ),
        (changes.removed, "no longer in the manifest; files are kept"),
        (changes.unread, "not read because of --limit; left as they are"),
    ):
        if count:
            yield f"{counted(count, 'job')} {what}"


def loaded_line(info: EngineInfo) -> str:
    """Returns a line about the time that loading took, and compiling kernels as part of it."""
    compiling = f", {info.compile_s:.1f} s of it for kernels" if info.compile_s is not None else ""
    return f"loaded in {info.load_s:.1f} s{compiling}"


def failure_line(attempt: Attempt, will_retry: bool) -> str:
    """Returns the line about a failed attempt: job, error, traceback file."""
    what = "failed, will be tried again" if will_retry else "failed"
    first = (attempt.error_message or "").partition("\n")[0]
    file = f" ({attempt.error_file})" if attempt.error_file else ""
    return f"{what}: {attempt.job_id}: {attempt.error_type}: {first}{file}"


def step_words(progress: Progress) -> str:
    """Returns the progress of a batch in words: `denoise 7 of 50`, `think 212`."""
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
        complete_style=style,
        finished_style=style,
    )
