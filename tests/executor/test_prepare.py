"""The next batch is prepared beside the running one: one ahead, in a thread that ends."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import pytest

from sensebatch import contract
from sensebatch.errors import JobError, RunStoppedError
from sensebatch.executor.prepare import MAX_THREADS, JobThreads, ReadJob
from sensebatch.jobs import Batch, BatchResult, Job
from sensebatch.store.database import Database
from sensebatch.tasks import Task
from tests.executor.fakes import (
    FakeEngine,
    Flag,
    make_config,
    make_input,
    make_job,
    mixed_jobs,
    run_folder,
)

PATIENCE_S = 60.0


class Watched(FakeEngine):
    """Knows which jobs were prepared, and lets a running batch wait for that."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared: list[str] = []
        self.threads: set[str] = set()
        self._changed = threading.Condition()

    def prepare(self, job: Job, inputs: Sequence[bytes]) -> tuple[bytes, ...]:
        with self._changed:
            self.prepared.append(job.id)
            self.threads.add(threading.current_thread().name)
            self._changed.notify_all()
        return super().prepare(job, inputs)

    def wait_for(self, job_id: str, timeout: float = PATIENCE_S) -> bool:
        """Returns whether a job was prepared before the time was over."""
        with self._changed:
            return self._changed.wait_for(lambda: job_id in self.prepared, timeout)


class Generating(Watched):
    """Calls a method before each batch is generated, with its number from 0."""

    def generate(self, *args: Any, **options: Any) -> BatchResult:
        self.at_batch(len(self.batches))
        return super().generate(*args, **options)

    def at_batch(self, number: int) -> None:
        raise NotImplementedError


def edits(*names: str) -> list[Job]:
    return [make_job(name, Task.EDIT, images=(make_input(name),)) for name in names]


def test_the_next_batch_is_prepared_while_one_is_generated(tmp_path: Path) -> None:
    class Waits(Generating):
        def at_batch(self, number: int) -> None:
            if number < 2:
                assert self.wait_for(f"j{2 * number + 3}")

    ran = run_folder(tmp_path, edits(*(f"j{i}" for i in range(6))), engine=Waits())
    assert ran.summary.done == 6
    assert ran.engine.batches == [("j0", "j1"), ("j2", "j3"), ("j4", "j5")]


def test_no_more_than_one_batch_is_prepared_ahead(tmp_path: Path) -> None:
    class Waits(Generating):
        def at_batch(self, number: int) -> None:
            if number < 3:
                assert self.wait_for(f"j{number + 1}")
            assert not self.wait_for(f"j{number + 2}", timeout=0.05)

    jobs = edits("j0", "j1", "j2", "j3")
    ran = run_folder(tmp_path, jobs, make_config(max_batch_size=1), engine=Waits())
    assert ran.summary.done == 4


@pytest.mark.slow
def test_what_was_prepared_is_released_once_its_batch_is_through(tmp_path: Path) -> None:
    class Held(list[bytes]):
        """Stands for tensors; can be referred to weakly."""

    alive: dict[str, weakref.ref[Held]] = {}

    class Watches(Generating):
        def prepare(self, job: Job, inputs: Sequence[bytes]) -> Any:
            held = Held(super().prepare(job, inputs))
            alive[job.id] = weakref.ref(held)
            return held

        def at_batch(self, number: int) -> None:
            gc.collect()
            held = {name for name, ref in list(alive.items()) if ref() is not None}
            # Those of this batch, and the next ones as far as they are prepared.
            assert held.isdisjoint(f"j{n}" for n in range(2 * number))
            assert held >= {f"j{2 * number}", f"j{2 * number + 1}"}

    ran = run_folder(tmp_path, edits(*(f"j{i}" for i in range(6))), engine=Watches())
    assert ran.summary.done == 6
    assert len(ran.engine.batches) == 3


def test_the_first_batch_of_the_next_group_is_prepared_ahead(tmp_path: Path) -> None:
    class Waits(Generating):
        def at_batch(self, number: int) -> None:
            assert number or self.wait_for("b")

    jobs = [*edits("a"), make_job("b", Task.INTERLEAVE)]
    assert run_folder(tmp_path, jobs, engine=Waits()).summary.done == 2


def test_every_job_is_prepared_once_in_threads_of_their_own(tmp_path: Path) -> None:
    engine = Watched()
    run_folder(tmp_path, edits(*(f"j{i}" for i in range(7))), engine=engine)
    assert Counter(engine.prepared) == {f"j{i}": 1 for i in range(7)}
    assert {name.split("_")[0] for name in engine.threads} == {"prepare-job"}


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)


@pytest.mark.usefixtures("many_cores")
def test_several_jobs_are_prepared_together_and_keep_their_order(tmp_path: Path) -> None:
    class Together(Watched):
        def prepare(self, job: Job, inputs: Sequence[bytes]) -> tuple[bytes, ...]:
            prepared = super().prepare(job, inputs)
            # The first job of all is through last, as if its image were the largest.
            assert job.id != "j0" or self.wait_for(f"j{MAX_THREADS - 1}")
            return prepared

        def generate(self, batch: Batch, prepared: Sequence[Any], **options: Any) -> BatchResult:
            assert [(job.prompt.encode(),) for job in batch.jobs] == list(prepared)
            return super().generate(batch, prepared, **options)

    names = [f"j{i}" for i in range(2 * MAX_THREADS)]
    jobs = [make_job(n, Task.EDIT, prompt=n, images=(make_input(n),)) for n in names]
    config = make_config(max_batch_size=len(names))
    ran = run_folder(tmp_path, jobs, config, engine=Together())
    assert ran.engine.batches == [tuple(names)]


