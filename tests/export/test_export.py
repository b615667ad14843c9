"""Exports of small folders: what is in them, what is written again, and what stops them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pytest

from sensebatch.dataset.selection import Selection
from sensebatch.errors import ConfigError, ExportError, StorageError, StorageFullError
from sensebatch.export.formats import FORMATS
from sensebatch.export.run import ExportObserver
from sensebatch.export.samples import sample_of
from sensebatch.export.splits import parse_splits
from sensebatch.export.target import Folder
from sensebatch.jobs import InputImage
from sensebatch.store.repair import repair
from sensebatch.tasks import Task
from tests.executor.fakes import make_job, run_folder
from tests.export.folders import (
    expected_columns,
    export_folder,
    grid,
    input_file,
    make_folder,
    mixed_jobs,
    parquet_ids,
    parquet_rows,
    records_of,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with jobs of all tasks."""
    folder = tmp_path_factory.mktemp("mixed")
    return make_folder(folder / "run", mixed_jobs(folder / "inputs"))


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 200 jobs."""
    return make_folder(tmp_path_factory.mktemp("grown") / "run", grid(200))


def snapshot(out: Path) -> dict[str, tuple[int, int]]:
    """Returns what tells a file that was written again from one that was not."""
    stats = {path: path.stat() for path in out.rglob("*") if path.is_file()}
    return {
        path.relative_to(out).as_posix(): (stat.st_ino, stat.st_mtime_ns)
        for path, stat in stats.items()
    }


def rewritten(before: dict[str, Any], out: Path) -> int:
    """Returns the bytes of the files that are not as they were."""
    return sum(
        (out / name).stat().st_size
        for name, stamp in snapshot(out).items()
        if before.get(name) != stamp
    )


def test_every_row_equals_the_log_and_every_image_the_file(mixed: Path, tmp_path: Path) -> None:
    export_folder(mixed, tmp_path / "out")
    rows = {row["id"]: row for row in parquet_rows(tmp_path / "out")}
    records = records_of(mixed)
    assert rows.keys() == records.keys()
    for job_id, record in records.items():
        row = rows[job_id]
        expected = expected_columns(record)
        assert {name: row[name] for name in expected} == expected
        drawn = row.get("image") or row.get("output")
        parts = [part["image"] for part in row.get("parts", []) if part["image"]]
        images = [drawn] if drawn else parts
        assert [image["bytes"] for image in images] == [
            file.read_bytes() for file in record.image_files
        ]
        inputs = [Path(image.path).read_bytes() for image in record.job.images]
        assert [image["bytes"] for image in row.get("input_images", [])] == inputs
        assert row.get("prompt", row.get("instruction")) == record.job.prompt
        if "parts" in row:
            assert "".join(part["text"] or "" for part in row["parts"]) == record.read_text()
        else:
            assert row["text"] == record.read_text()


@pytest.mark.parametrize("name", FORMATS)
def test_same_folder_gives_the_same_bytes(name: str, mixed: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        export_folder(mixed, tmp_path / str(number), format=name)
    left, right = (
        {
            path.relative_to(out).as_posix(): path.read_bytes()
            for path in out.rglob("*")
            if path.is_file()
        }
        for out in (tmp_path / "1", tmp_path / "2")
    )
    assert left == right


@pytest.mark.parametrize("name", FORMATS)
def test_second_export_writes_nothing(name: str, mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = export_folder(mixed, out, format=name)
    before = snapshot(out)
    second = export_folder(mixed, out, format=name)
    assert (second.jobs, second.written_shards) == (first.jobs, 0)
    # Only the export's own record, which says what it is of.
    assert {n for n, stamp in snapshot(out).items() if before[n] != stamp} <= {
        ".sensebatch/export.json"
    }


@pytest.mark.parametrize("name", FORMATS)
def test_set_that_grew_by_one_percent_writes_at_most_three(
    name: str, grown: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(grown, tmp_path / "run"))
    out = tmp_path / "out"
    export_folder(root, out, format=name, shard_bytes=50_000)
    before = snapshot(out)
    total = sum((out / file).stat().st_size for file in before)
    # New jobs in the middle of the manifest, as after a new value of a matrix.
    jobs = grid(200)
    run_folder(root, [*jobs[:100], make_job("new"), make_job("newer"), *jobs[100:]])
    done = export_folder(root, out, format=name, shard_bytes=50_000)
    assert (done.jobs, done.written_shards) == (202, 1)
    # The columns of a file of two rows outweigh such tiny images.
    limit = 0.03 if name != "hf" else 0.08
    assert rewritten(before, out) <= limit * total


def test_growth_of_real_images_is_written_once(tmp_path: Path) -> None:
    from sensebatch.resolutions import Resolution

    size = Resolution(height=256, width=256)
    root = make_folder(tmp_path / "run", grid(100, resolution=size))
    out = tmp_path / "out"
    export_folder(root, out, shard_bytes=5_000_000)
    before = snapshot(out)
    total = sum((out / file).stat().st_size for file in before)
    run_folder(root, [make_job("new", resolution=size), *grid(100, resolution=size)])
    export_folder(root, out, shard_bytes=5_000_000)
    assert rewritten(before, out) <= 0.03 * total
    assert sorted(parquet_ids(out)) == sorted(records_of(root))


def test_image_of_another_job_is_an_input_image(tmp_path: Path) -> None:
    parent = InputImage(path="@a", sha256="", height=32, width=64, output=("a", 0))
    jobs = [make_job("a"), make_job("child", Task.EDIT, images=(parent,), level=1)]
    root = make_folder(tmp_path / "run", jobs)
    export_folder(root, tmp_path / "out")
    rows = {row["id"]: row for row in parquet_rows(tmp_path / "out")}
    assert rows["child"]["input_images"][0]["bytes"] == rows["a"]["image"]["bytes"]
    assert rows["child"]["input_images"][0]["path"] == "input-0.png"


def test_folder_that_was_repaired_is_exported_once_its_manifest_was_read(tmp_path: Path) -> None:
    image = input_file(tmp_path / "inputs", "one.png")
    jobs = [make_job("a"), make_job("edit", Task.EDIT, images=(image,))]
    root = make_folder(tmp_path / "run", jobs)
    for file in root.glob("state.db*"):
        file.unlink()
    repair(root)
    with pytest.raises(ExportError, match="manifests that were read since sensebatch repair"):
        export_folder(root, tmp_path / "out")
    run_folder(root, jobs)
    export_folder(root, tmp_path / "out")
    rows = {row["id"]: row for row in parquet_rows(tmp_path / "out")}
    assert len(rows["edit"]["input_images"]) == 1


def test_answers_without_images_are_written_once(tmp_path: Path) -> None:
    jobs = [make_job(f"ask-{number:03d}", Task.ASK, seed=number) for number in range(50)]
    root = make_folder(tmp_path / "run", jobs)
    export_folder(root, tmp_path / "out", shard_bytes=5_000)
    run_folder(root, [*jobs, make_job("new", Task.ASK)])
    done = export_folder(root, tmp_path / "out", shard_bytes=5_000)
    assert (done.jobs, done.written_shards) == (51, 1)
    assert done.shards > 5
    assert sorted(parquet_ids(tmp_path / "out")) == sorted(records_of(root))


def test_job_that_was_drawn_again_and_one_that_was_removed(grown: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(grown, tmp_path / "run"))
    out = tmp_path / "out"
    export_folder(root, out, shard_bytes=50_000)
    jobs = grid(200)
    jobs[3] = make_job(jobs[3].id, prompt="another prompt")
    del jobs[150]
    run_folder(root, jobs)
    export_folder(root, out, shard_bytes=50_000)
    rows = {row["id"]: row for row in parquet_rows(out)}
    records = records_of(root)
    assert rows.keys() == records.keys()
    for job_id, record in records.items():
        assert rows[job_id]["prompt"] == record.job.prompt
        assert rows[job_id]["image"]["bytes"] == record.image_files[0].read_bytes()


def test_rows_and_shards_that_are_removed_are_counted(grown: Path, tmp_path: Path) -> None:
    root, out = Path(shutil.copytree(grown, tmp_path / "run")), tmp_path / "out"
    first = export_folder(root, out, shard_bytes=50_000)
    assert (first.removed_shards, first.removed_rows) == (0, 0)
    jobs = grid(200)
    jobs[3] = make_job(jobs[3].id, prompt="another prompt")
    del jobs[150]
    run_folder(root, jobs)
    second = export_folder(root, out, shard_bytes=50_000)
    assert (second.removed_shards, second.removed_rows) == (0, 2)
    third = export_folder(
        root, out, selection=Selection(where="seed IN (5, 6)"), shard_bytes=50_000
    )
    assert (third.jobs, third.removed_rows) == (2, 199 - 2)
    assert third.removed_shards == second.shards - third.shards > 0


def test_row_that_moves_to_another_split_or_shard_is_not_removed(
    mixed: Path, tmp_path: Path
) -> None:
    first = export_folder(mixed, tmp_path)
    done = export_folder(mixed, tmp_path, splits=parse_splits("a=0.5,b=0.5"))
    assert (done.removed_shards, done.removed_rows) == (first.shards, 0)


def test_subsets_that_are_no_longer_chosen_are_counted_as_removed(
    mixed: Path, tmp_path: Path
) -> None:
    first = export_folder(mixed, tmp_path)
    done = export_folder(mixed, tmp_path, selection=Selection(tasks=[Task.EDIT]))
    assert (done.jobs, done.written_shards) == (2, 0)
    assert (done.removed_shards, done.removed_rows) == (first.shards - 1, first.jobs - 2)
    assert {path.parent.name for path in tmp_path.glob("*/*.parquet")} == {"edit"}


class _KilledError(BaseException):
    """Stands for a kill: nothing catches it."""


class _Killer(ExportObserver):
    def __init__(self, at: int) -> None:
        self.left = at

    def wrote(self, num_images: int) -> None:
        self.left -= num_images
        if self.left < 0:
            raise _KilledError


@pytest.mark.parametrize(
    ("name", "at"),
    [("hf", 0), ("hf", 60), ("hf", 199), ("imagefolder", 60), ("webdataset", 60)],
)
def test_export_that_was_interrupted_continues(
    name: str, at: int, grown: Path, tmp_path: Path
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    with pytest.raises(_KilledError):
        export_folder(grown, out, _Killer(at), format=name, shard_bytes=50_000)
    done = export_folder(grown, out, format=name, shard_bytes=50_000)
    export_folder(grown, whole, format=name, shard_bytes=50_000)
    assert done.written_images < 200 or at == 0
    names = {path.relative_to(whole) for path in whole.rglob("*")}
    assert {path.relative_to(out) for path in out.rglob("*")} == names
    for path in names:
        if (whole / path).is_file() and path.name not in ("export.json", "README.md"):
            assert (out / path).read_bytes() == (whole / path).read_bytes()


@pytest.mark.parametrize("name", FORMATS)
def test_what_an_interrupted_export_left_is_removed(name: str, grown: Path, tmp_path: Path) -> None:
    with pytest.raises(_KilledError):
        export_folder(grown, tmp_path, _Killer(60), format=name, shard_bytes=50_000)
    chosen = Selection(where="seed = 150")
    done = export_folder(grown, tmp_path, format=name, selection=chosen)
    assert (done.jobs, done.shards) == (1, 1)
    left = {path.name for path in tmp_path.glob("t2i/*")}
    assert len(left) == 1
    records = {path.stem for path in (tmp_path / ".sensebatch").glob("t2i-*")}
    assert records == {"t2i-train-00000"}
    if name == "imagefolder":
        assert len(list(tmp_path.glob("t2i/*/*"))) == 2


_CHILD = """
import os, signal, sys
from pathlib import Path
from sensebatch.store import files
from tests.export.folders import export_folder
number = 0
replace = os.replace
def replace_or_die(source, target):
    global number
    number += 1
    if number == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_or_die
