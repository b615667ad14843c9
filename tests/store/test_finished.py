"""The jobs of a run that are done, read from outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from sensebatch.errors import RunFolderError
from sensebatch.jobs import Job
from sensebatch.store.finished import finished_jobs
from sensebatch.tasks import Task
from tests.executor.fakes import FakeEngine, make_job, run_folder


def _ids(root: Path) -> list[str]:
    return [finished.job.id for finished in finished_jobs(root)]


def test_finished_jobs_come_in_manifest_order_with_what_they_made(tmp_path: Path) -> None:
    jobs = [make_job("z", think=True), make_job("fails", prompt="fails"), make_job("a")]
    jobs.append(make_job("story", Task.INTERLEAVE, prompt="grows"))
    run_folder(tmp_path, jobs)
    found = {finished.job.id: finished for finished in finished_jobs(tmp_path)}
    assert list(found) == ["z", "a", "story"]
    assert found["z"].job == jobs[0]
    assert found["z"].image_files == (tmp_path / "images" / "z.png",)
    assert [image.size for image in found["z"].open_images()] == [(64, 32)]
    assert (found["z"].read_text() or "").startswith("thinking in ")
    assert found["a"].read_text() is None
    assert len(found["story"].open_images()) == 4
    assert found["a"].row["job_id"] == "a"
    assert found["a"].row["key"] == found["a"].key


def test_jobs_that_are_no_longer_in_the_manifest_are_left_out(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job("a"), make_job("b")])
    run_folder(tmp_path, [make_job("b")])
    assert _ids(tmp_path) == ["b"]


def test_job_done_again_after_a_change_has_the_row_of_its_files(tmp_path: Path) -> None:
    for seed in (1, 2):
        run_folder(tmp_path, [make_job("a", seed=seed)])
    (finished,) = finished_jobs(tmp_path)
    assert (finished.row["seed"], finished.row["attempt"]) == (2, 2)


def test_former_definition_that_failed_in_between_is_finished(tmp_path: Path) -> None:
    good, bad = make_job("a"), make_job("a", prompt="fails")
    for jobs in ([good], [bad], [good]):
        run_folder(tmp_path, jobs)
    (finished,) = finished_jobs(tmp_path)
    assert (finished.job.prompt, finished.row["status"]) == (good.prompt, "done")


def test_finished_jobs_are_readable_during_the_run(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    engine = FakeEngine(on_step=lambda: seen.append(_ids(tmp_path)))
    jobs: list[Job] = [make_job(f"t{i}") for i in range(6)]
    run_folder(tmp_path, jobs, engine=engine)
    assert seen[-1][:2] == ["t0", "t1"]
    assert _ids(tmp_path) == [job.id for job in jobs]


def test_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="found no state"):
        next(finished_jobs(tmp_path))
