from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sensebatch.config import ExecutionConfig, OutputConfig
from sensebatch.errors import StorageError, StorageFullError
from sensebatch.jobs import Job, JobResult
from sensebatch.resolutions import Resolution
from sensebatch.store.images import read_metadata
from sensebatch.store.kept import KeptImages
from sensebatch.store.log import read_log
from sensebatch.store.store import open_store
from sensebatch.tasks import Task
from tests.executor.fakes import (
    FakeEngine,
    Flag,
    make_config,
    make_input,
    make_job,
    mixed_jobs,
    outcome,
    run_folder,
    run_store,
)


def rows(root: Path) -> list[dict[str, Any]]:
    return pq.read_table(root / "log.parquet").to_pylist()


def test_every_job_ends_as_a_file_and_a_row(tmp_path: Path) -> None:
    ran = run_folder(tmp_path, [make_job("a"), make_job("b"), make_job("c", think=True)])
    assert (ran.summary.done, ran.summary.failed, ran.summary.images) == (3, 0, 3)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        "a.png",
        "b.png",
        "c.png",
    ]
    assert (tmp_path / "text/c.txt").read_text().startswith("thinking in ")
    assert [row["status"] for row in rows(tmp_path)] == ["done"] * 3


def test_resume_skips_completed_jobs(tmp_path: Path) -> None:
    jobs = [make_job(f"j{i}") for i in range(5)]
    run_folder(tmp_path, jobs)
    before = outcome(tmp_path)
    ran = run_folder(tmp_path, jobs)
    assert ran.engine.batches == []
    assert ran.summary.done == 0
    assert outcome(tmp_path) == before


def test_stop_finishes_the_current_batch_and_the_rest_is_resumed(tmp_path: Path) -> None:
    jobs = [make_job(f"j{i}") for i in range(5)]
    ran = run_folder(tmp_path / "a", jobs, stop=Flag(after=1))
    assert ran.summary.stopped
    assert ran.engine.batches == [("j0", "j1")]
    assert (ran.summary.counts.done, ran.summary.counts.remaining) == (2, 3)
    assert not run_folder(tmp_path / "a", jobs).summary.stopped
    run_folder(tmp_path / "b", jobs)
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def test_one_bad_job_is_one_failed_row_with_its_traceback(tmp_path: Path) -> None:
    ran = run_folder(tmp_path, mixed_jobs())
    failed = {row["job_id"]: row for row in rows(tmp_path) if row["status"] == "failed"}
    assert set(failed) == {"fails", "poison", "edit1"}
    assert failed["fails"]["error_type"] == "ValueError"
    assert failed["fails"]["error_message"] == "NaN in the output"
    assert failed["edit1"]["error_type"] == "JobError"
    assert failed["edit1"]["batch_id"] is None
    assert failed["poison"]["batch_size"] == 1
    assert "RuntimeError: poisoned" in (tmp_path / failed["poison"]["error_file"]).read_text()
    assert ran.summary.failed == 3
    assert ran.summary.done == len(mixed_jobs()) - 3


def test_unreadable_input_leaves_the_rest_of_its_batch_together(tmp_path: Path) -> None:
    jobs = [
        make_job(f"e{i}", Task.EDIT, images=(make_input("missing" if i == 1 else f"in{i}"),))
        for i in range(4)
    ]
    ran = run_folder(tmp_path, jobs, make_config(max_batch_size=3))
    assert ran.engine.batches == [("e0", "e2"), ("e3",)]


def test_batch_that_raises_is_taken_apart_to_find_the_bad_job(tmp_path: Path) -> None:
    jobs = [make_job("a"), make_job("bad", prompt="poison"), make_job("c")]
    ran = run_folder(tmp_path, jobs, make_config(max_batch_size=3))
    assert ran.engine.batches == [("a", "bad", "c"), ("a",), ("bad",), ("c",)]
    assert ran.seen.notes == ["batch of 3 jobs failed (RuntimeError): run as 3 batches"]


def test_out_of_memory_halves_the_batch_until_single_jobs_fit(tmp_path: Path) -> None:
    jobs = [make_job(f"j{i}", prompt="heavy", seed=i) for i in range(4)]
    ran = run_folder(tmp_path, jobs, make_config(max_batch_size=4))
    assert ran.engine.batches == [
        ("j0", "j1", "j2", "j3"),
        ("j0", "j1"),
        ("j2", "j3"),
        ("j0",),
        ("j1",),
        ("j2",),
        ("j3",),
    ]
    assert ran.seen.splits == [("j0", "j1", "j2", "j3"), ("j0", "j1"), ("j2", "j3")]
    assert ran.summary.done == 4
    assert len(rows(tmp_path)) == 4


