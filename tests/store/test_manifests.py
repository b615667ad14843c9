"""A folder knows its manifests: another one is refused, and an unchanged one is not read again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sensebatch.errors import RunFolderError
from sensebatch.jobs import InputImage, Job, ModelIdentity
from sensebatch.manifest.read import read_manifest
from sensebatch.store.ingest import Changes
from sensebatch.store.manifests import ManifestFiles
from sensebatch.store.store import open_store
from sensebatch.tasks import Task
from tests.executor.fakes import IDENTITY, Flag, make_config, make_job, run_folder, run_store

JOBS = [make_job(f"j{i}") for i in range(3)]


class Manifest:
    """Gives jobs, and counts how often it was read."""

    def __init__(self, path: Path, jobs: Sequence[Job] = JOBS) -> None:
        self.path = path
        self.jobs = jobs
        self.num_readings = 0
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text("rows")

    def __iter__(self) -> Iterator[Job]:
        self.num_readings += 1
        return iter(self.jobs)

    def files(self, settings: str = "", *, is_other: bool = False) -> ManifestFiles:
        return ManifestFiles(paths=(self.path,), settings=settings, is_other=is_other)


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trusts the times of files that were just made."""
    monkeypatch.setattr("sensebatch.store.manifests._SETTLED_S", -60.0)


def ingest(
    root: Path,
    manifest: Manifest,
    settings: str = "",
    *,
    is_other: bool = False,
    identity: ModelIdentity = IDENTITY,
) -> Changes:
    with open_store(root) as store:
        files = manifest.files(settings, is_other=is_other)
        return store.ingest(manifest, identity, files=files)


def finish(root: Path, manifest: Manifest) -> None:
    """Runs all jobs of a manifest."""
    with open_store(root) as store:
        store.ingest(manifest, IDENTITY, files=manifest.files())
    run_folder(root, manifest.jobs)
    ingest(root, manifest)
    manifest.num_readings = 0


def test_unchanged_manifest_is_not_read_again(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path / "m.yaml")
    finish(tmp_path / "run", manifest)
    changes = ingest(tmp_path / "run", manifest)
    assert manifest.num_readings == 0
    assert changes == Changes(
        jobs=3, added=0, changed=0, removed=0, unread=0, restored=0, returned=0
    )


def test_missing_files_are_noticed_without_reading_the_manifest(tmp_path: Path) -> None:
    manifest, root = Manifest(tmp_path / "m.yaml"), tmp_path / "run"
    finish(root, manifest)
    (root / "images/j1.png").unlink()
    assert ingest(root, manifest).restored == 1
    assert manifest.num_readings == 0
    ran = run_folder(root, JOBS)
    assert ran.engine.batches == [("j1",)]


def test_everything_that_may_change_a_job_has_the_manifest_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "in.png"
    image.write_bytes(b"first")
    given = InputImage(path=str(image), sha256="0" * 64, height=32, width=32)
    manifest = Manifest(tmp_path / "m.yaml", [make_job("e", Task.EDIT, images=(given,))])
    root = tmp_path / "run"
    finish(root, manifest)

    def is_read(settings: str = "", identity: ModelIdentity = IDENTITY) -> bool:
        before = manifest.num_readings
        ingest(root, manifest, settings, identity=identity)
        return manifest.num_readings > before

    assert not is_read()
    manifest.path.write_text("more rows")
    assert is_read()
    assert not is_read()
    image.write_bytes(b"other")
    assert is_read()
    assert not is_read()
    # The same size and times as before: the entry of the file is another.
    copy = tmp_path / "copy"
    shutil.copy2(image, copy)
    copy.replace(image)
    assert is_read()
    assert is_read("other settings")
    assert is_read("other settings", replace(IDENTITY, dtype="float16"))
    assert is_read()
    assert not is_read()
    monkeypatch.chdir(tmp_path)
    assert is_read()
    image.unlink()
    assert is_read()


def test_image_that_comes_to_be_found_before_another_has_the_manifest_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = Path("m/edits.yaml")
    (manifest.parent / "m").mkdir(parents=True)
    row = "{id: a, task: edit, prompt: a, image: m/in.png, width: 32, height: 32}"
    manifest.write_text(f"version: 1\njobs:\n  - {row}\n", encoding="utf-8")
    Image.new("RGB", (32, 32), "red").save("m/in.png")
    num_readings = 0

    def num_read() -> int:
        def jobs() -> Iterator[Job]:
            nonlocal num_readings
            num_readings += 1
            yield from read_manifest(manifest, make_config())

        with open_store(tmp_path / "run") as store:
            files = ManifestFiles(paths=(manifest,), settings="")
            store.ingest(jobs(), IDENTITY, files=files)
        return num_readings

    assert [num_read(), num_read()] == [1, 1]
    Image.new("RGB", (32, 32), "blue").save("m/m/in.png")
    assert [num_read(), num_read()] == [2, 2]