@pytest.mark.usefixtures("many_cores")
def test_large_images_have_the_memory_to_themselves() -> None:
    held: set[str] = set()
    most: list[set[str]] = []
    lock, gate = threading.Lock(), threading.Event()

    class Worker:
        def prepare(self, _: int, __: int, job: Job, ___: Sequence[bytes]) -> None:
            with lock:
                held.add(job.id)
                most.append(set(held))
            # Small images wait until all of them are there, which a large one never sees.
            assert job.id.startswith("large") or gate.wait(PATIENCE_S)
            with lock:
                held.discard(job.id)

    def read() -> Iterator[ReadJob]:
        for number in range(MAX_THREADS):
            yield sized_job(f"small-{number}", 2048, 2048), ()
        gate.set()
        for number in range(2):
            yield sized_job(f"large-{number}", 9000, 2048), ()

    threads = JobThreads(cast(contract.Worker, Worker()))
    assert threads.prepare(0, read()) == [None] * (MAX_THREADS + 2)
    threads.close()
    assert max(map(len, most)) > 1
    assert all(len(together) == 1 for together in most if any("large" in n for n in together))


def sized_job(name: str, height: int, width: int) -> Job:
    image = replace(make_input(name), height=height, width=width)
    return make_job(name, Task.EDIT, images=(image,))


@pytest.mark.parametrize("trouble", ["missing", "unusable"])
def test_a_job_that_cannot_be_prepared_is_not_an_error_of_the_running_batch(
    tmp_path: Path, trouble: str
) -> None:
    class Waits(Generating):
        def at_batch(self, number: int) -> None:
            # After the one in trouble, so that its failure is there.
            assert number or self.wait_for("d")

    jobs = edits("a", "b", "bad", "d")
    image = make_input("missing" if trouble == "missing" else "in")
    jobs[2] = make_job("bad", Task.EDIT, prompt=trouble, images=(image,))
    ran = run_folder(tmp_path, jobs, engine=Waits())
    assert ran.engine.batches == [("a", "b"), ("d",)]
    rows = {row["job_id"]: row for row in pq.read_table(tmp_path / "log.parquet").to_pylist()}
    assert [name for name, row in rows.items() if row["status"] == "failed"] == ["bad"]
    assert (rows["bad"]["error_type"], rows["bad"]["batch_id"]) == ("JobError", None)


def test_an_error_that_stops_the_run_waits_for_its_batch(tmp_path: Path) -> None:
    class Breaks(Watched):
        def prepare(self, job: Job, inputs: Sequence[bytes]) -> tuple[bytes, ...]:
            super().prepare(job, inputs)
            if job.id == "c":
                raise RunStoppedError("nothing can be read any more")
            return tuple(inputs)

    jobs = edits("a", "b", "c", "d")
    with pytest.raises(RunStoppedError, match="any more"):
        run_folder(tmp_path, jobs, engine=Breaks())
    ran = run_folder(tmp_path, jobs)
    assert ran.engine.batches == [("c", "d")]


def test_what_is_ahead_is_kept_while_a_batch_is_split(tmp_path: Path) -> None:
    class Waits(Generating):
        def at_batch(self, number: int) -> None:
            assert number or self.wait_for("j4")

    jobs = [make_job(f"j{i}", prompt="heavy" if i < 3 else "", seed=i) for i in range(5)]
    engine = Waits()
    ran = run_folder(tmp_path, jobs, make_config(max_batch_size=3), engine=engine)
    assert ran.engine.batches == [
        ("j0", "j1", "j2"),
        ("j0", "j1"),
        ("j2",),
        ("j0",),
        ("j1",),
        ("j3", "j4"),
    ]
    assert Counter(engine.prepared)["j4"] == 1
    assert ran.summary.done == 5


@pytest.mark.parametrize("how", ["stop", "interrupt"])
def test_the_end_of_a_run_leaves_no_thread(tmp_path: Path, how: str) -> None:
    class Waits(Generating):
        def at_batch(self, _: int) -> None:
            assert self.wait_for("c")
            if how == "interrupt":
                raise KeyboardInterrupt

    jobs = edits("a", "b", "c", "d")
    if how == "stop":
        assert run_folder(tmp_path, jobs, engine=Waits(), stop=Flag(after=1)).summary.stopped
    else:
        with pytest.raises(KeyboardInterrupt):
            run_folder(tmp_path, jobs, engine=Waits())
    assert not [t for t in threading.enumerate() if t.name.startswith("prepare")]
    assert run_folder(tmp_path, jobs).summary.counts.done == 4


def test_the_state_is_never_touched_from_the_preparing_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()

    def watch(name: str) -> None:
        original = getattr(Database, name)

        @contextmanager
        def watched(self: Database) -> Any:
            threads.add(threading.current_thread().name.split("_")[0])
            with original(self) as connection:
                yield connection

        monkeypatch.setattr(Database, name, watched)

    watch("reading")
    watch("transaction")
    run_folder(tmp_path, mixed_jobs(), engine=Watched())
    assert threads == {"MainThread", "commit"}


def test_inputs_are_read_by_the_preparing_thread(tmp_path: Path) -> None:
    from sensebatch.executor.run import execute
    from sensebatch.executor.worker import EngineWorker
    from sensebatch.store.store import open_store
    from tests.executor.fakes import IDENTITY, Recorder

    readers = set()

    def read(_: object) -> bytes:
        readers.add(threading.current_thread().name.split("_")[0])
        raise JobError("expected an image, found nothing")

    with open_store(tmp_path) as store:
        store.state.ingest(edits("a", "b", "c"), IDENTITY, tmp_path)
        summary = execute(
            store=store,
            worker=EngineWorker(FakeEngine()),
            config=make_config(),
            read_image=read,
            observer=Recorder(),
            stop=Flag(),
        )
    assert (summary.failed, readers) == (3, {"prepare"})
