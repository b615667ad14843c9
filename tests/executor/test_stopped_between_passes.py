"""A stop is heeded between two passes of a batch; the same jobs then continue from there."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sensebatch.config import ExecutionConfig
from sensebatch.store.status import read_status
from sensebatch.tasks import Task
from tests.executor.fakes import FakeEngine, make_config, make_job, mixed_jobs, outcome, run_folder

pytestmark = pytest.mark.slow

PATIENCE_S = 60.0
CONFIG = make_config(max_batch_size=3)
JOBS = [make_job(f"j{i}") for i in range(7)]
STORIES = [make_job("story", Task.INTERLEAVE, prompt="grows to its last image")]


def stopped_at(step: int, a_pass: int | None = 1) -> tuple[FakeEngine, threading.Event]:
    """Returns an engine that is asked to stop in one of its steps, and what asks it."""
    stop = threading.Event()
    engine = FakeEngine(a_pass=a_pass)

    def count() -> None:
        if engine.steps == step:
            stop.set()

    engine.on_step = count
    return engine, stop


def kept(root: Path) -> list[str]:
    """Returns the files of checkpoints."""
    return [path.name for path in sorted((root / "checkpoints").glob("*/*"))]


def logged(root: Path) -> list[str]:
    return pq.read_table(root / "log.parquet").column("job_id").to_pylist()


def test_a_stop_keeps_the_finished_passes_and_the_batch_continues_after_them(
    tmp_path: Path,
) -> None:
    engine, stop = stopped_at(5)
    ran = run_folder(tmp_path / "a", JOBS, CONFIG, engine=engine, stop=stop)
    assert ran.summary.stopped
    assert (ran.summary.done, ran.summary.failed, ran.summary.images) == (3, 0, 3)
    assert (ran.summary.counts.started, ran.summary.counts.pending) == (3, 1)
    assert engine.drawn == [("j0",), ("j1",), ("j2",), ("j3",), ("j4",)]
    # Neither an attempt nor a row, no failure, no split and nothing less of the memory.
    assert logged(tmp_path / "a") == ["j0", "j1", "j2"]
    assert [attempt.job_id for attempt in ran.seen.finished] == ["j0", "j1", "j2"]
    assert (ran.seen.failures, ran.seen.notes, engine.modes[0]) == ([], [], "full")
    assert kept(tmp_path / "a") == ["0000.safetensors", "0001.safetensors"]
    resumed = run_folder(tmp_path / "a", JOBS, CONFIG, engine=FakeEngine(a_pass=1))
    assert resumed.engine.batches == [("j3", "j4", "j5"), ("j6",)]
    assert resumed.engine.drawn == [("j5",), ("j6",)]
    assert (resumed.summary.done, resumed.summary.stopped) == (4, False)
    run_folder(tmp_path / "b", JOBS, CONFIG, engine=FakeEngine(a_pass=1))
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    assert kept(tmp_path / "a") == []


def test_no_speed_is_measured_by_a_batch_with_kept_images(tmp_path: Path) -> None:
    engine, stop = stopped_at(5)
    run_folder(tmp_path, JOBS, CONFIG, engine=engine, stop=stop)
    run_folder(tmp_path, JOBS, CONFIG, engine=FakeEngine(a_pass=1))
    rows = pq.read_table(tmp_path / "log.parquet").to_pylist()
    assert [row["num_kept_images"] for row in rows] == [0, 0, 0, 2, 2, 2, 0]
    assert [row["image_tok_per_s"] is None for row in rows] == [False] * 3 + [True] * 3 + [False]


def test_a_batch_that_is_still_being_written_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, stop = stopped_at(4)
    replace = os.replace

    def late(source: Path, target: Path) -> None:
        if "images" in str(target):
            assert stop.wait(PATIENCE_S)
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    ran = run_folder(tmp_path, JOBS, CONFIG, engine=engine, stop=stop)
    assert (ran.summary.done, ran.summary.counts.started) == (3, 3)
    assert logged(tmp_path) == ["j0", "j1", "j2"]
    assert kept(tmp_path) == ["0000.safetensors"]


@pytest.mark.parametrize(("step", "a_pass"), [(3, 1), (1, None)])
def test_a_batch_with_no_pass_to_follow_is_committed(
    tmp_path: Path, step: int, a_pass: int | None
) -> None:
    engine, stop = stopped_at(step, a_pass)
    ran = run_folder(tmp_path, JOBS, CONFIG, engine=engine, stop=stop)
    assert ran.summary.stopped
    assert (ran.summary.done, ran.summary.counts.started) == (3, 0)
    assert kept(tmp_path) == []


def test_a_stop_in_the_last_pass_of_a_run_is_a_finished_run(tmp_path: Path) -> None:
    engine, stop = stopped_at(7)
    ran = run_folder(tmp_path, JOBS, CONFIG, engine=engine, stop=stop)
    assert (ran.summary.done, ran.summary.stopped) == (7, False)


def test_interleave_jobs_are_stopped_between_rounds(tmp_path: Path) -> None:
    """One job, which makes room and is tried again where it fails, but not where it stops."""
    engine, stop = stopped_at(2)
    ran = run_folder(tmp_path / "a", STORIES, CONFIG, engine=engine, stop=stop)
    assert (ran.summary.stopped, ran.summary.counts.started) == (True, 1)
    assert engine.batches == [("story",)]
    assert engine.modes[0] == "full"
    assert kept(tmp_path / "a") == ["0000.safetensors"]
    assert run_folder(tmp_path / "a", STORIES, CONFIG).summary.done == 1
    run_folder(tmp_path / "b", STORIES, CONFIG)
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def test_stopped_at_every_single_step_and_resumed_equals_uninterrupted(
    tmp_path: Path,
) -> None:
    config = make_config(max_batch_size=3, execution=ExecutionConfig(max_attempts=2))
    jobs = [*JOBS[:4], make_job("bad", prompt="fails"), *STORIES]
    whole = run_folder(tmp_path / "whole", jobs, config, engine=FakeEngine(a_pass=1))
    expected = outcome(tmp_path / "whole")
    for step in range(1, whole.engine.steps):
        root = tmp_path / str(step)
        engine, stop = stopped_at(step)
        assert run_folder(root, jobs, config, engine=engine, stop=stop).summary.stopped
        run_folder(root, jobs, config, engine=FakeEngine(a_pass=1))
        assert outcome(root) == expected
        assert kept(root) == []
    assert whole.engine.steps > 10


def test_stopped_again_and_again_equals_uninterrupted(tmp_path: Path) -> None:
    """Jobs that fail in every way there is among them; two steps at a time."""
    config = make_config(max_batch_size=3, execution=ExecutionConfig(max_attempts=2))
    stops, stopped = -1, True
    while stopped:
        engine, stop = stopped_at(2)
        ran = run_folder(tmp_path / "a", mixed_jobs(), config, engine=engine, stop=stop)
        stops, stopped = stops + 1, ran.summary.stopped
    assert stops > 10
    run_folder(tmp_path / "b", mixed_jobs(), config, engine=FakeEngine(a_pass=1))
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    assert kept(tmp_path / "a") == []


def test_images_of_a_job_that_is_done_are_not_counted_as_kept(tmp_path: Path) -> None:
    jobs = [make_job(f"s{i}", Task.INTERLEAVE, prompt="grows", seed=i) for i in range(2)]
    # The batch is split after two images of each; the first job alone draws two more.
    engine, stop = stopped_at(8)
    ran = run_folder(tmp_path, jobs, engine=engine, stop=stop)
    assert engine.batches == [("s0", "s1"), ("s0",), ("s1",)]
    assert (ran.summary.counts.done, ran.summary.counts.started) == (1, 1)
    assert read_status(tmp_path).kept_images == 3
