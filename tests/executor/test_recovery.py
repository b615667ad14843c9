"""A job that processes die of does not stop every restart; a clean stop is not a death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sensebatch.config import ExecutionConfig
from sensebatch.contract import Channel
from sensebatch.errors import DeviceError, StorageFullError
from sensebatch.executor.recovery import MAX_DEATHS
from sensebatch.jobs import BatchResult, Job
from sensebatch.store.store import Store, open_store
from sensebatch.store.tables import StartedBatch
from tests.executor.fakes import (
    FakeEngine,
    Ran,
    make_config,
    make_job,
    outcome,
    run_folder,
)
from tests.executor.killed_run import jobs_with_a_killer

pytestmark = pytest.mark.slow

CONFIG = make_config(max_batch_size=3, execution=ExecutionConfig(max_attempts=3))
JOBS = [make_job(f"j{number}") for number in range(7)]
KILLER = [make_job("j4", prompt="kills") if job.id == "j4" else job for job in JOBS]


PATIENCE_S = 60.0
A_MOMENT_S = 0.2
"""For something to happen that must not."""


class Killed(BaseException):
    """Stands for the end of the process."""


def die() -> None:
    raise Killed


def die_at(engine: FakeEngine, step: int) -> None:
    if engine.steps == step:
        raise Killed


def live(root: Path, jobs: Sequence[Job], engine: FakeEngine | None = None, **options: Any) -> Ran:
    """Runs jobs in a process that may be killed."""
    return run_folder(root, jobs, CONFIG, engine=engine or FakeEngine(kill=die), **options)


def killed(root: Path, jobs: Sequence[Job], engine: FakeEngine | None = None) -> FakeEngine:
    """Runs jobs in a process that is killed; returns its engine."""
    engine = engine or FakeEngine(kill=die)
    with pytest.raises(Killed):
        live(root, jobs, engine)
    return engine


def on_record(root: Path) -> list[StartedBatch]:
    with open_store(root) as store:
        return store.state.started_batches()


def rows(root: Path) -> dict[str, dict[str, Any]]:
    return {row["job_id"]: row for row in pq.read_table(root / "log.parquet").to_pylist()}


@pytest.mark.parametrize("word", ["kills", pytest.param("overflows", marks=pytest.mark.slow)])
def test_job_that_kills_its_process_fails_alone_and_the_others_are_done(
    tmp_path: Path, word: str
) -> None:
    """Real processes and SIGKILL, in the engine and while the job is prepared ahead."""
    command = [sys.executable, "-m", "tests.executor.killed_run", str(tmp_path), word]
    deaths = 0
    while (code := subprocess.run(command, check=False).returncode) == -signal.SIGKILL:
        deaths += 1
        assert deaths <= 2 * MAX_DEATHS + 1
    assert code == 0
    found = rows(tmp_path)
    assert {name for name, row in found.items() if row["status"] == "failed"} == {"e3"}
    assert {name for name, row in found.items() if row["status"] == "done"} == {
        job.id for job in jobs_with_a_killer(word) if job.id != "e3"
    }
    assert found["e3"]["error_type"] == "ProcessDiedError"
    assert "killed 2 times while this job ran alone" in found["e3"]["error_message"]
    assert (found["e3"]["attempt"], found["e3"]["batch_id"]) == (1, None)
    # Batches that no process died of are as they would have been.
    assert [found[f"e{n}"]["batch_size"] for n in (0, 1, 4, 5)] == [2] * 4


def test_batch_that_processes_died_of_is_run_one_by_one_after_all_others(tmp_path: Path) -> None:
    assert killed(tmp_path, KILLER).batches == [("j0", "j1", "j2"), ("j3", "j4", "j5")]
    (batch,) = on_record(tmp_path)
    assert (batch.ids, batch.starts, batch.is_suspect) == (("j3", "j4", "j5"), 1, False)
    # Once more as it was, and then apart.
    assert killed(tmp_path, KILLER).batches == [("j3", "j4", "j5")]
    assert killed(tmp_path, KILLER).batches == [("j6",), ("j3",), ("j4",)]
    assert [(batch.ids, batch.starts) for batch in on_record(tmp_path)] == [
        (("j4",), 1),
        (("j5",), 0),
    ]
    # An innocent one that comes after the killer waits until that is given up.
    assert killed(tmp_path, KILLER).batches == [("j4",)]
    ran = live(tmp_path, KILLER)
    assert ran.engine.batches == [("j5",)]
    assert (ran.summary.done, ran.summary.failed, ran.summary.counts.remaining) == (1, 1, 0)
    assert ran.seen.failures == [("j4", False)]


def test_a_restart_after_one_death_runs_the_batch_as_it_was(tmp_path: Path) -> None:
    killed(tmp_path / "a", KILLER)
    live(tmp_path / "a", KILLER, FakeEngine())
    live(tmp_path / "b", KILLER, FakeEngine())
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def test_deaths_are_said_to_people(tmp_path: Path) -> None:
    for _ in range(MAX_DEATHS):
        killed(tmp_path, KILLER)
    ran = live(tmp_path, KILLER, FakeEngine())
    assert ran.seen.notes == [
        "the process was killed 2 times during a batch of 3 jobs: run one by one, after all others"
    ]
    assert ran.engine.batches == [("j6",), ("j3",), ("j4",), ("j5",)]
    assert ran.summary.counts.done == 7


def test_job_that_was_given_up_is_run_again_when_asked_to(tmp_path: Path) -> None:
    for _ in range(2 * MAX_DEATHS):
        killed(tmp_path, KILLER)
    assert live(tmp_path, KILLER).summary.counts.failed == 1
    assert live(tmp_path, KILLER).engine.batches == []
    config = make_config(execution=ExecutionConfig(retry_failed=True))
    ran = run_folder(tmp_path, KILLER, config, engine=FakeEngine())
    assert ran.engine.batches == [("j4",)]
    assert ran.summary.counts.done == 7


def test_changed_job_is_no_longer_suspected(tmp_path: Path) -> None:
    for _ in range(MAX_DEATHS + 1):
        killed(tmp_path, KILLER)
    ran = live(tmp_path, JOBS)
    assert ran.summary.counts.done == 7
    assert ("j4",) in ran.engine.batches
    assert ran.seen.failures == []


class Breaks(FakeEngine):
    """Draws one image a pass, and does something in the first pass of its second batch."""

    def __init__(self, how: Callable[[], None]) -> None:
        super().__init__(a_pass=1)
        self.how = how

    def _step(self, channel: Channel) -> None:
        super()._step(channel)
        if len(self.batches) == 2:
            self.how()
            super()._step(channel)


def lose_device() -> None:
    raise DeviceError("cuda failed")


def interrupt() -> None:
    raise KeyboardInterrupt


def no_room(*_: object) -> None:
    raise OSError(28, "No space left on device")


def end_cleanly(root: Path, how: str, patch: pytest.MonkeyPatch) -> None:
    """Runs jobs in a process that ends in its second batch, but not for a fault of that."""
    stop = threading.Event()
    if how == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            live(root, JOBS, Breaks(interrupt))
    elif how == "device":
        with pytest.raises(DeviceError):
            live(root, JOBS, Breaks(lose_device))
    elif how == "disk":
        with pytest.raises(StorageFullError):
            live(root, JOBS, Breaks(lambda: patch.setattr(os, "replace", no_room)))
    elif how == "signal":
        assert live(root, JOBS, Breaks(stop.set), stop=stop).summary.stopped
    else:
        engine = Breaks(stop.set)
        # The second signal, one step after the first.
        engine.on_step = lambda: die() if stop.is_set() else None
        with pytest.raises(Killed):
            live(root, JOBS, engine, stop=stop)


@pytest.mark.parametrize("how", ["device", "disk", "interrupt", "signal", "two signals"])
def test_clean_stop_is_not_a_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    with monkeypatch.context() as patch:
        end_cleanly(tmp_path / "a", how, patch)
    (*_, batch) = found = on_record(tmp_path / "a")
    assert batch.ids == ("j3", "j4", "j5")
    assert {batch.starts for batch in found} == {0}
    live(tmp_path / "a", JOBS, FakeEngine(a_pass=1))
    live(tmp_path / "b", JOBS, FakeEngine(a_pass=1))
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def test_batch_that_keeps_images_before_each_death_is_never_suspected(tmp_path: Path) -> None:
    """More kills than would be counted as deaths; the composition stays."""
    jobs = [make_job(f"j{number}") for number in range(MAX_DEATHS + 2)]
    config = make_config(max_batch_size=len(jobs))
    on_records = []
    for step in (1, *[2] * (MAX_DEATHS + 1)):
        engine = FakeEngine(a_pass=1)
        engine.on_step = partial(die_at, engine, step)
        with pytest.raises(Killed):
            run_folder(tmp_path / "a", jobs, config, engine=engine)
        (batch,) = on_record(tmp_path / "a")
        on_records.append((batch.starts, batch.rounds))
    # Of the first life nothing was kept; each of the others kept a round.
    assert on_records == [(1, 0), (2, 0), *((1, number + 1) for number in range(MAX_DEATHS))]
    run_folder(tmp_path / "a", jobs, config, engine=FakeEngine(a_pass=1))
    run_folder(tmp_path / "b", jobs, config, engine=FakeEngine(a_pass=1))
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def test_batch_that_was_being_written_is_not_blamed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its second life it is committed before the batch begins that kills."""
    dead = threading.Event()
    commit = Store.commit
    waits = iter([PATIENCE_S, A_MOMENT_S])

    def slow(self: Store, *args: Any, **options: Any) -> None:
        if dead.wait(next(waits)):
            raise Killed
        commit(self, *args, **options)

    def die_first() -> None:
        dead.set()
        raise Killed

    monkeypatch.setattr(Store, "commit", slow)
    killed(tmp_path, KILLER, FakeEngine(kill=die_first))
    assert [(batch.ids, batch.starts) for batch in on_record(tmp_path)] == [
        (("j0", "j1", "j2"), 1),
        (("j3", "j4", "j5"), 1),
    ]
    dead.clear()
    killed(tmp_path, KILLER, FakeEngine(kill=die_first))
    assert [(batch.ids, batch.starts) for batch in on_record(tmp_path)] == [(("j3", "j4", "j5"), 2)]


