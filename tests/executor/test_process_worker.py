"""A run whose engine is another process has the same store as a run within one process."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, cast

import pytest

from sensebatch.config import ExecutionConfig
from sensebatch.contract import Engine, Progress, Stop
from sensebatch.errors import DeviceError
from sensebatch.executor.worker import EngineWorker
from sensebatch.jobs import BatchResult, Job
from sensebatch.resolutions import Resolution
from sensebatch.store.attempts import row_from_json
from sensebatch.tasks import Task
from tests.executor.fakes import (
    VOLATILE,
    FakeEngine,
    Recorder,
    make_config,
    make_job,
    mixed_jobs,
    outcome,
    run_worker,
)
from tests.executor.process_worker import PATIENCE_S, ProcessWorker

pytestmark = pytest.mark.slow

CONFIG = make_config(max_batch_size=3, execution=ExecutionConfig(max_attempts=2))


def jobs() -> list[Job]:
    """Returns jobs that fail in every way, within the engine and before it."""
    grown = [make_job(f"grows{i}", Task.INTERLEAVE, prompt="grows", seed=i) for i in (2, 3)]
    # The last group, since the room that is made for it changes the rows of what follows.
    huge = make_job("huge", prompt="huge", resolution=Resolution(height=32, width=32))
    return [*mixed_jobs(), *grown, make_job("unusable", prompt="unusable"), huge]


def make_engine(_: Stop | None = None) -> FakeEngine:
    """Returns an engine that draws one image a pass, in whichever process."""
    return FakeEngine(a_pass=1)


def state_rows(root: Path) -> dict[str, list[Any]]:
    """Returns what the state holds, without what no two runs share."""
    with closing(sqlite3.connect(root / "state.db")) as db:
        found: dict[str, list[Any]] = {
            table: db.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()
            for table in ("groups", "batches", "stale")
        }
        # The attempt that a job is now by what it was, since its number is not fixed either.
        db.execute(
            "CREATE TEMP VIEW known AS SELECT *, (SELECT json_extract(row, '$.attempt') FROM"
            " attempts WHERE seq = current AND job_id = id) FROM jobs"
        )
        names = [row[1] for row in db.execute("PRAGMA table_info(known)") if row[1] != "current"]
        columns = ", ".join(f'"{name}"' for name in names)
        found["jobs"] = db.execute(f"SELECT {columns} FROM known ORDER BY 1").fetchall()
        rows = [row for (row,) in db.execute("SELECT row FROM attempts ORDER BY seq")]
    attempts = [
        {name: value for name, value in row_from_json(row).items() if name not in VOLATILE}
        for row in rows
    ]
    # A batch is committed while the next one begins, so their rows have no order of their own.
    found["attempts"] = sorted(attempts, key=lambda row: (row["job_id"], row["attempt"]))
    return found


@pytest.fixture(scope="module")
def within(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run within one process."""
    root = tmp_path_factory.mktemp("within")
    run_worker(root, jobs(), CONFIG, worker=EngineWorker(make_engine()))
    return root


def test_same_store_as_within_one_process(tmp_path: Path, within: Path) -> None:
    with ProcessWorker(make_engine) as worker:
        run_worker(tmp_path, jobs(), CONFIG, worker=worker)
    assert worker.crossed >= {
        "input images",
        "a job that cannot be prepared",
        "progress",
        "kept images, out",
        "kept images, in",
        "results",
        "a job that failed",
        "a batch that failed: OutOfMemoryError",
        "a batch that failed: RuntimeError",
        "a note",
    }
    assert outcome(tmp_path) == outcome(within)
    assert state_rows(tmp_path) == state_rows(within)


def engine_that_waits_at(step: int, stop: Stop) -> FakeEngine:
    """Returns an engine that is at a step of its own until the stop has crossed."""
    engine = make_engine()

    def wait() -> None:
        if engine.steps == step:
            assert cast(Event, stop).wait(PATIENCE_S)

    engine.on_step = wait
    return engine


class StopsAt(Recorder):
    """Stops the run once it has seen so much progress."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left, self.stop = steps, threading.Event()

    def progress(self, _: Progress) -> None:
        self.left -= 1
        if not self.left:
            self.stop.set()


@pytest.mark.parametrize("step", [2, pytest.param(29, marks=pytest.mark.slow)])
def test_stop_crosses_in_the_middle_of_a_batch_and_the_run_is_resumed(
    tmp_path: Path, within: Path, step: int
) -> None:
    seen = StopsAt(step)
    with ProcessWorker(partial(engine_that_waits_at, step)) as worker:
        summary = run_worker(tmp_path, jobs(), CONFIG, worker=worker, seen=seen, stop=seen.stop)
    assert summary.stopped
    assert summary.counts.started
    assert "a batch that failed: BatchStoppedError" in worker.crossed
    assert list((tmp_path / "checkpoints").glob("*/*.safetensors"))
    with ProcessWorker(make_engine) as worker:
        run_worker(tmp_path, jobs(), CONFIG, worker=worker)
    assert "kept images, in" in worker.crossed
    assert outcome(tmp_path) == outcome(within)


class BrokenDevice(FakeEngine):
    """Loses its device in the third batch."""

    def generate(self, *args: Any, **options: Any) -> BatchResult:
        if len(self.batches) == 2:
            raise DeviceError("cuda failed")
        return super().generate(*args, **options)


def broken_engine(_: Stop) -> Engine:
    return BrokenDevice(a_pass=1)


@pytest.mark.slow
def test_device_that_fails_in_another_process_stops_the_run(tmp_path: Path, within: Path) -> None:
    with ProcessWorker(broken_engine) as worker, pytest.raises(DeviceError, match="cuda failed"):
        run_worker(tmp_path, jobs(), CONFIG, worker=worker)
    with ProcessWorker(make_engine) as worker:
        run_worker(tmp_path, jobs(), CONFIG, worker=worker)
    assert outcome(tmp_path) == outcome(within)
