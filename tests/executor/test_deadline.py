"""A run with a deadline: what it still begins, in which order, and that its bytes stay the same."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sensebatch.config import ExecutionConfig
from sensebatch.contract import Phase, Progress
from sensebatch.executor.deadline import Deadline
from sensebatch.executor.messages import Began
from sensebatch.executor.run import execute
from sensebatch.executor.worker import EngineWorker
from sensebatch.jobs import Job, group_key
from sensebatch.store.chains import reading
from sensebatch.store.merge import merge
from sensebatch.store.shards import Shard
from sensebatch.store.status import PastBatch, read_status
from sensebatch.store.store import open_store
from sensebatch.tasks import Task
from tests.executor.crews import ThreadCrew, run_crew
from tests.executor.fakes import (
    IDENTITY,
    FakeEngine,
    Flag,
    Ran,
    Recorder,
    make_config,
    make_job,
    mixed_jobs,
    outcome,
    read_input,
    run_folder,
)

pytestmark = pytest.mark.slow

BATCH_S = 8.0
"""Seconds that the fake engine says of every batch."""
GROUP = group_key(make_job("a"))
STORIES = group_key(make_job("s", Task.INTERLEAVE))


class Clock:
    """A clock that only the engine moves."""

    def __init__(self, step_s: float = BATCH_S) -> None:
        self.now = 1000.0
        self._step_s = step_s

    def __call__(self) -> float:
        return self.now

    def step(self) -> None:
        self.now += self._step_s


class UntimedWrites(Deadline):
    """Does not measure how long the test's disk takes."""

    def wrote(self, seconds: float) -> None:
        pass


def run_until(
    root: Path,
    jobs: Sequence[Job],
    seconds: float,
    *,
    clock: Clock | None = None,
    config: object = None,
    a_pass: int | None = None,
    together: int = 1,
) -> Ran:
    """Runs jobs for as long as a clock that the engine moves says."""
    clock = clock or Clock()
    engine, seen = FakeEngine(clock.step, a_pass=a_pass, together=together), Recorder()
    with open_store(root) as store:
        changes = store.ingest(jobs, IDENTITY)
        summary = execute(
            store=store,
            worker=EngineWorker(engine),
            config=config or make_config(),  # type: ignore[arg-type]
            read_image=reading(root, read_input),
            observer=seen,
            stop=Flag(),
            deadline=UntimedWrites(clock.now + seconds, clock=clock),
        )
    return Ran(summary=summary, engine=engine, seen=seen, changes=changes)


JOBS = [make_job(f"j{i}") for i in range(8)]


def test_no_batch_begins_that_would_not_end_in_time(tmp_path: Path) -> None:
    ran = run_until(tmp_path, JOBS, 3.5 * BATCH_S)
    assert ran.engine.batches == [("j0", "j1"), ("j2", "j3"), ("j4", "j5")]
    assert (ran.summary.late, ran.summary.stopped) == (True, False)
    assert ran.summary.next_s == pytest.approx(BATCH_S)
    assert (ran.summary.counts.done, ran.summary.counts.pending) == (6, 2)
    assert read_status(tmp_path).counts.started == 0


def test_a_batch_that_texts_are_written_beside_needs_the_time_of_them_all(tmp_path: Path) -> None:
    jobs = [make_job(f"j{i}", think=True) for i in range(12)]
    ran = run_until(tmp_path, jobs, 5.5 * BATCH_S, together=3)
    assert len(ran.engine.batches) == 3, "the next three would take three times as long as one"
    assert ran.summary.next_s == pytest.approx(3 * BATCH_S)
    assert len(run_until(tmp_path, jobs, 3.5 * BATCH_S, together=3).engine.batches) == 3


def test_a_run_that_is_through_in_time_is_not_late(tmp_path: Path) -> None:
    ran = run_until(tmp_path, JOBS, 4.5 * BATCH_S)
    assert (ran.summary.counts.remaining, ran.summary.late) == (0, False)


def test_after_the_deadline_nothing_begins(tmp_path: Path) -> None:
    ran = run_until(tmp_path, JOBS, 0)
    assert (ran.engine.batches, ran.summary.late) == ([], True)


def test_batches_come_in_the_order_of_their_first_jobs(tmp_path: Path) -> None:
    wide = [make_job(f"w{i}", think=True) for i in range(3)]
    jobs = [JOBS[0], wide[0], JOBS[1], JOBS[2], wide[1], wide[2], JOBS[3], JOBS[4]]
    plain = run_folder(tmp_path / "plain", jobs)
    timed = run_until(tmp_path / "timed", jobs, 1000)
    assert timed.engine.batches == [
        ("j0", "j1"),
        ("w0", "w1"),
        ("j2", "j3"),
        ("w2",),
        ("j4",),
    ]
    assert sorted(timed.engine.batches) == sorted(plain.engine.batches)
    assert outcome(tmp_path / "timed") == outcome(tmp_path / "plain")


@pytest.mark.parametrize("windows", [[1, 1, 30], [2, 30], [0.2, 0.2, 0.4, 0.2, 30]])
def test_nights_with_deadlines_give_the_bytes_of_one_long_run(
    windows: list[float], tmp_path: Path
) -> None:
    config = make_config(execution=ExecutionConfig(max_attempts=2))
    run_folder(tmp_path / "whole", mixed_jobs(), config)
    nights = [
        run_until(tmp_path / "nights", mixed_jobs(), (batches + 0.5) * 5 * BATCH_S, config=config)
        for batches in windows
    ]
    assert [night.summary.late for night in nights] == [True] * (len(nights) - 1) + [False]
    assert nights[-1].summary.counts.remaining == 0
    assert outcome(tmp_path / "nights") == outcome(tmp_path / "whole")


