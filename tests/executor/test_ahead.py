"""The prompts of the next batch are read while one is drawn, and harm nothing where that fails."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sensebatch.config import OutputConfig
from sensebatch.contract import Channel, Phase, Progress, Raised
from sensebatch.errors import OutOfMemoryError
from sensebatch.executor.host import Outbox, WorkerHost
from sensebatch.executor.messages import Ended, Prepare, Prepared, Run
from sensebatch.executor.prepare import Preparer
from sensebatch.executor.schedule import Assignment
from sensebatch.executor.worker import EngineWorker
from sensebatch.jobs import Batch, BatchResult, Job, batch_id, group_key
from sensebatch.tasks import Task
from tests.executor.fakes import FakeEngine, make_config, make_job, read_input, run_worker

PATIENCE_S = 60.0


@dataclass
class FakeReading:
    """Notes what it is asked for; fails on demand."""

    names: tuple[str, ...]
    error: Exception | None = None
    calls: list[int] = field(default_factory=list)

    def advance(self, num_calls: int) -> None:
        self.calls.append(num_calls)
        if self.error is not None:
            raise self.error


class Reads(FakeEngine):
    """Reads ahead, and knows what each batch was given of that."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.readings: list[FakeReading] = []
        self.given: list[tuple[str, ...] | None] = []
        self.error: Exception | None = None
        """What reading ahead raises."""
        self.reads = True
        self.needs_all = False
        """Whether a batch fits only if nothing is read beside it."""

    def prepare(self, job: Job, inputs: Sequence[bytes]) -> Any:
        super().prepare(job, inputs)
        return (job.id.encode(),)

    def read(self, prepared: Sequence[tuple[bytes, ...]]) -> FakeReading | None:
        if not self.reads:
            return None
        names = tuple(name.decode() for (name,) in prepared)
        self.readings.append(FakeReading(names, self.error))
        return self.readings[-1]

    def generate(self, *args: Any, reading: Any = None, **options: Any) -> BatchResult:
        self.given.append(None if reading is None else reading.names)
        num_read = len(self.readings)
        result = super().generate(*args, **options)
        if self.needs_all and len(self.readings) > num_read:
            raise OutOfMemoryError("no room beside what was read")
        return result


class Desk:
    """A worker with batches of two jobs that are prepared."""

    def __init__(self, num_batches: int = 3, task: Task = Task.T2I) -> None:
        self.engine = Reads()
        self.worker = EngineWorker(self.engine)
        self.batches: list[Batch] = []
        for number in range(num_batches):
            jobs = tuple(make_job(f"j{2 * number + i}", task) for i in range(2))
            keys = tuple(job.id for job in jobs)
            batch = Batch(id=batch_id(keys), group=group_key(jobs[0]), jobs=jobs, keys=keys)
            self.batches.append(batch)
            for place, job in enumerate(jobs):
                assert self.worker.prepare(number, place, job, []) is None
            self.worker.expect(number)

    def run(self, number: int, channel: Channel | None = None) -> BatchResult | Raised:
        outcome = self.worker.generate(
            number, self.batches[number], kept=(), channel=channel or Channel()
        )
        self.worker.release(number)
        return outcome


def test_the_next_batch_is_read_while_one_is_drawn() -> None:
    desk = Desk()
    for number in range(3):
        assert isinstance(desk.run(number), BatchResult)
    assert [reading.names for reading in desk.engine.readings] == [("j2", "j3"), ("j4", "j5")]
    assert desk.engine.given == [None, ("j2", "j3"), ("j4", "j5")]


def test_a_reading_knows_how_many_calls_are_left() -> None:
    class Draws(Reads):
        def _step(self, channel: Channel) -> None:
            for step in range(1, 5):
                channel.progress(Progress(phase=Phase.DENOISE, step=step, num_steps=4))

    desk = Desk(2)
    desk.engine.__class__ = Draws
    desk.run(0)
    assert [reading.calls for reading in desk.engine.readings] == [[3, 2, 1, 0]]


def test_nothing_is_read_beside_text_or_questions() -> None:
    desk = Desk(2, Task.ASK)
    desk.run(0)
    channel = desk.worker._ahead.beside(Channel())
    channel.progress(Progress(phase=Phase.THINK, step=1, num_steps=0))
    assert desk.engine.readings == []


def test_nothing_is_read_once_the_run_is_to_stop() -> None:
    class Stopped(Channel):
        def is_stopped(self) -> bool:
            return True

    desk = Desk(2)
    desk.run(0, Stopped())
    assert desk.engine.readings == []


def test_an_engine_that_has_no_room_is_asked_once_a_batch() -> None:
    desk = Desk(2)
    desk.engine.reads = False
    for number in range(2):
        assert isinstance(desk.run(number), BatchResult)
    assert desk.engine.given == [None, None]


