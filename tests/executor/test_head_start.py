"""Images are encoded once the next batch is under way, and no later than that."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from sensebatch.executor.head_start import HeadStart
from sensebatch.jobs import BatchResult
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
