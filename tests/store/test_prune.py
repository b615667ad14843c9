"""What is removed of jobs that are no longer in the manifests, and what never is."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from sensebatch.dataset.records import open_dataset
from sensebatch.dataset.selection import Selection
from sensebatch.errors import RunFolderError
from sensebatch.jobs import InputImage, Job, Source
from sensebatch.store import store as store_module
from sensebatch.store.log import read_log
from sensebatch.store.manifests import ManifestFiles
from sensebatch.store.prune import prunable, prune
from sensebatch.store.repair import repair
from sensebatch.store.run_dir import RunDir
from sensebatch.store.store import open_store
from sensebatch.tasks import Task
from tests.executor.fakes import IDENTITY, make_job, run_folder

pytestmark = pytest.mark.slow


def files(root: Path) -> set[str]:
    return {
        path.relative_to(root).as_posix()
        for folder in ("images", "text", "errors")
        for path in (root / folder).rglob("*")
        if path.is_file()
    }


JOBS = [
    make_job("a"),
    make_job("b", think=True),
    make_job("story", Task.INTERLEAVE, prompt="grows"),
    make_job("fails", prompt="fails"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of which b, the story and the failure were removed from the manifest."""
    root = tmp_path / "run"
    run_folder(root, JOBS)
    run_folder(root, [JOBS[0]])
    return root


def paths(root: Path) -> list[str]:
    return [file.path for file in prunable(root).files]


STORY = [f"images/story/00{index}.png" for index in range(4)]


def test_files_of_removed_jobs_are_listed_and_then_removed(folder: Path) -> None:
    before = files(folder)
    expected = {"images/b.png", "text/b.txt", *STORY, "text/story.txt"}
    assert set(paths(folder)) == expected
    assert files(folder) == before
    assert {file.path for file in prune(folder).files} == expected
    assert files(folder) == before - expected
    assert not (folder / "images" / "story").exists()
    assert prunable(folder).files == prune(folder).files == ()
    log = read_log(folder / "log.parquet")
    assert log.num_rows == len(JOBS)
    assert dict(zip(log["job_id"].to_pylist(), log["current"].to_pylist(), strict=True)) == {
        "a": True,
        "b": False,
        "story": False,
        "fails": True,
    }


def test_pruned_job_that_returns_is_drawn_again(folder: Path) -> None:
    content = (folder / "images" / "b.png").read_bytes()
    prune(folder)
    assert run_folder(folder, JOBS).summary.done == 2
    assert (folder / "images" / "b.png").exists()
    assert content
    with open_dataset(folder) as dataset:
        statuses = [record.status for record in dataset.records()]
    assert statuses == ["done", "done", "done", "failed"]


def test_file_that_was_changed_since_stays(folder: Path) -> None:
    mine = folder / "images" / "b.png"
    mine.write_bytes(b"painted over by hand")
    found = prune(folder)
    assert found.changed == ("images/b.png",)
    assert mine.read_bytes() == b"painted over by hand"
    assert not (folder / "text" / "b.txt").exists()


def test_file_that_another_job_has_stays(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job("story", Task.INTERLEAVE, prompt="grows")])
    run_folder(tmp_path, [make_job("story/000")])
    assert (tmp_path / STORY[0]).exists()
    assert STORY[0] not in paths(tmp_path)
    prune(tmp_path)
    assert files(tmp_path) == {STORY[0]}


def test_image_that_another_job_starts_from_stays(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job("a"), make_job("b")])
    digest = hashlib.sha256((tmp_path / "images" / "a.png").read_bytes()).hexdigest()
    start = InputImage(path="elsewhere/images/a.png", sha256=digest, height=32, width=64)
    with open_store(tmp_path) as store:
        store.ingest([make_job("edit", Task.EDIT, images=(start,))], IDENTITY)
    found = prune(tmp_path)
    assert ([file.path for file in found.files], found.inputs) == (
        ["images/b.png"],
        ("images/a.png",),
    )
    assert files(tmp_path) == {"images/a.png"}


def test_jobs_beyond_a_limit_are_not_removed_ones(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job("a"), make_job("b")])
    with open_store(tmp_path) as store:
        store.ingest([make_job("a")], IDENTITY, limit=1)
    assert prunable(tmp_path).numbers == ()


def test_jobs_of_a_manifest_that_was_not_read_stay(tmp_path: Path) -> None:
    root, first, second = tmp_path / "run", tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.touch()
    second.touch()

    def read(manifest: Path, *jobs: Job) -> None:
        with open_store(root) as store:
            known = ManifestFiles(paths=(manifest,), settings="", is_other=True)
            store.ingest(jobs, IDENTITY, files=known)

    def job(job_id: str, manifest: Path) -> Job:
        return make_job(job_id, source=Source(file=str(manifest), row="line 1"))

    run_folder(root, [job("a", first), job("b", first), job("c", second)])
    read(second, job("c", second))
    assert (paths(root), prunable(root).unread) == ([], (str(first),))
    # Once it is read, what it no longer has is removed; and so it is once the manifest is.
    read(first, job("a", first))
    assert (paths(root), prunable(root).unread) == (["images/b.png"], (str(second),))
    second.unlink()
    assert paths(root) == ["images/b.png", "images/c.png"]


def test_kill_between_state_and_files_leaves_nothing_for_long(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: object, names: list[str]) -> None:
        if names:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_module.Store, "remove_stale", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(folder)
    assert "images/b.png" not in paths(folder)
    run_folder(folder, [JOBS[0]])
    assert files(folder) == {"images/a.png", "errors/fails-1.txt"}


def test_folder_in_use_or_without_a_state_is_refused(folder: Path, tmp_path: Path) -> None:
    with RunDir(folder).locked(), pytest.raises(RunFolderError, match="in use"):
        prune(folder)
    empty = tmp_path / "empty"
    for look in (prune, prunable):
        with pytest.raises(RunFolderError, match=r"no state\.db"):
            look(empty)
    assert not empty.exists()


def test_nothing_is_removed_after_a_repair(folder: Path) -> None:
    (folder / "state.db").unlink()
    repair(folder)
    assert prunable(folder).numbers == ()
    with open_dataset(folder) as dataset:
        assert len(list(dataset.records(Selection(statuses=["done"])))) == 3