def test_failed_job_is_tried_again_alone_until_max_attempts(tmp_path: Path) -> None:
    jobs = [make_job("bad", prompt="fails"), make_job("good")]
    config = make_config(execution=ExecutionConfig(max_attempts=3))
    ran = run_folder(tmp_path, jobs, config)
    assert ran.engine.batches == [("bad", "good"), ("bad",), ("bad",)]
    assert ran.seen.failures == [("bad", True), ("bad", True), ("bad", False)]
    attempts = [row["attempt"] for row in rows(tmp_path) if row["job_id"] == "bad"]
    assert attempts == [1, 2, 3]
    assert (ran.summary.done, ran.summary.failed) == (1, 1)


def test_failed_jobs_are_left_alone_unless_retry_failed(tmp_path: Path) -> None:
    jobs = [make_job("bad", prompt="fails"), make_job("good")]
    run_folder(tmp_path, jobs)
    assert run_folder(tmp_path, jobs).engine.batches == []
    again = run_folder(
        tmp_path, jobs, make_config(execution=ExecutionConfig(retry_failed=True, max_attempts=2))
    )
    assert again.engine.batches == [("bad",), ("bad",)]
    assert [row["attempt"] for row in rows(tmp_path) if row["job_id"] == "bad"] == [1, 2, 3]


def test_max_failures_stops_the_run(tmp_path: Path) -> None:
    jobs = [make_job(f"j{i}", prompt="fails", seed=i) for i in range(8)]
    config = make_config(max_batch_size=1, execution=ExecutionConfig(max_failures=2))
    ran = run_folder(tmp_path, jobs, config)
    assert ran.summary.too_many_failures
    assert not ran.summary.stopped
    assert 2 <= ran.summary.failed <= 3
    assert ran.summary.counts.remaining == 8 - ran.summary.failed


def test_changed_job_runs_again_and_its_stale_images_are_removed(tmp_path: Path) -> None:
    jobs = [make_job(f"s{i}", Task.INTERLEAVE) for i in range(8)]
    run_folder(tmp_path, jobs, make_config(max_batch_size=8))
    changed = [replace(job, sampling=replace(job.sampling, max_images=1)) for job in jobs]
    ran = run_folder(tmp_path, changed, make_config(max_batch_size=8))
    assert ran.changes.changed == 8
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("images/*/*"))
    assert left == [f"images/s{i}/000.png" for i in range(8)]


def test_removed_job_keeps_its_files(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job("a"), make_job("b")])
    ran = run_folder(tmp_path, [make_job("b")])
    assert ran.changes.removed == 1
    assert ran.summary.counts.removed == 1
    assert (tmp_path / "images/a.png").exists()


def test_done_job_whose_image_is_missing_runs_again(tmp_path: Path) -> None:
    jobs = [make_job("a"), make_job("b")]
    run_folder(tmp_path, jobs)
    (tmp_path / "images/b.png").unlink()
    ran = run_folder(tmp_path, jobs)
    assert ran.changes.restored == 1
    assert ran.engine.batches == [("b",)]
    assert (tmp_path / "images/b.png").exists()


def test_full_disk_stops_the_run_and_it_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = mixed_jobs()
    real = os.replace
    written = 0

    def replace_until_full(source: Path, target: Path) -> None:
        nonlocal written
        written += "images" in str(target)
        if written > 4:
            raise OSError(28, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_until_full)
        with pytest.raises(StorageFullError, match="no room left"):
            run_folder(tmp_path / "a", jobs)
    assert not list((tmp_path / "a").rglob("*.tmp"))
    run_folder(tmp_path / "a", jobs)
    run_folder(tmp_path / "b", jobs)
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def test_folder_that_is_moved_under_a_run_stops_it_and_it_can_be_resumed(tmp_path: Path) -> None:
    jobs, root, elsewhere = [make_job("a"), make_job("b")], tmp_path / "run", tmp_path / "moved"

    def move() -> None:
        root.rename(elsewhere)

    with pytest.raises(StorageError, match="moved, removed or unmounted"):
        run_folder(root, jobs, engine=FakeEngine(move))
    assert not root.exists()
    elsewhere.rename(root)
    run_folder(root, jobs)
    run_folder(tmp_path / "whole", jobs)
    assert outcome(root) == outcome(tmp_path / "whole")


