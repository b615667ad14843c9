"""What people see of a run, without a terminal and with one."""

from __future__ import annotations

import errno
import io
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from sensebatch.cli.eta import RemainingTime
from sensebatch.cli.lanes import step_words
from sensebatch.cli.messages import say
from sensebatch.cli.progress import LiveDisplay, Tracker, watch
from sensebatch.cli.signals import FINISHING, StopSignals
from sensebatch.cli.voice import Level, Voice
from sensebatch.contract import Phase, Progress
from sensebatch.executor.observer import WorkerState
from sensebatch.jobs import Batch, Failure, Job, group_key
from sensebatch.plan.batches import Plan, make_plan, plan_entry
from sensebatch.store.attempts import Attempt
from sensebatch.store.rows import RowContext, WrittenJob, early_failure
from sensebatch.store.state import Counts, StoredJob
from sensebatch.tasks import Task
from tests.executor.fakes import FakeEngine, make_config, make_job


def _plan(jobs: Sequence[Job]) -> Plan:
    return make_plan((plan_entry(job) for job in jobs), make_config().memory)


def _batch(*jobs: Job) -> Batch:
    keys = tuple(job.id for job in jobs)
    return Batch(id="b", group=group_key(jobs[0]), jobs=tuple(jobs), keys=keys)


def _counts(jobs: int, **counts: int) -> Counts:
    values: dict[str, Any] = {
        "pending": jobs,
        "started": 0,
        "done": 0,
        "failed": 0,
        "removed": 0,
        "unread": 0,
    }
    return Counts(jobs=jobs, **{**values, **counts})


