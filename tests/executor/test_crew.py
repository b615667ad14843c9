"""Several workers make the same store as one, whatever becomes of them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sensebatch.config import ExecutionConfig
from sensebatch.errors import ConfigError, DeviceError, WorkersLostError
from sensebatch.executor import roster
from sensebatch.executor.messages import (
    Began,
    Drew,
    Ended,
    GiveBack,
    Joined,
    News,
    Order,
    Prepare,
    Prepared,
    Run,
)
from sensebatch.executor.worker import EngineWorker
from sensebatch.jobs import Batch, EngineInfo, GroupKey, Job, group_key
from sensebatch.plan import patience
from sensebatch.resolutions import Resolution
from sensebatch.store.attempts import Attempt
from sensebatch.tasks import Task
from tests.executor.crews import ThreadCrew, run_crew
from tests.executor.fakes import (
    FakeEngine,
    Recorder,
    make_config,
    make_job,
    mixed_jobs,
    outcome,
    run_worker,
)
from tests.executor.scale import run_scaled

pytestmark = pytest.mark.slow

CONFIG = make_config(max_batch_size=3, execution=ExecutionConfig(max_attempts=2))


def all_jobs() -> list[Job]:
    """Returns jobs that fail in every way, within the engine and before it."""
    grown = [make_job(f"grows{i}", Task.INTERLEAVE, prompt="grows", seed=i) for i in (2, 3)]
    # The last group, since the room that is made for it changes the rows of what follows.
    huge = make_job("huge", prompt="huge", resolution=Resolution(height=32, width=32))
    return [*mixed_jobs(), *grown, make_job("unusable", prompt="unusable"), huge]


def files_and_rows(root: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Returns what a run made, without which worker made it and what room it had then."""
    files, rows = outcome(root)
    return files, [
        {name: value for name, value in row.items() if name not in ("worker", "vram_mode")}
        for row in rows
    ]