@pytest.mark.parametrize("error", [TypeError("a prompt"), OutOfMemoryError("no room")])
def test_a_reading_that_fails_fails_neither_batch(error: Exception) -> None:
    desk = Desk()
    desk.engine.error = error
    outcomes = [desk.run(0)]
    desk.engine.error = None
    outcomes += [desk.run(1), desk.run(2)]
    assert all(isinstance(outcome, BatchResult) for outcome in outcomes)
    assert desk.engine.given == [None, None, ("j4", "j5")]
    assert desk.engine.readings[0].calls == [1]


def test_a_batch_without_room_is_drawn_again_without_what_was_read() -> None:
    desk = Desk()
    desk.engine.needs_all = True
    assert all(isinstance(desk.run(number), BatchResult) for number in range(3))
    assert desk.engine.batches == [("j0", "j1"), ("j0", "j1"), ("j2", "j3"), ("j4", "j5")]
    # From then on nothing is read ahead.
    assert desk.engine.given == [None, None, None, None]


def test_a_batch_that_does_not_fit_alone_is_not_drawn_twice() -> None:
    desk = Desk(1)
    jobs = tuple(make_job(f"j{i}", prompt="heavy") for i in range(2))
    keys = ("j0", "j1")
    desk.batches[0] = Batch(id=batch_id(keys), group=group_key(jobs[0]), jobs=jobs, keys=keys)
    assert isinstance(desk.run(0), Raised)
    assert len(desk.engine.batches) == 1


def test_what_was_read_of_another_batch_is_dropped() -> None:
    desk = Desk()
    desk.run(0)
    held = weakref.ref(desk.engine.readings.pop())
    desk.run(2)
    gc.collect()
    assert held() is None
    assert desk.engine.given == [None, None]


def test_what_was_read_of_a_batch_that_is_given_back_is_dropped() -> None:
    desk = Desk()
    desk.run(0)
    held = weakref.ref(desk.engine.readings.pop())
    desk.worker.release(1)
    gc.collect()
    assert held() is None
    desk.run(2)
    assert desk.engine.given == [None, None]


class Expecting(EngineWorker):
    """Lets whoever draws wait until so many assignments are expected."""

    def __init__(self, engine: Reads) -> None:
        super().__init__(engine)
        self.changed = threading.Condition()
        self.num_expected = 0

    def expect(self, number: int) -> None:
        super().expect(number)
        with self.changed:
            self.num_expected += 1
            self.changed.notify_all()

    def wait_for(self, number: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.num_expected >= number, PATIENCE_S)


def test_a_run_reads_every_batch_but_the_first_ahead(tmp_path: Path) -> None:
    # The first of two passes of each batch waits until the next one is prepared.
    engine = Reads(a_pass=1)
    worker = Expecting(engine)
    engine.on_step = lambda: worker.wait_for(min(len(engine.batches), 2))
    jobs = [make_job(f"j{i}") for i in range(6)]
    assert run_worker(tmp_path, jobs, make_config(), worker=worker).done == 6
    assert engine.given == [None, ("j2", "j3"), ("j4", "j5")]


def test_a_job_that_poisons_its_batch_fails_alone_after_it_was_read_ahead(tmp_path: Path) -> None:
    engine = Reads(a_pass=1)
    worker = Expecting(engine)
    engine.error = RuntimeError("poisoned")
    engine.on_step = lambda: worker.wait_for(1)
    jobs = [make_job(f"j{i}", prompt="poison" if i == 2 else "fine") for i in range(4)]
    summary = run_worker(tmp_path, jobs, make_config(), worker=worker)
    assert (summary.done, summary.failed) == (3, 1)
    assert engine.readings[0].names == ("j2", "j3")


def test_a_batch_that_a_process_may_have_died_of_is_not_read_ahead() -> None:
    engine = Reads()
    worker = Expecting(engine)
    job = make_job("j0")
    with Preparer(worker, read_input) as preparer:
        suspect, sound = (Assignment(number=number, ids=("j0",)) for number in (1, 2))
        preparer.start(suspect, [job], alone=True)
        assert preparer.take(suspect, [job]) == [None]
        assert worker.num_expected == 0
        preparer.start(sound, [job])
        preparer.take(sound, [job])
        assert worker.num_expected == 1


def test_a_worker_in_another_process_reads_what_waits_for_it() -> None:
    engine, outbox = Reads(), Outbox()
    host = WorkerHost(engine, number=0, device="cpu", output=OutputConfig(), outbox=outbox)
    batches = Desk(2).batches
    for number, batch in enumerate(batches):
        host.take(Prepare(number=number, jobs=batch.jobs, inputs=([], [])))
    _await(outbox, Prepared, 2)
    for number, batch in enumerate(batches):
        host.take(Run(number=number, batch=batch, kept=()))
    _await(outbox, Ended, 2)
    host.close()
    assert engine.given == [None, ("j2", "j3")]


def _await(outbox: Outbox, kind: type, count: int) -> None:
    """Waits until so many news of a kind have come."""
    while count > 0:
        news = outbox.fetch(PATIENCE_S)
        assert news
        count -= sum(isinstance(one, kind) for one in news)
