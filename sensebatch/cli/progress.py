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
from sensebatch.cli.lanes import Lane, names, remaining_s
from sensebatch.cli.messages import error_text
from sensebatch.cli.signals import FINISHING, StopSignals
from sensebatch.cli.voice import Level, Voice
from sensebatch.contract import Progress
from sensebatch.executor.observer import WorkerState
from sensebatch.jobs import Batch, EngineInfo
from sensebatch.loading import Model
from sensebatch.plan.batches import Plan
from sensebatch.session import RunObserver
from sensebatch.store.attempts import DONE, Attempt
from sensebatch.store.ingest import Changes
from sensebatch.store.run_dir import RunDir
from sensebatch.store.state import Counts
from sensebatch.units import counted, duration

MAX_BAR_WIDTH, MIN_BAR_WIDTH = 32, 10
FIGURES_WIDTH = 56
"""Columns for the text beside a bar, if the terminal is wide enough."""
OTHER_LINES = 4
"""Lines of a terminal that the engines leave to the run's bar, to what it says and to a prompt."""
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
        self.num_jobs = self.num_done = self.num_failed = 0
        self._lanes: dict[int | None, Lane] = {}
        """What each worker is at, by its number; None stands for the engine of this process."""
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

    def judging(self, counts: Counts) -> None:
        """Functions are about to judge, without weights."""
        self._stop.finish_images()
        self._say_counts(counts)

    def loading(self, counts: Counts, model: Model) -> None:
        """There are jobs to run, so the weights are about to be loaded."""
        self._say_counts(counts)
        how = ", ".join(filter(None, (model.identity.dtype, model.identity.precision)))
        self._voice.tell(Level.BRIEF, f"loading {model.name} on {model.device} ({how})")

    def _say_counts(self, counts: Counts) -> None:
        jobs = counted(counts.jobs, "job")
        held = f"; {counts.held:,} more only if they are needed" if counts.held else ""
        self._voice.info(f"{counts.remaining:,} of {jobs} to run in {self._root}{held}")

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
        assert self._remaining is not None
        self._lanes.setdefault(None, Lane()).begin(batch, self._clock(), self._remaining)

    def progress(self, progress: Progress) -> None:
        """The batch in the engine advanced."""
        self._lanes[None].advance(progress)

    def worker_changed(self, worker: WorkerState) -> None:
        """A worker in a process of its own began a batch, advanced, ended one, or died."""
        assert self._remaining is not None
        lane = self._lanes.setdefault(worker.number, Lane())
        lane.take(worker, self._clock(), self._remaining)

    def batch_split(self, batch: Batch) -> None:
        """The batch in the engine failed as a whole; its jobs will run in smaller batches."""
        assert self._remaining is not None
        self._remaining.put_back(batch)
        for lane in self._lanes.values():
            if lane.batch is not None and lane.batch.id == batch.id:
                lane.share = 0.0

    def batch_finished(self, batch: Batch, attempts: Sequence[Attempt]) -> None:
        """A batch is committed."""
        done = [attempt for attempt in attempts if attempt.status == DONE]
        self.num_done += len(done)
        self._count_more()
        for attempt in done:
            self._voice.detail(f"done: {attempt.job_id}: {', '.join(attempt.outputs)}")
        what = f"{batch.group}, {counted(len(batch.jobs), 'job')} in {attempts[0].total_s:.1f} s"
        is_named = None not in self._lanes and not batch.group.by_function
        where = f" on worker {attempts[0].worker}" if is_named else ""
        words = [f"{self.num_done:,} of {self.num_jobs:,} done", f"{what}{where}"]
        remaining = self.remaining_s()
        if remaining is not None and self.num_done + self.num_failed < self.num_jobs:
            words.append(f"about {duration(remaining)} left")
        self._say_batch("; ".join(words))

    def _count_more(self) -> None:
        # More jobs may turn out to be needed during the run.
        self.num_jobs = max(self.num_jobs, self.num_done + self.num_failed)

    def _say_batch(self, line: str) -> None:
        self._voice.info(line)

    def job_failed(self, attempt: Attempt, will_retry: bool) -> None:
        """A job failed."""
        self.num_failed += not will_retry
        self._count_more()
        if attempt.batch_id is None and self._remaining is not None:
            self._remaining.remove(attempt.job_id)
        self._voice.alert(failure_line(attempt, will_retry))

    def note(self, text: str) -> None:
        """Takes something a person may want to know."""
        self._voice.info(text)

    def remaining_s(self) -> float | None:
        """Returns the seconds the run still needs; None until a batch has been measured."""
        if self._remaining is None:
            return None
        return remaining_s(self.lanes(), self._clock(), self._remaining)

    def lanes(self) -> list[Lane]:
        """Returns what each engine of the run is at, by the numbers of the workers."""
        return [lane for _, lane in sorted(self._lanes.items(), key=lambda item: item[0] or 0)]


class LiveDisplay(Tracker):
    """Keeps a bar for the run and one for each engine at the bottom of a terminal.

    Failures and notes scroll above them.

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
        if self._remaining is None:
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
        lanes = self.lanes()
        shown = lanes[: max(self._console.height - OTHER_LINES, 1)]
        if len(shown) < len(lanes):
            shown = shown[:-1]
        for lane, name in zip(shown, self._names(lanes), strict=False):
            bar = _bar(lane.step.step if lane.batch else 0, lane.step.num_steps)
            grid.add_row(bar, Text(f"{name}{lane.words()}", style="dim"))
        if hidden := lanes[len(shown) :]:
            at_work = sum(lane.batch is not None for lane in hidden)
            more = f"and {len(hidden):,} more workers, {at_work:,} of them with a batch"
            grid.add_row("", Text(more, style="dim"))
        return grid

    def _names(self, lanes: Sequence[Lane]) -> list[str]:
        """Returns how the line of each engine begins."""
        return [""] if None in self._lanes else [f"{name}: " for name in names(lanes)]


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
        (changes.undropped, "rejected and removed before, will be drawn again"),
        (
            changes.descendants,
            "that start from images of jobs which will be run again, or were; will be run again",
        ),
        (changes.held, "changed or without files, will be run again only if needed"),
        (
            changes.returned,
            "changed back to a former definition, whose files are there; will not be run again",
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
    error = error_text(str(attempt.error_type), attempt.error_message)
    file = f" ({attempt.error_file})" if attempt.error_file else ""
    return f"{what}: {attempt.job_id}: {error}{file}"


def _bar(completed: int, total: int) -> ProgressBar:
    style = "cyan"
    return ProgressBar(
        total=max(total, 1),
        completed=completed,
        complete_style=style,
        finished_style=style,
    )