class Watched(FakeEngine):
    """Knows what was prepared when each batch had run."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared: list[str] = []
        self.seen: list[list[str]] = []

    def prepare(self, job: Job, inputs: Sequence[bytes]) -> tuple[bytes, ...]:
        self.prepared.append(job.id)
        return super().prepare(job, inputs)

    def generate(self, *args: Any, **options: Any) -> BatchResult:
        result = super().generate(*args, **options)
        time.sleep(A_MOMENT_S)
        self.seen.append(list(self.prepared))
        return result


def test_nothing_is_prepared_beside_what_a_process_may_have_died_of(tmp_path: Path) -> None:
    killed(tmp_path / "once", KILLER)
    again = Watched()
    live(tmp_path / "once", KILLER, again)
    assert again.seen == [["j3", "j4", "j5"], ["j3", "j4", "j5", "j6"]]
    for _ in range(MAX_DEATHS):
        killed(tmp_path / "twice", KILLER)
    apart = Watched()
    live(tmp_path / "twice", KILLER, apart)
    order = ["j6", "j3", "j4", "j5"]
    assert apart.seen == [order[:count] for count in range(1, 5)]


def test_deaths_before_the_first_batch_is_prepared_are_counted(tmp_path: Path) -> None:
    jobs = [make_job("first", prompt="overflows"), *JOBS]
    for _ in range(MAX_DEATHS):
        assert killed(tmp_path, jobs).batches == []
    assert killed(tmp_path, jobs).batches[:2] == [("j2", "j3", "j4"), ("j5", "j6")]
    killed(tmp_path, jobs)
    ran = live(tmp_path, jobs)
    assert ran.engine.batches == [("j0",), ("j1",)]
    assert (ran.summary.counts.done, ran.summary.counts.failed) == (7, 1)
