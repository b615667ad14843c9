"""Files of a batch that was killed before its commit do not outlive its definition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sensebatch.config import OutputConfig
from sensebatch.jobs import Job
from sensebatch.store.state import State
from sensebatch.tasks import Task
from tests.executor.fakes import make_config, make_job, run_folder

JOBS = [
    make_job("a", think=True),
    make_job("b"),
    make_job("story", Task.INTERLEAVE, prompt="grows"),
]


class Killed(BaseException):
    """Stands for the end of the process."""


def killed(root: Path, jobs: list[Job], *, after: int = 0, image_format: str = "png") -> None:
    """Runs jobs until the files of a batch are in place and its row is not."""
    real, left = State.commit, after

    def commit(self: State, *args: object, **options: object) -> list[str]:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return real(self, *args, **options)  # type: ignore[arg-type]

    config = make_config(output=OutputConfig(image_format=image_format))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(State, "commit", commit)
        with pytest.raises(Killed):
            run_folder(root, jobs, config)


def made(root: Path) -> list[str]:
    return sorted(
        path.relative_to(root).as_posix()
        for folder in ("images", "text")
        for path in (root / folder).rglob("*")
    )


def test_files_of_jobs_that_changed_or_were_removed_are_removed_at_the_start(
    tmp_path: Path,
) -> None:
    killed(tmp_path, JOBS[:2], image_format="webp")
    assert "images/a.webp" in made(tmp_path)
    (tmp_path / "text/.a.txt.tmp").write_text("unfinished")
    run_folder(tmp_path, [make_job("a", seed=9)])
    assert made(tmp_path) == ["images/a.png"]


def test_images_of_a_story_that_gets_shorter_are_removed_with_their_folder(tmp_path: Path) -> None:
    killed(tmp_path, JOBS[2:])
    assert "images/story/003.png" in made(tmp_path)
    run_folder(tmp_path, [make_job("b")])
    assert made(tmp_path) == ["images/b.png"]


def test_files_that_are_the_users_or_of_another_job_stay(tmp_path: Path) -> None:
    run_folder(tmp_path, JOBS[:1])
    (tmp_path / "images/a.webp").write_bytes(b"the user's")
    (tmp_path / "images/story").mkdir()
    (tmp_path / "images/story/notes.png").write_bytes(b"the user's")
    changed = [replace(JOBS[0], seed=8), JOBS[2]]
    killed(tmp_path, changed, after=1)
    run_folder(tmp_path, [make_job("b")])
    assert made(tmp_path) == [
        "images/a.png",
        "images/a.webp",
        "images/b.png",
        "images/story",
        "images/story/notes.png",
        "text/a.txt",
    ]


def test_batch_that_still_runs_keeps_its_files_until_they_are_replaced(tmp_path: Path) -> None:
    killed(tmp_path, JOBS)
    ran = run_folder(tmp_path, JOBS)
    assert ran.summary.counts.done == 3
    assert "images/a.png" in made(tmp_path)


def test_batch_that_continues_in_another_format_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    killed(tmp_path, JOBS, image_format="webp")
    assert "images/a.webp" in made(tmp_path)
    ran = run_folder(tmp_path, JOBS)
    assert ran.summary.counts.done == 3
    assert not [name for name in made(tmp_path) if name.endswith(".webp")]


def test_file_that_a_row_of_the_log_names_stays(tmp_path: Path) -> None:
    run_folder(tmp_path, JOBS[1:2])
    killed(tmp_path, [replace(JOBS[1], seed=8)])
    run_folder(tmp_path, [make_job("c")])
    assert made(tmp_path) == ["images/b.png", "images/c.png"]