def test_file_that_may_change_again_within_its_timestamp_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sensebatch.store.manifests._SETTLED_S", 60.0)
    manifest = Manifest(tmp_path / "m.yaml")
    for _ in range(2):
        ingest(tmp_path / "run", manifest)
    assert manifest.num_readings == 2


def test_reading_that_fails_is_not_remembered(tmp_path: Path) -> None:
    manifest, root = Manifest(tmp_path / "m.yaml"), tmp_path / "run"
    finish(root, manifest)
    manifest.path.write_text("a mistake")
    manifest.jobs = [JOBS[0], JOBS[0]]
    for _ in range(2):
        with pytest.raises(Exception, match="expected an id of its own"):
            ingest(root, manifest)
    assert manifest.num_readings == 2


def test_jobs_of_another_source_are_read_again_after_them(tmp_path: Path) -> None:
    manifest, root = Manifest(tmp_path / "m.yaml"), tmp_path / "run"
    finish(root, manifest)
    run_folder(root, JOBS[:1])
    assert ingest(root, manifest).jobs == 3
    assert manifest.num_readings == 1


OTHERS = [make_job(f"other{i}") for i in range(3)]
REPLACING = [replace(job, seed=8) for job in JOBS]


@pytest.mark.parametrize("jobs", [OTHERS, REPLACING, [JOBS[0], *REPLACING[1:]]])
def test_another_manifest_is_refused_with_the_way_out(tmp_path: Path, jobs: list[Job]) -> None:
    mon, tue = Manifest(tmp_path / "mon/m.yaml"), Manifest(tmp_path / "tue/m.yaml", jobs)
    root = tmp_path / "run"
    finish(root, mon)
    with pytest.raises(RunFolderError) as caught:
        ingest(root, tue)
    assert str(caught.value) == (
        f"{root}: belongs to {mon.path}, found another manifest, {tue.path}; give it an "
        "--output-dir of its own, or say --other-manifest to have its jobs in this folder as well"
    )
    assert ingest(root, mon).jobs == 3
    ingest(root, tue, is_other=True)
    for manifest in (mon, tue, mon):
        assert ingest(root, manifest).jobs == 3


@pytest.mark.parametrize("jobs", [OTHERS, REPLACING])
def test_manifest_that_is_edited_in_place_is_the_same(tmp_path: Path, jobs: list[Job]) -> None:
    manifest, root = Manifest(tmp_path / "m.yaml"), tmp_path / "run"
    finish(root, manifest)
    manifest.jobs = jobs
    manifest.path.write_text("other rows")
    assert ingest(root, manifest).jobs == 3


def test_manifest_that_is_moved_renamed_or_copied_is_the_same(tmp_path: Path) -> None:
    manifest, root = Manifest(tmp_path / "m.yaml"), tmp_path / "run"
    finish(root, manifest)
    copy = Manifest(tmp_path / "elsewhere/n.yaml")
    assert ingest(root, copy).jobs == 3
    manifest.path.unlink()
    copy.path.unlink()
    # Renamed, and edited at the same time.
    renamed = Manifest(tmp_path / "renamed.yaml", [JOBS[0], *REPLACING[1:]])
    assert ingest(root, renamed).changed == 2
    back = Manifest(tmp_path / "m.yaml", OTHERS)
    with pytest.raises(RunFolderError, match="belongs to"):
        ingest(root, back)


def test_folder_that_is_moved_with_its_manifest_is_its_own(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    finish(project / "outputs/run", Manifest(project / "m.yaml"))
    shutil.copytree(project, tmp_path / "copy")
    edited = Manifest(tmp_path / "copy/m.yaml", OTHERS)
    assert ingest(tmp_path / "copy/outputs/run", edited).jobs == 3


def test_folder_that_made_nothing_takes_any_manifest(tmp_path: Path) -> None:
    ingest(tmp_path / "run", Manifest(tmp_path / "mon/m.yaml"))
    assert ingest(tmp_path / "run", Manifest(tmp_path / "tue/m.yaml", OTHERS)).jobs == 3


def test_folder_of_an_earlier_version_takes_the_first_manifest(tmp_path: Path) -> None:
    run_folder(tmp_path / "run", JOBS)
    manifest = Manifest(tmp_path / "m.yaml", OTHERS)
    assert ingest(tmp_path / "run", manifest).removed == 3
    with pytest.raises(RunFolderError, match="belongs to"):
        ingest(tmp_path / "run", Manifest(tmp_path / "n.yaml", REPLACING))


def test_stopped_reading_leaves_the_folder_to_its_manifest(tmp_path: Path) -> None:
    manifest, root = Manifest(tmp_path / "m.yaml"), tmp_path / "run"
    with open_store(root) as store:
        store.ingest(manifest, IDENTITY, files=manifest.files())
        run_store(store, JOBS, stop=Flag(after=1))
    assert ingest(root, manifest).jobs == 3
