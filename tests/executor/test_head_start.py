"""Images are encoded once the next batch is under way, and no later than that."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sensebatch.config import OutputConfig
from sensebatch.executor import host
from sensebatch.executor.head_start import HeadStart
from sensebatch.executor.host import Outbox, WorkerHost
from sensebatch.executor.messages import Ended, Prepare, Prepared, Run
from sensebatch.jobs import Batch, BatchResult, batch_id, group_key
from sensebatch.store import writer
from sensebatch.store.images import encode_job_image
from tests.executor.fakes import FakeEngine, make_job, run_folder

LONG_S = 60.0


@pytest.fixture(autouse=True)
def _long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a wait that nothing ends be noticed."""
    monkeypatch.setattr("sensebatch.executor.head_start.HEAD_START_S", LONG_S)


def test_threads_wait_until_the_moment_is_over() -> None:
    head_start, went = HeadStart(), threading.Event()
    head_start.wait()
    head_start.begin()

    def background() -> None:
        head_start.wait()
        went.set()

    thread = threading.Thread(target=background)
    thread.start()
    assert not went.wait(0.05)
    head_start.end()
    assert went.wait(LONG_S / 2)
    thread.join()


def test_a_moment_that_nothing_ends_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sensebatch.executor.head_start.HEAD_START_S", 0.01)
    head_start = HeadStart()
    head_start.begin()
    head_start.wait()
    monkeypatch.setattr("sensebatch.executor.head_start.HEAD_START_S", 0.0)
    head_start.begin()
    head_start.wait()


def test_images_are_encoded_once_the_next_batch_has_taken_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Begins(FakeEngine):
        def generate(self, *args: Any, **options: Any) -> BatchResult:
            events.append(f"batch {len(self.batches)}")
            return super().generate(*args, **options)

    encode = encode_job_image

    def encoded(job: Any, *args: Any, **options: Any) -> bytes:
        events.append(f"encode {job.id}")
        return encode(job, *args, **options)

    monkeypatch.setattr(writer, "encode_job_image", encoded)
    engine = Begins(on_step=lambda: events.append("step"))
    ran = run_folder(tmp_path, [make_job(f"j{i}") for i in range(6)], engine=engine)
    assert ran.summary.done == 6
    for number in range(2):
        begins = events.index(f"batch {number + 1}")
        encodes = [events.index(f"encode j{2 * number + i}") for i in range(2)]
        assert begins < min(encodes)


def test_a_worker_encodes_once_its_next_batch_has_taken_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    has_both = threading.Event()

    class Begins(FakeEngine):
        def generate(self, *args: Any, **options: Any) -> BatchResult:
            assert has_both.wait(LONG_S)
            # For an encoder that does not wait to be first.
            time.sleep(0.1)
            events.append(f"batch {len(self.batches)}")
            return super().generate(*args, **options)

    def encoded(job: Any, *args: Any, **options: Any) -> bytes:
        events.append(f"encode {job.id}")
        return encode_job_image(job, *args, **options)

    monkeypatch.setattr(host, "encode_job_image", encoded)
    outbox = Outbox()
    worker = WorkerHost(Begins(), number=0, device="cpu", output=OutputConfig(), outbox=outbox)
    for number in range(2):
        job = make_job(f"j{number}")
        batch = Batch(id=batch_id(("key",)), group=group_key(job), jobs=(job,), keys=("key",))
        worker.take(Prepare(number=number, jobs=batch.jobs, inputs=([],)))
        _await(outbox, Prepared, 1)
        worker.take(Run(number=number, batch=batch, kept=()))
    has_both.set()
    _await(outbox, Ended, 2)
    worker.close()
    assert events == ["batch 0", "batch 1", "encode j0", "encode j1"]


def _await(outbox: Outbox, kind: type, count: int) -> None:
    """Waits until so many news of a kind have come."""
    while count > 0:
        news = outbox.fetch(LONG_S)
        assert news
        count -= sum(isinstance(one, kind) for one in news)