def test_lock_that_is_removed_under_a_run_stops_it_before_it_removes_files(tmp_path: Path) -> None:
    jobs, root = [make_job("a"), make_job("b")], tmp_path / "run"

    others: list[Any] = []

    def begin_another() -> None:
        (root / ".lock").unlink(missing_ok=True)
        if not others:
            run_folder(root, jobs)
            others.append(outcome(root))

    with pytest.raises(StorageError, match=r"\.lock: expected the lock of this run"):
        run_folder(root, jobs, engine=FakeEngine(begin_another))
    assert others == [outcome(root)]
    run_folder(root, jobs)
    run_folder(tmp_path / "whole", jobs)
    assert outcome(root) == outcome(tmp_path / "whole")


def test_inputs_that_vanish_with_the_folder_fail_no_job(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "run", tmp_path / "moved"
    jobs = [make_job(f"e{i}", Task.EDIT, images=(make_input("missing"),)) for i in range(3)]
    with open_store(root) as store:
        root.rename(elsewhere)
        with pytest.raises(StorageError, match="moved, removed or unmounted"):
            run_store(store, jobs)
        assert store.state.counts().failed == 0
    assert not root.exists()


def test_image_of_the_wrong_size_fails_its_job(tmp_path: Path) -> None:
    class Wrong(FakeEngine):
        def generate(self, batch: Any, prepared: Any, **rest: Any) -> Any:
            result = super().generate(batch, prepared, **rest)
            first = result.results[0]
            assert isinstance(first, JobResult)
            small = replace(first, images=(np.zeros((8, 8, 3), np.uint8),))
            return replace(result, results=(small, *result.results[1:]))

    ran = run_folder(tmp_path, [make_job("a"), make_job("b")], engine=Wrong())
    assert (ran.summary.done, ran.summary.failed) == (1, 1)
    assert "expected an image of 64x32" in rows(tmp_path)[0]["error_message"]


def test_missing_result_fails_the_jobs_and_not_the_run(tmp_path: Path) -> None:
    class Short(FakeEngine):
        def generate(self, batch: Any, prepared: Any, **rest: Any) -> Any:
            return replace(super().generate(batch, prepared, **rest), results=())

    ran = run_folder(tmp_path, [make_job("a"), make_job("b")], engine=Short())
    assert ran.summary.failed == 2


def test_display_that_fails_does_not_fail_a_job(tmp_path: Path) -> None:
    from sensebatch.executor.run import execute
    from sensebatch.executor.worker import EngineWorker
    from sensebatch.store.store import open_store
    from tests.executor.fakes import IDENTITY, Recorder, read_input

    class Broken(Recorder):
        def progress(self, _):  # type: ignore[no-untyped-def]
            raise OSError("the terminal was closed")

    with open_store(tmp_path) as store:
        store.state.ingest([make_job("a")], IDENTITY, tmp_path)
        summary = execute(
            store=store,
            worker=EngineWorker(FakeEngine()),
            config=make_config(),
            read_image=read_input,
            observer=Broken(),
            stop=Flag(),
        )
    assert (summary.done, summary.failed) == (1, 0)


def interrupted_batch_of_four(folder: Path) -> list[Job]:
    """Returns the jobs of a folder whose only batch was begun and not finished."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    jobs = [make_job(f"j{i}") for i in range(4)]
    with pytest.raises(KeyboardInterrupt):
        run_folder(folder, jobs, make_config(max_batch_size=4), engine=FakeEngine(interrupt))
    return jobs


def test_interrupted_batch_larger_than_the_new_size_is_planned_again(tmp_path: Path) -> None:
    jobs = interrupted_batch_of_four(tmp_path)
    assert run_folder(tmp_path, jobs, stop=Flag(after=0)).seen.notes == [
        "batch of 4 jobs is planned again"
    ]
    ran = run_folder(tmp_path, jobs, make_config(max_batch_size=2))
    assert ran.engine.batches == [("j0", "j1"), ("j2", "j3")]


def test_batches_are_as_large_as_the_engine_has_memory_for(tmp_path: Path) -> None:
    small = Resolution(height=64, width=64)
    jobs = [make_job(f"j{i}") for i in range(4)]
    jobs += [replace(make_job(f"s{i}"), resolution=small) for i in range(3)]
    tokens = jobs[0].resolution.image_tokens
    assert tokens != small.image_tokens
    ran = run_folder(
        tmp_path, jobs, make_config(max_batch_size=4), engine=FakeEngine(fitting={tokens: 2})
    )
    assert ran.engine.batches == [("j0", "j1"), ("j2", "j3"), ("s0", "s1", "s2")]


def test_interrupted_batch_that_no_longer_fits_is_planned_again(tmp_path: Path) -> None:
    jobs = interrupted_batch_of_four(tmp_path)
    engine = FakeEngine(fitting={jobs[0].resolution.image_tokens: 3})
    ran = run_folder(tmp_path, jobs, make_config(max_batch_size=4), engine=engine)
    assert ran.seen.notes == ["batch of 4 jobs is planned again"]
    assert ran.engine.batches == [("j0", "j1", "j2"), ("j3",)]


def test_images_of_a_split_batch_are_not_drawn_again(tmp_path: Path) -> None:
    calls = 0

    class Grows(FakeEngine):
        def _step(self, channel) -> None:  # type: ignore[no-untyped-def]
            from sensebatch.errors import OutOfMemoryError

            nonlocal calls
            calls += 1
            if calls == 2:
                raise OutOfMemoryError("grew")
            super()._step(channel)

    jobs = [make_job(f"s{i}", Task.INTERLEAVE) for i in range(2)]
    run_folder(tmp_path / "a", jobs, engine=Grows())
    run_folder(tmp_path / "b", jobs)
    for job in ("s0", "s1"):
        first = (tmp_path / f"a/images/{job}/000.png").read_bytes()
        assert first == (tmp_path / f"b/images/{job}/000.png").read_bytes()
    assert not list((tmp_path / "a/checkpoints").iterdir())


def test_images_left_by_a_kill_after_the_last_commit_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    jobs = [make_job("story", Task.INTERLEAVE)]
    with monkeypatch.context() as patch:
        patch.setattr(KeptImages, "discard", end)
        with pytest.raises(KeyboardInterrupt):
            run_folder(tmp_path, jobs)
    assert list((tmp_path / "checkpoints").iterdir())
    assert run_folder(tmp_path, jobs).engine.batches == []
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_job_that_does_not_fit_alone_goes_on_with_less_memory(tmp_path: Path) -> None:
    jobs = [make_job("a"), make_job("b", prompt="huge"), make_job("c")]
    ran = run_folder(tmp_path, jobs)
    assert ran.summary.done == 3
    assert [note for note in ran.seen.notes if "memory" in note] == [
        "memory ran out: fast",
        "memory ran out: low",
    ]
    modes = {row["job_id"]: row["vram_mode"] for row in rows(tmp_path)}
    assert modes == {"a": "full", "b": "low", "c": "low"}


def test_a_job_that_fits_nowhere_fails_and_the_others_go_on(tmp_path: Path) -> None:
    jobs = [make_job("a", prompt="huge"), make_job("b")]
    ran = run_folder(tmp_path, jobs, engine=FakeEngine(modes=["full"]))
    assert (ran.summary.done, ran.summary.failed) == (1, 1)


@pytest.mark.parametrize(
    ("image_format", "quality", "name"),
    [("png", 95, "a.png"), ("webp", 100, "a.webp"), ("jpeg", 95, "a.jpg")],
)
def test_prompt_seed_and_settings_are_in_the_image(
    tmp_path: Path, image_format: str, quality: int, name: str
) -> None:
    output = OutputConfig(image_format=image_format, image_quality=quality)
    job = make_job("a", prompt="ein Öltank, 石油", resolution=Resolution(height=32, width=32))
    run_folder(tmp_path, [job], make_config(output=output))
    with Image.open(tmp_path / "images" / name) as image:
        found = read_metadata(image)
    assert found is not None
    assert (found["prompt"], found["seed"]) == (job.prompt, job.seed)
    assert found["sampling"]["num_steps"] == job.sampling.num_steps


def test_truncated_job_is_done_and_says_so(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job("a"), make_job("b", prompt="cut")])
    log = read_log(tmp_path / "log.parquet").to_pylist()
    assert [row["finish_reason"] for row in log] == ["complete", "token_limit"]
    assert [row["status"] for row in log] == ["done", "done"]


def test_truncated_job_fails_once_for_all_if_the_run_says_so(tmp_path: Path) -> None:
    execution = ExecutionConfig(fail_truncated=True, max_attempts=3)
    jobs = [make_job("a"), make_job("b", prompt="cut", think=True), make_job("c")]
    ran = run_folder(tmp_path, jobs, make_config(execution=execution))
    assert (ran.summary.done, ran.summary.failed) == (2, 1)
    assert ran.seen.failures == [("b", False)]
    (row,) = (r for r in read_log(tmp_path / "log.parquet").to_pylist() if r["job_id"] == "b")
    assert (row["status"], row["error_type"]) == ("failed", "TruncatedError")
    assert (row["finish_reason"], row["think_tokens"]) == ("token_limit", 10)
    limit = jobs[1].sampling.max_think_tokens
    assert f"found one cut at max_think_tokens ({limit})" in row["error_message"]
    assert not (tmp_path / "images" / "b.png").exists()
    assert (tmp_path / row["error_file"]).read_text().startswith("sensebatch.errors.TruncatedError")
    assert run_folder(tmp_path, jobs).engine.batches == []