def test_a_batch_that_is_slower_than_thought_stops_between_passes(tmp_path: Path) -> None:
    jobs = JOBS[:4]
    config = make_config(max_batch_size=4)
    ran = run_until(tmp_path / "a", jobs, 2.5 * BATCH_S, config=config, a_pass=1)
    assert ran.engine.drawn == [("j0",), ("j1",), ("j2",)]
    assert (ran.summary.late, ran.summary.counts.started) == (True, 4)
    assert read_status(tmp_path / "a").kept_images == 3
    run_folder(tmp_path / "a", jobs, config, engine=FakeEngine(a_pass=1))
    run_folder(tmp_path / "b", jobs, config, engine=FakeEngine(a_pass=1))
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def test_workers_begin_nothing_that_would_be_late_and_finish_what_they_have(
    tmp_path: Path,
) -> None:
    jobs = [make_job(f"j{i}") for i in range(40)]
    config = make_config()
    crew = ThreadCrew(3, config, jobs)
    clock = Clock(0.0)
    past_batches = [past(BATCH_S)]
    # Each worker has the time for two batches, and a clock that stands still lets it have no more.
    deadline = UntimedWrites(clock.now + 2.5 * BATCH_S, clock=clock, earlier=past_batches)
    begun: list[int] = []

    def count(worker: int, news: object) -> None:
        if isinstance(news, Began):
            begun.append(worker)
            if len(begun) == 6:
                clock.now += 2 * BATCH_S

    crew.on_said = count
    summary = run_crew(tmp_path / "a", jobs, config, crew, deadline=deadline)
    assert (summary.late, summary.stopped) == (True, False)
    assert summary.counts.done == 2 * len(begun)
    assert 6 <= len(begun) < 20
    run_crew(tmp_path / "a", jobs, config, ThreadCrew(2, config, jobs))
    run_crew(tmp_path / "b", jobs, config, ThreadCrew(1, config, jobs))
    assert outcome(tmp_path / "a")[0] == outcome(tmp_path / "b")[0]


def test_a_shard_runs_on_several_workers_too(tmp_path: Path) -> None:
    jobs = mixed_jobs()
    config = make_config()
    for number in (1, 2):
        with open_store(tmp_path / str(number)) as store:
            store.ingest(jobs, IDENTITY, shard=Shard(number=number, count=2))
        run_crew(
            tmp_path / str(number),
            jobs,
            config,
            ThreadCrew(2, config, jobs, lambda *_: FakeEngine()),
            shard=Shard(number=number, count=2),
        )
    merge([tmp_path / "1", tmp_path / "2"], tmp_path / "all")
    run_folder(tmp_path / "whole", jobs, config)
    assert outcome(tmp_path / "all")[0] == outcome(tmp_path / "whole")[0]


def past(seconds: float, *, jobs: int = 2, kept: int = 0) -> PastBatch:
    now = datetime.now(UTC)
    return PastBatch(
        group=GROUP,
        jobs=jobs,
        images=jobs,
        kept_images=kept,
        started_at=now,
        finished_at=now,
        total_s=seconds,
    )


def test_a_speed_is_known_from_an_earlier_process() -> None:
    deadline = Deadline(100.0, clock=lambda: 0.0, earlier=[past(60.0), past(1.0, kept=1)])
    assert deadline.admits(GROUP, 3)
    assert deadline.next_s == 90.0
    # A task that has not run yet is assumed to be as fast as the others.
    assert deadline.admits(STORIES, 1)
    assert not deadline.admits(GROUP, 4)
    assert deadline.has_ended_run
    assert not deadline.is_set(), "what runs is not stopped by it"
    assert not deadline.admits(GROUP, 1), "nothing is left out for what comes after it"


def test_what_waits_before_a_batch_and_what_writing_takes_count_as_well() -> None:
    def deadline() -> Deadline:
        return Deadline(100.0, clock=lambda: 0.0, earlier=[past(60.0)])

    assert deadline().admits(GROUP, 2, queued_s=30.0)
    assert not deadline().admits(GROUP, 2, queued_s=40.0)
    slow = deadline()
    slow.wrote(40.0)
    slow.wrote(1.0)
    assert not slow.admits(GROUP, 2)


def denoising(step: int) -> Progress:
    return Progress(phase=Phase.DENOISE, step=step, num_steps=8)


def test_a_pass_that_would_not_end_in_time_is_not_begun() -> None:
    clock = Clock()
    deadline = Deadline(1100.0, clock=clock)
    for clock.now, step in ((1010.0, 1), (1025.0, 2), (1040.0, 3)):
        deadline.advanced(0, GROUP, denoising(step))
        assert not deadline.is_set()
    # A pass has two steps of 15 seconds.
    clock.now = 1069.0
    assert not deadline.is_set()
    clock.now = 1071.0
    assert deadline.is_set()
    deadline.advanced(0, GROUP, Progress(phase=Phase.PREFILL, step=1, num_steps=1))
    assert deadline.is_set(), "it stays set"


def test_the_speed_of_a_pass_is_forgotten_with_its_batch() -> None:
    clock = Clock()
    deadline = Deadline(1100.0, clock=clock)
    for clock.now, step in ((1000.0, 1), (1030.0, 2)):
        deadline.advanced(0, GROUP, denoising(step))
    deadline.advanced(0, GROUP, Progress(phase=Phase.PREFILL, step=1, num_steps=1))
    clock.now = 1060.0
    assert not deadline.is_set()


def test_without_a_deadline_everything_is_admitted() -> None:
    deadline = Deadline(clock=lambda: 1e12)
    deadline.advanced(0, GROUP, denoising(1))
    assert deadline.admits(GROUP, 1000)
    assert not deadline.is_set()