export_folder(Path(sys.argv[1]), sys.argv[2], shard_bytes=50_000)
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_export_that_was_killed_continues(grown: Path, tmp_path: Path) -> None:
    # In the place of a shard's record, when its file is there, and of a shard's file.
    for moment in (4, 7):
        out = tmp_path / str(moment)
        command = [sys.executable, "-c", _CHILD, str(grown), str(out), str(moment)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        export_folder(grown, out, shard_bytes=50_000)
        assert sorted(parquet_ids(out)) == sorted(records_of(grown))
        assert not list(out.rglob("*.tmp"))


class _DyingFolder(Folder):
    """A folder whose process dies before one of its writes."""

    def __init__(self, root: Path, before: int) -> None:
        super().__init__(root, str(root))
        self._left = before

    @contextmanager
    def write(self, name: str) -> Iterator[BinaryIO]:
        if not self._left:
            raise _KilledError
        self._left -= 1
        with super().write(name) as file:
            yield file


def _contents(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("num_kills", [1, 2, 3])
def test_export_killed_before_any_write_ends_as_one_that_was_not(
    num_kills: int, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles, whole = ("first", "second"), tmp_path / "whole"
    expected = []
    for title in titles:
        export_folder(mixed, whole, title=title)
        expected.append(_contents(whole))
    for before in range(12):
        out, num_killed = tmp_path / str(before), 0
        for title, contents in zip(titles, expected, strict=True):
            with monkeypatch.context() as patched:
                dying = partial(_DyingFolder, out, before)
                patched.setattr("tests.export.folders.open_target", lambda _, dying=dying: dying())
                for _ in range(num_kills):
                    with suppress(_KilledError):
                        export_folder(mixed, out, title=title)
                        break
                    num_killed += 1
            export_folder(mixed, out, title=title)
            assert _contents(out) == contents, (title, before)
    # The last one came through.
    assert num_killed == 0


def test_shard_that_was_damaged_or_removed_is_written_again(grown: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_folder(grown, out, shard_bytes=50_000)
    shards = sorted(out.glob("t2i/*.parquet"))
    before = [shard.read_bytes() for shard in shards]
    shards[0].unlink()
    shards[1].write_bytes(before[1][:-1])
    (out / "t2i" / "notes.txt").write_text("mine")
    done = export_folder(grown, out, shard_bytes=50_000)
    # The two, and the last one if it is small enough to take their rows.
    assert 2 <= done.written_shards <= 3
    assert sorted(parquet_ids(out)) == sorted(records_of(grown))
    assert (out / "t2i" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", FORMATS)
def test_export_to_a_url(name: str, mixed: Path, tmp_path: Path) -> None:
    url = f"memory://exports/{name}"
    export_folder(mixed, tmp_path / "out", format=name)
    export_folder(mixed, url, format=name)
    fs = fsspec.filesystem("memory")
    assert export_folder(mixed, url, format=name).written_shards == 0
    found = {
        path.removeprefix(f"/exports/{name}/"): fs.cat_file(path)
        for path in fs.find(f"/exports/{name}")
    }
    assert found == {
        path.relative_to(tmp_path / "out").as_posix(): path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file() and path.name != "lock"
    }


def test_file_url_is_a_folder(mixed: Path, tmp_path: Path) -> None:
    export_folder(mixed, f"file://{tmp_path}/out")
    assert sorted(parquet_ids(tmp_path / "out")) == sorted(records_of(mixed))


def test_splits_keep_seeds_of_a_prompt_together_and_rows_where_they_are(
    grown: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_folder(grown, out, splits=parse_splits("train=0.7,test=0.3"))
    by_prompt: dict[str, set[str]] = {}
    for shard in out.glob("t2i/*.parquet"):
        import pyarrow.parquet as pq

        for row in pq.read_table(shard, columns=["prompt"]).to_pylist():
            by_prompt.setdefault(row["prompt"], set()).add(shard.name.partition("-")[0])
    assert len(by_prompt) == 50
    assert all(len(splits) == 1 for splits in by_prompt.values())
    assert {"train"} in by_prompt.values()
    assert {"test"} in by_prompt.values()


def test_split_that_nothing_falls_into_is_named(mixed: Path, tmp_path: Path) -> None:
    done = export_folder(mixed, tmp_path, splits=parse_splits("train=0.9999999,rare=0.0000001"))
    assert done.empty_splits == ["rare"]


def test_missing_files_are_named_before_anything_is_written(grown: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(grown, tmp_path / "run"))
    for number in range(8):
        (root / f"images/image-{number:04d}.png").unlink()
    with pytest.raises(ExportError, match="found 8 jobs that lack some") as caught:
        export_folder(root, tmp_path / "out")
    assert "images/image-0000.png" in str(caught.value)
    assert "3 more" in str(caught.value)
    assert not (tmp_path / "out").exists()
    done = export_folder(root, tmp_path / "out", skip_missing=True)
    assert (done.jobs, len(done.skipped)) == (192, 8)


def test_image_that_was_changed_is_not_exported(grown: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(grown, tmp_path / "run"))
    file = root / "images/image-0005.png"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ExportError, match=r"job image-0005: images/image-0005\.png: expected"):
        export_folder(root, tmp_path / "out")
    done = export_folder(root, tmp_path / "out", skip_missing=True)
    assert (done.jobs, len(done.skipped)) == (199, 1)
    assert "image-0005" not in parquet_ids(tmp_path / "out")


@pytest.mark.parametrize("job_id", ["thinks", "edit-two", "question", "story"])
def test_text_that_was_changed_is_not_exported(job_id: str, mixed: Path, tmp_path: Path) -> None:
    root, out = Path(shutil.copytree(mixed, tmp_path / "run")), tmp_path / "out"
    file = root / f"text/{job_id}.txt"
    file.write_text(file.read_text() + "and more")
    problem = rf"job {job_id}: text/{job_id}\.txt: expected the file that the run wrote, found"
    with pytest.raises(ExportError, match=rf"{problem} other bytes\nsensebatch status --verify"):
        export_folder(root, out)
    assert not out.exists()
    done = export_folder(root, out, skip_missing=True)
    assert done.skipped == [
        f"job {job_id}: text/{job_id}.txt: expected the file that the run wrote, found other bytes"
    ]
    assert {*parquet_ids(out), job_id} == records_of(root).keys()
    assert job_id not in parquet_ids(out)


def test_text_that_is_changed_after_an_export_leaves_the_set(mixed: Path, tmp_path: Path) -> None:
    root, out = Path(shutil.copytree(mixed, tmp_path / "run")), tmp_path / "out"
    export_folder(root, out)
    before = snapshot(out)
    (root / "text/story.txt").write_text("Once.")
    with pytest.raises(ExportError, match=r"job story: text/story\.txt: expected the file"):
        export_folder(root, out)
    assert snapshot(out) == before
    export_folder(root, out, skip_missing=True)
    assert {*parquet_ids(out), "story"} == records_of(root).keys()
    assert "story" not in parquet_ids(out)


def test_missing_files_are_named_before_a_text_that_was_changed(
    mixed: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(mixed, tmp_path / "run"))
    (root / "text/thinks.txt").write_text("Once.")
    (root / "text/story.txt").unlink()
    with pytest.raises(ExportError, match=r"found 1 job that lacks some:\n  job story: text"):
        export_folder(root, tmp_path / "out")
    done = export_folder(root, tmp_path / "out", skip_missing=True)
    assert [text.partition(":")[0] for text in done.skipped] == ["job story", "job thinks"]


def test_text_is_exported_as_it_was_written_line_ends_included(mixed: Path, tmp_path: Path) -> None:
    text = "One.\r\nTwo."
    (tmp_path / "text").mkdir()
    (tmp_path / "text/thinks.txt").write_bytes(text.encode())
    record = records_of(mixed)["thinks"]
    for sha256 in (hashlib.sha256(text.encode()).hexdigest(), None):
        row = {**json.loads(record.row_text or ""), "text_sha256": sha256}
        there = replace(record, root=tmp_path, row_text=json.dumps(row))
        assert sample_of(there).values["text"] == text


def test_input_image_that_was_changed_is_not_exported(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "run", mixed_jobs(tmp_path / "inputs"))
    (tmp_path / "inputs/two.PNG").write_bytes(b"another image")
    with pytest.raises(ExportError, match="job edit-two: expected the input image"):
        export_folder(root, tmp_path / "out")


def test_folder_without_a_job_that_is_done_has_nothing_to_export(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "run", [make_job("fails", prompt="fails")])
    with pytest.raises(ExportError, match="expected jobs that are done, found 1 that is not"):
        export_folder(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_into_something_else_is_refused(grown: Path, mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ConfigError, match=r"expected an empty folder .* found 'thesis.txt'"):
        export_folder(grown, out)
    (out / "thesis.txt").unlink()
    (out / ".gitattributes").write_text("a new repository has one")
    export_folder(grown, out)
    with pytest.raises(ConfigError, match="expected an export of format webdataset, found one of"):
        export_folder(grown, out, format="webdataset")
    with pytest.raises(ConfigError, match="expected an export of run"):
        export_folder(mixed, out)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="expected a folder, found a file"):
        export_folder(grown, tmp_path / "file")


def test_two_exports_to_one_folder_at_a_time_are_refused(grown: Path, tmp_path: Path) -> None:
    class Other(ExportObserver):
        def planned(self, num_images: int) -> None:
            assert num_images == 200
            with pytest.raises(ConfigError, match="in use by another export"):
                export_folder(grown, tmp_path)

    export_folder(grown, tmp_path, Other())


def test_place_that_cannot_be_used_is_one_error(grown: Path) -> None:
    with pytest.raises(ConfigError, match="nosuch://x: cannot be used: "):
        export_folder(grown, "nosuch://x")
    with pytest.raises(ConfigError, match="OUT: expected a folder or a URL"):
        export_folder(grown, " ")


def test_place_that_needs_a_package_names_the_extra(
    grown: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"pip install 'sensebatch\[s3\]'"):
        export_folder(grown, "s3://bucket/set")


def test_bucket_that_cannot_be_reached_is_one_error(
    grown: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Could not connect to the endpoint")

    monkeypatch.setattr(MemoryFileSystem, "find", unreachable)
    with pytest.raises(ConfigError, match="memory://b: cannot be used: Could not connect"):
        export_folder(grown, "memory://b")


def test_bucket_that_is_lost_on_the_way_can_be_continued_with(
    grown: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    def lost(*_: Any, **__: Any) -> None:
        raise ConnectionError("Connection reset by peer")

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, "_open", lost)
        with pytest.raises(StorageError, match="peer; run the same command again"):
            export_folder(grown, "memory://lost")
    assert export_folder(grown, "memory://lost").written_images == 200


def test_full_disk_stops_an_export_that_continues_afterwards(
    grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    fsync, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 10:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageFullError, match="no room left on the disk"):
            export_folder(grown, out, shard_bytes=50_000)
    done = export_folder(grown, out, shard_bytes=50_000)
    assert done.written_images < 200
    assert sorted(parquet_ids(out)) == sorted(records_of(grown))


def test_card_that_a_person_changed_is_left_alone(grown: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(grown, tmp_path / "run"))
    out = tmp_path / "out"
    export_folder(root, out, title="Ships")
    run_folder(root, [*grid(200), make_job("new")])
    assert export_folder(root, out, title="Ships").card == "written"
    assert "| t2i | train | 201 |" in (out / "README.md").read_text()
    (out / "README.md").write_text("# My own words\n")
    assert export_folder(root, out, title="Boats").card == "outdated"
    assert (out / "README.md").read_text() == "# My own words\n"


def test_card_that_a_person_changed_keeps_up_with_subsets_and_splits(
    mixed: Path, tmp_path: Path
) -> None:
    card = tmp_path / "README.md"
    export_folder(mixed, tmp_path, selection=Selection(tasks=[Task.EDIT]))
    edited = card.read_text().replace("pretty_name: run", "pretty_name: Mine  # really")
    card.write_text(edited + "\nMy own words.\n")
    kept = card.read_text()
    assert export_folder(mixed, tmp_path, selection=Selection(tasks=[Task.EDIT])).card == "kept"
    assert card.read_text() == kept
    splits = parse_splits("train=0.5,test=0.5")
    assert export_folder(mixed, tmp_path, splits=splits).card == "updated"
    changed = card.read_text()
    assert "path: ask/train-*.parquet" in changed or "path: ask/test-*.parquet" in changed
    head, found, body = changed.partition("configs:\n")
    assert (head, found) == kept.partition("configs:\n")[:2]
    assert body.partition("---\n")[1:] == kept.partition("configs:\n")[2].partition("---\n")[1:]
    assert export_folder(mixed, tmp_path, splits=splits).card == "kept"
    # Back again, and the card is as the person left it.
    assert export_folder(mixed, tmp_path, selection=Selection(tasks=[Task.EDIT])).card == "updated"
    assert card.read_text() == kept


def test_card_that_is_no_text_is_left_alone(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_folder(mixed, tmp_path / "out")
    (tmp_path / "out/README.md").write_bytes(b"---\n\xff\n---\n")
    assert export_folder(mixed, tmp_path / "out").card == "outdated"
    assert (tmp_path / "out/README.md").read_bytes() == b"---\n\xff\n---\n"


def test_record_of_a_shard_that_is_damaged_costs_that_shard_alone(
    grown: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_folder(grown, out, shard_bytes=50_000)
    records = sorted((out / ".sensebatch").glob("t2i-*.json"))
    records[0].write_text("{")
    records[1].write_text(json.dumps({"task": "t2i"}))
    done = export_folder(grown, out, shard_bytes=50_000)
    # The two, and the last one if it is small enough to take their rows.
    assert 2 <= done.written_shards <= 3
    assert sorted(parquet_ids(out)) == sorted(records_of(grown))