def _early_failure(job: Job) -> Attempt:
    context = RowContext(run="r", session=1, worker=0, node="host", info=FakeEngine().info)
    stored = StoredJob(job=job, key=job.id, attempts=0, tries=0)
    failure = Failure(type="JobError", message="no image", traceback="")
    at = datetime(2026, 1, 1, tzinfo=UTC)
    written = WrittenJob(failure=failure)
    return early_failure(context, stored, written, queue_s=0.0, at=at, rss_bytes=0)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A terminal that is closed after some writes."""

    def __init__(self, writes: int) -> None:
        super().__init__()
        self._left = writes

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._left -= 1
        if self._left < 0:
            raise OSError(errno.EIO, "the terminal is closed")
        return super().write(text)


def _tracker(clock: Clock) -> Tracker:
    return Tracker(StopSignals(), Voice(Level.ALERT), clock)


T2I = [make_job(f"t{i}") for i in range(6)]
QUESTIONS = [make_job(f"q{i}", Task.ASK) for i in range(2)]
EDITS = [make_job(f"e{i}", Task.EDIT) for i in range(2)]


def test_nothing_is_promised_before_something_was_measured() -> None:
    remaining = RemainingTime(_plan(T2I))
    remaining.started(_batch(*T2I[:2]))
    assert remaining.to_come() is None


def test_remaining_time_follows_the_measured_speed() -> None:
    remaining = RemainingTime(_plan(T2I))
    remaining.started(_batch(*T2I[:2]))
    remaining.measured(_batch(*T2I[:2]), seconds=10.0)
    assert remaining.to_come() == pytest.approx(20.0)
    assert remaining.of_batch(_batch(T2I[2])) == pytest.approx(5.0)


def test_each_task_has_its_own_speed_once_it_is_measured() -> None:
    remaining = RemainingTime(_plan([*T2I, *EDITS]))
    remaining.measured(_batch(*T2I), seconds=6.0)
    for job in (*T2I, EDITS[0]):
        remaining.started(_batch(job))
    before = remaining.to_come()
    remaining.measured(_batch(EDITS[0]), seconds=100.0)
    assert before == pytest.approx(1.0)
    assert remaining.to_come() == pytest.approx(100.0)


def test_nothing_is_promised_while_questions_about_what_is_drawn_were_never_measured() -> None:
    clock = Clock()
    lines = _tracker(clock)
    lines.run_started(_counts(8), _plan([*T2I, *QUESTIONS]))
    lines.batch_started(_batch(*T2I))
    clock.now = 12.0
    lines.batch_started(_batch(QUESTIONS[0]))
    assert lines.remaining_s() is None
    clock.now = 15.0
    lines.batch_started(_batch(QUESTIONS[1]))
    assert lines.remaining_s() == pytest.approx(3.0)


def test_interrupted_batches_are_not_taken_out_of_the_plan() -> None:
    remaining = RemainingTime(_plan(T2I))
    remaining.started(_batch(make_job("x"), make_job("y")))
    remaining.measured(_batch(make_job("x"), make_job("y")), seconds=2.0)
    assert remaining.to_come() == pytest.approx(6.0)


def test_parts_of_a_split_batch_are_still_to_come_and_the_attempt_drew_nothing() -> None:
    clock = Clock()
    lines = _tracker(clock)
    lines.run_started(_counts(6), _plan(T2I))
    lines.batch_started(_batch(*T2I[:4]))
    clock.now = 2.0
    lines.batch_split(_batch(*T2I[:4]))
    lines.batch_started(_batch(*T2I[:2]))
    assert lines.remaining_s() is None
    clock.now = 20.0
    lines.batch_started(_batch(*T2I[2:4]))
    # Two jobs took 20 s with the attempt that was in vain, and four are left.
    assert lines.remaining_s() == pytest.approx(40.0)


def test_jobs_that_fail_before_a_batch_are_no_longer_to_come() -> None:
    clock = Clock()
    lines = _tracker(clock)
    lines.run_started(_counts(6), _plan(T2I))
    lines.batch_started(_batch(T2I[0]))
    for job in T2I[1:4]:
        lines.job_failed(_early_failure(job), will_retry=False)
    clock.now = 5.0
    lines.batch_started(_batch(T2I[4]))
    assert lines.remaining_s() == pytest.approx(10.0)


def test_a_failed_job_that_was_held_before_is_counted() -> None:
    tracker = _tracker(Clock())
    tracker.run_started(_counts(1, done=1), _plan([]))
    tracker.job_failed(_early_failure(T2I[0]), will_retry=False)
    assert (tracker.num_failed, tracker.num_jobs) == (1, 2)


def test_jobs_tried_again_are_not_taken_out_of_the_plan_twice() -> None:
    remaining = RemainingTime(_plan(T2I))
    for job in (T2I[0], T2I[0]):
        remaining.started(_batch(job))
        remaining.measured(_batch(job), seconds=1.0)
    assert remaining.to_come() == pytest.approx(5.0)


def test_remaining_time_counts_down_while_a_batch_runs() -> None:
    clock = Clock()
    lines = _tracker(clock)
    lines.run_started(_counts(6), _plan(T2I))
    lines.batch_started(_batch(*T2I[:2]))
    assert lines.remaining_s() is None
    clock.now = 10.0
    lines.batch_started(_batch(*T2I[2:4]))
    assert lines.remaining_s() == pytest.approx(20.0)
    clock.now = 14.0
    assert lines.remaining_s() == pytest.approx(16.0)
    clock.now = 40.0
    assert lines.remaining_s() == pytest.approx(10.0)


def test_what_an_interrupted_run_has_drawn_says_nothing_of_the_speed() -> None:
    clock = Clock()
    lines = _tracker(clock)
    lines.run_started(_counts(6), _plan(T2I))
    lines.batch_started(_batch(*T2I[:2]))
    # Three of four passes of two steps are kept.
    for step in (7, 8):
        lines.progress(Progress(phase=Phase.DENOISE, step=step, num_steps=8))
    clock.now = 5.0
    lines.batch_started(_batch(*T2I[2:4]))
    assert lines.remaining_s() == pytest.approx(40.0)
    lines.progress(Progress(phase=Phase.THINK, step=1, num_steps=0))
    lines.progress(Progress(phase=Phase.DENOISE, step=5, num_steps=8))
    assert lines.remaining_s() == pytest.approx(30.0)


def _shown(display: LiveDisplay, *, color: bool = False) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream, width=110, force_terminal=True, color_system="standard" if color else None
    )
    console.print(display)
    return stream.getvalue()


def _display(stop: StopSignals | None = None) -> LiveDisplay:
    display = LiveDisplay(Console(file=io.StringIO(), width=110), stop or StopSignals(), Voice())
    display.run_started(_counts(8, done=1, failed=1, pending=6), _plan(T2I))
    display.batch_started(_batch(*T2I[:2]))
    display.progress(Progress(phase=Phase.DENOISE, step=1, num_steps=2))
    return display


def test_live_display_shows_the_whole_and_the_batch() -> None:
    shown = _shown(_display())
    assert "2 of 8 jobs, 1 failed" in shown
    assert "t2i 64x32, 2 jobs: denoise 1 of 2" in shown
    assert "stopping" not in shown


def test_functions_that_judge_without_an_engine_are_shown_and_can_be_stopped() -> None:
    stop = StopSignals()
    display = LiveDisplay(Console(file=io.StringIO(), width=110), stop, Voice())
    with stop.installed(interrupts=True):
        display.judging(_counts(8, done=5, pending=3))
        # It would be an Interrupt if nothing had been done so far.
        signal.raise_signal(signal.SIGINT)
    display.run_started(_counts(8, done=5, pending=3), _plan(T2I))
    shown = _shown(display)
    assert "5 of 8 jobs" in shown
    assert FINISHING in shown


def _worker(number: int, **changes: Any) -> WorkerState:
    state = WorkerState(
        number=number,
        node="host",
        device=f"NVIDIA H100, GPU {number}",
        life="ready",
        batch=None,
        progress=None,
    )
    return replace(state, **changes)


def _crew_display(height: int = 24) -> LiveDisplay:
    console = Console(file=io.StringIO(), width=60, height=height)
    display = LiveDisplay(console, StopSignals(), Voice())
    display.run_started(_counts(8), _plan(T2I))
    return display


def test_live_display_has_a_line_for_each_worker() -> None:
    display, batch = _crew_display(), _batch(*T2I[:2])
    display.worker_changed(_worker(1))
    display.worker_changed(_worker(2, life="dead"))
    step = Progress(phase=Phase.DENOISE, step=1, num_steps=2)
    display.worker_changed(_worker(0, batch=batch))
    display.worker_changed(_worker(0, batch=batch, progress=step))
    lines = [line.rstrip() for line in _shown(display).splitlines()]
    assert lines[0].endswith("0 of 8 jobs")
    assert lines[1].endswith("GPU 0: t2i 64x32, 2 jobs: denoise 1 of 2")
    assert lines[2].endswith("GPU 1: nothing to do")
    assert lines[3].endswith("GPU 2: died, will be started again")


def test_workers_of_several_hosts_are_named_by_their_host() -> None:
    display = _crew_display()
    display.worker_changed(_worker(0))
    display.worker_changed(_worker(1, node="other", device="cpu"))
    assert "host GPU 0: nothing" in _shown(display)
    assert "other worker 1: nothing" in _shown(display)


def test_workers_that_a_terminal_has_no_lines_for_are_counted() -> None:
    display = _crew_display(height=8)
    for number in range(20):
        display.worker_changed(_worker(number, batch=_batch(T2I[number % 4])))
    lines = _shown(display).rstrip().splitlines()
    assert len(lines) == 5
    assert lines[-1].strip() == "and 17 more workers, 17 of them with a batch"


def test_time_that_is_left_is_shared_by_the_workers() -> None:
    clock = Clock()
    tracker = _tracker(clock)
    tracker.run_started(_counts(6), _plan(T2I))
    for number in range(2):
        tracker.worker_changed(_worker(number, batch=_batch(T2I[number])))
    clock.now = 8.0
    tracker.worker_changed(_worker(0))
    assert len(T2I) == 6
    # Four jobs to come of 8 s each, and nothing left of the one that should be through by now.
    assert tracker.remaining_s() == 16.0
    tracker.worker_changed(_worker(1, life="dead"))
    assert tracker.remaining_s() == 40.0


def test_live_display_says_that_it_is_about_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopSignals()
    monkeypatch.setattr(stop, "is_set", lambda: True)
    assert FINISHING in _shown(_display(stop))


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[31m" in _shown(_display(), color=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in _shown(_display(), color=True)


def test_steps_without_a_known_end_have_no_total() -> None:
    assert step_words(Progress(phase=Phase.THINK, step=12, num_steps=0)) == "think 12"
    beside = Progress(phase=Phase.THINK, step=12, num_steps=0, num_together=64)
    assert step_words(beside) == "think 12 of 64 jobs"
    assert step_words(Progress(phase=Phase.DENOISE, step=3, num_steps=8)) == "denoise 3 of 8"


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_terminal_that_closes_does_not_end_a_run(
    monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal(writes)
    monkeypatch.setattr(sys, "stderr", terminal)
    with watch(StopSignals(), Voice()) as tracker:
        assert isinstance(tracker, LiveDisplay)
        tracker.run_started(_counts(6), _plan(T2I))
    say("the end")
    assert "the end" not in terminal.getvalue()