@pytest.fixture(scope="module")
def within(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run with one engine in this process."""
    root = tmp_path_factory.mktemp("within")
    run_worker(root, all_jobs(), CONFIG, worker=EngineWorker(FakeEngine(a_pass=1)))
    return root


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_any_number_of_workers_makes_the_same(
    tmp_path: Path, within: Path, num_workers: int
) -> None:
    crew = ThreadCrew(num_workers, CONFIG, all_jobs())
    summary = run_crew(tmp_path, all_jobs(), CONFIG, crew)
    assert files_and_rows(tmp_path) == files_and_rows(within)
    assert not summary.counts.remaining


class Killer:
    """Kills a worker when it says something for the n-th time."""

    def __init__(self, crew: ThreadCrew, kind: type, *counts: int, **options: Any) -> None:
        self.killed: list[int] = []
        self._crew, self._kind, self._counts, self._options = crew, kind, counts, options
        self._lock, self._num = threading.Lock(), 0
        crew.on_said = self._heard

    def _heard(self, worker: int, news: News) -> None:
        if not isinstance(news, self._kind):
            return
        with self._lock:
            self._num += 1
            if self._num not in self._counts:
                return
        self.killed.append(worker)
        self._crew.kill(worker, **self._options)


class Sets:
    """Sets an event when a worker says something."""

    def __init__(self, crew: ThreadCrew, kind: type, event: threading.Event) -> None:
        self._kind, self._event = kind, event
        crew.on_said = self._heard

    def _heard(self, _: int, news: News) -> None:
        if isinstance(news, self._kind):
            self._event.set()


def _wait_for(event: threading.Event) -> None:
    event.wait()


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "FIRST_PAUSE_S", 0.0)


@pytest.mark.parametrize(("kind", "second"), [(Prepared, 9), (Began, 5), (Drew, 5), (Ended, 5)])
def test_batches_of_a_worker_that_dies_go_to_the_others(
    tmp_path: Path, within: Path, kind: type, second: int
) -> None:
    crew = ThreadCrew(2, CONFIG, all_jobs())
    # Not the same batch twice, which would then be taken apart.
    killer = Killer(crew, kind, 2, second)
    seen = Recorder()
    run_crew(tmp_path, all_jobs(), CONFIG, crew, seen=seen)
    assert len(killer.killed) == 2
    assert sum("died and is started again: killed" in note for note in seen.notes) == 2
    assert files_and_rows(tmp_path) == files_and_rows(within)


def test_kept_images_go_to_the_next_worker_with_the_batch(tmp_path: Path) -> None:
    jobs = [make_job(f"j{i}", seed=i) for i in range(3)]
    crew = ThreadCrew(1, CONFIG, jobs)
    Killer(crew, Drew, 2)
    run_crew(tmp_path, jobs, CONFIG, crew)
    given = [order for _, order in crew.orders if isinstance(order, Run)]
    assert [len(list(filter(None, order.kept))) for order in given] == [0, 2]
    assert crew.actors[0].engine.drawn == [("j2",)]


def kills(crew: ThreadCrew, worker: int) -> FakeEngine:
    """Returns an engine whose jobs that kill end a worker, and are then at work for good."""
    engine = FakeEngine()

    def kill() -> None:
        crew.kill(worker)
        raise SystemExit

    engine.kill = kill
    return engine


def test_job_that_kills_workers_fails_as_a_row_and_the_others_are_done(tmp_path: Path) -> None:
    jobs = [make_job("a"), make_job("bad", prompt="kills"), make_job("c"), make_job("d")]
    crew = ThreadCrew(2, CONFIG, jobs, lambda worker, crew: kills(crew, worker))
    seen = Recorder()
    summary = run_crew(tmp_path, jobs, CONFIG, crew, seen=seen)
    assert (summary.done, summary.failed) == (3, 1)
    (failed,) = [row for row in outcome(tmp_path)[1] if row["status"] == "failed"]
    assert (failed["job_id"], failed["error_type"]) == ("bad", "ProcessDiedError")
    assert "2 workers died during a batch of 3 jobs: run one by one" in seen.notes
    assert sum("died and is started again" in note for note in seen.notes) == 4


def test_death_of_a_machine_is_no_batch_s_fault(tmp_path: Path) -> None:
    jobs = [make_job(f"j{i}") for i in range(3)]
    crew = ThreadCrew(1, CONFIG, jobs)
    killer = Killer(crew, Began, 1, 2, 3, 4, is_of_node=True)
    seen = Recorder()
    summary = run_crew(tmp_path, jobs, CONFIG, crew, seen=seen)
    assert len(killer.killed) == 4
    assert summary.done == 3
    assert not [note for note in seen.notes if "one by one" in note]


def test_worker_that_cannot_be_started_is_given_up_and_the_others_continue(
    tmp_path: Path,
) -> None:
    def make_engine(worker: int, _: ThreadCrew) -> FakeEngine:
        if worker == 1:
            raise DeviceError("the GPU is broken")
        return FakeEngine(a_pass=1)

    jobs = [make_job(f"j{i}") for i in range(7)]
    crew, seen = ThreadCrew(2, CONFIG, jobs, make_engine), Recorder()
    assert run_crew(tmp_path, jobs, CONFIG, crew, seen=seen).done == 7
    assert crew.lives.count(1) == 3
    assert seen.notes == ["worker 1 is given up: the GPU is broken"]


def test_run_without_a_worker_stops_and_can_be_resumed(tmp_path: Path) -> None:
    def make_engine(_worker: int, _crew: ThreadCrew) -> FakeEngine:
        raise DeviceError("the GPU is broken")

    jobs = [make_job(f"j{i}") for i in range(3)]
    with pytest.raises(WorkersLostError, match="no worker is left: the GPU is broken"):
        run_crew(tmp_path, jobs, CONFIG, ThreadCrew(2, CONFIG, jobs, make_engine))
    assert run_crew(tmp_path, jobs, CONFIG, ThreadCrew(1, CONFIG, jobs)).done == 3


def test_plan_says_when_a_worker_is_silent_for_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asleep, asked = threading.Event(), []

    class Planned:
        def of(self, device: str, group: GroupKey, num_jobs: int) -> float | None:
            asked.append((device, group, num_jobs))
            return 0.02 if crew.lives == [0] else None

    def make_engine(_: int, crew: ThreadCrew) -> FakeEngine:
        engine = FakeEngine()
        if crew.lives == [0]:
            engine.on_step = partial(_wait_for, asleep)
        return engine

    monkeypatch.setattr(patience, "LEAST_S", 0.1)
    jobs = [make_job(f"j{i}") for i in range(3)]
    crew, seen = ThreadCrew(1, CONFIG, jobs, make_engine), Recorder()
    crew.planned = Planned()
    summary = run_crew(tmp_path, jobs, CONFIG, _woken(crew, asleep), seen=seen)
    assert summary.done == 3
    died = f"worker 0 ({_node()}) died and is started again: no message from it for 0 s"
    assert seen.notes == [died]
    assert (FakeEngine().info.device, group_key(jobs[0]), 3) in asked


def _node() -> str:
    return socket.gethostname()


def _woken(crew: ThreadCrew, asleep: threading.Event) -> ThreadCrew:
    """Returns the crew, whose threads are woken before they are joined."""
    close = crew.close

    def wake() -> None:
        asleep.set()
        close()

    crew.close = wake
    return crew


def test_stop_ends_all_batches_and_the_run_is_resumed(tmp_path: Path, within: Path) -> None:
    crew = ThreadCrew(2, CONFIG, all_jobs())
    stop = threading.Event()
    Sets(crew, Drew, stop)
    summary = run_crew(tmp_path, all_jobs(), CONFIG, crew, stop=stop)
    assert summary.stopped
    assert summary.counts.started
    run_crew(tmp_path, all_jobs(), CONFIG, ThreadCrew(2, CONFIG, all_jobs()))
    assert files_and_rows(tmp_path) == files_and_rows(within)


def test_run_of_workers_is_resumed_by_one_engine(tmp_path: Path, within: Path) -> None:
    crew = ThreadCrew(3, CONFIG, all_jobs())
    stop = threading.Event()
    Sets(crew, Ended, stop)
    run_crew(tmp_path, all_jobs(), CONFIG, crew, stop=stop)
    run_worker(tmp_path, all_jobs(), CONFIG, worker=EngineWorker(FakeEngine(a_pass=1)))
    assert files_and_rows(tmp_path) == files_and_rows(within)


def test_long_stories_are_handed_out_first_where_that_ends_the_run_earlier(
    tmp_path: Path,
) -> None:
    def story(number: int, max_images: int) -> Job:
        job = make_job(f"s{number}", Task.INTERLEAVE)
        return replace(job, sampling=replace(job.sampling, max_images=max_images))

    jobs = [story(number, most) for number, most in enumerate((1, 1, 1, 1, 4))]
    config = replace(CONFIG, memory=replace(CONFIG.memory, max_batch_size=1))
    first = {}
    for num_workers in (1, 2):
        crew, root = ThreadCrew(num_workers, config, jobs), tmp_path / str(num_workers)
        assert run_crew(root, jobs, config, crew).done == 5
        first[num_workers] = next(
            order.jobs[0].id for _, order in crew.orders if isinstance(order, Prepare)
        )
    assert first == {1: "s0", 2: "s4"}
    assert files_and_rows(tmp_path / "1") == files_and_rows(tmp_path / "2")


def test_batches_are_as_large_as_the_smallest_worker_allows(tmp_path: Path) -> None:
    jobs = [make_job(f"j{i}") for i in range(6)]
    tokens = group_key(jobs[0]).image_tokens

    def make_engine(worker: int, _: ThreadCrew) -> FakeEngine:
        return FakeEngine(fitting={tokens: 3 - worker})

    run_crew(tmp_path, jobs, CONFIG, ThreadCrew(2, CONFIG, jobs, make_engine))
    assert {row["batch_size"] for row in outcome(tmp_path)[1]} == {2}


def test_worker_that_joins_takes_part_unless_it_is_too_small(tmp_path: Path) -> None:
    jobs = [make_job(f"j{i}", seed=i) for i in range(12)]
    tokens = group_key(jobs[0]).image_tokens

    def make_engine(worker: int, _: ThreadCrew) -> FakeEngine:
        return FakeEngine(fitting={tokens: {0: 2, 1: 1, 2: 2}[worker]})

    crew, seen = ThreadCrew(1, CONFIG, jobs, make_engine), Recorder()
    joined = threading.Event()

    def heard(worker: int, news: News) -> None:
        if worker == 0 and isinstance(news, Began):
            for number in (1, 2):
                if not joined.is_set():
                    crew.said(number, 0, Joined())
            joined.set()
            while not any(number == 2 and isinstance(o, Run) for number, o in list(crew.orders)):
                time.sleep(0.001)

    crew.on_said = heard
    run_crew(tmp_path, jobs, CONFIG, crew, seen=seen)
    assert {row["worker"] for row in outcome(tmp_path)[1]} == {0, 2}
    assert [note for note in seen.notes if note.startswith("worker 1") and "given up" in note]


def test_waiting_batches_go_to_a_worker_that_has_nothing(tmp_path: Path) -> None:
    """Two workers, of which one waits at its first batch: the other takes all the rest."""
    release = threading.Event()

    def make_engine(worker: int, _: ThreadCrew) -> FakeEngine:
        engine = FakeEngine()
        if worker == 0:
            engine.on_step = partial(_wait_for, release)
        return engine

    jobs = [make_job(f"j{i}") for i in range(15)]
    crew, seen = ThreadCrew(2, CONFIG, jobs, make_engine), Recorder()

    def finished(_: Batch, attempts: Sequence[Attempt]) -> None:
        seen.finished += attempts
        if len(seen.finished) == 12:
            release.set()

    seen.batch_finished = finished
    run_crew(tmp_path, jobs, CONFIG, crew, seen=seen)
    rows = outcome(tmp_path)[1]
    assert sum(row["worker"] == 0 for row in rows) == 3


class Crossing(ThreadCrew):
    """Has what worker 0 says of its second assignment cross the question for it."""

    held: list[News]

    def said(self, worker: int, life: int, news: News) -> None:
        self.held = getattr(self, "held", [])
        if worker == 0 and isinstance(news, Prepared) and news.number == 3:
            self.held.append(news)
        else:
            super().said(worker, life, news)

    def tell(self, worker: int, order: Order) -> None:
        if isinstance(order, GiveBack):
            (prepared,) = self.held
            super().said(worker, 1, prepared)
        super().tell(worker, order)


def test_a_batch_that_is_asked_back_while_it_is_prepared_is_run_by_one_worker(
    tmp_path: Path,
) -> None:
    release = threading.Event()

    def make_engine(worker: int, _: ThreadCrew) -> FakeEngine:
        engine = FakeEngine()
        if worker == 0:
            engine.on_step = partial(_wait_for, release)
        return engine

    jobs = [make_job(f"j{i}") for i in range(9)]
    crew = Crossing(2, CONFIG, jobs, make_engine)

    def heard(worker: int, news: News) -> None:
        if worker == 1 and isinstance(news, Ended) and news.number == 3:
            release.set()

    crew.on_said = heard
    run_crew(tmp_path, jobs, CONFIG, crew)
    given = [(order.number, worker) for worker, order in crew.orders if isinstance(order, Run)]
    assert sorted(given) == [(1, 0), (2, 1), (3, 1)]


@pytest.mark.slow
def test_a_thousand_workers_start_and_drain(tmp_path: Path) -> None:
    meter = run_scaled(tmp_path, 1500, 1000, batch=1, side=32)
    rows = pq.read_table(tmp_path / "log.parquet", columns=["job_id", "worker"]).to_pylist()
    assert len({row["job_id"] for row in rows}) == len(rows) == 1500
    assert len({row["worker"] for row in rows}) == 1000
    assert meter.notes == []


class OtherDevice(FakeEngine):
    """Computes on a device of another name."""

    @property
    def info(self) -> EngineInfo:
        return replace(super().info, device="another GPU")


def test_devices_that_differ_are_named(tmp_path: Path) -> None:
    jobs = [make_job("a")]
    crew = ThreadCrew(2, CONFIG, jobs, lambda worker, _: (FakeEngine, OtherDevice)[worker]())
    seen = Recorder()
    run_crew(tmp_path, jobs, CONFIG, crew, seen=seen)
    assert seen.notes == [
        "the workers have different devices (another GPU, cpu): an image may differ in the last "
        "bits with the worker that draws it"
    ]


def test_settings_that_no_worker_can_use_are_the_user_s_to_fix(tmp_path: Path) -> None:
    def make_engine(_worker: int, _crew: ThreadCrew) -> FakeEngine:
        raise ConfigError("vram_budget: expected at least 13 GiB")

    jobs = [make_job("a")]
    with pytest.raises(ConfigError, match="vram_budget: expected at least 13 GiB"):
        run_crew(tmp_path, jobs, CONFIG, ThreadCrew(2, CONFIG, jobs, make_engine))
