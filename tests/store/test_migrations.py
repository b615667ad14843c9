"""Folders of earlier versions continue where they were, and newer ones are refused by name.

`folders/format_1` holds two runs of `m/jobs.yaml` with the embedded checkpoint, made by version
0.1.0 when the tables of state.db had their first form: one that is finished, and one that was
stopped between two images of its interleave batch, with a job that had failed for want of its
input image.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sensebatch import loading
from sensebatch.checkpoint.fingerprint import model_identity
from sensebatch.cli.main import main
from sensebatch.errors import RunFolderError, StorageFullError
from sensebatch.jobs import ModelIdentity
from sensebatch.store import migrations
from sensebatch.store.database import Database
from sensebatch.store.log import SCHEMA, read_log
from sensebatch.store.state import State
from sensebatch.store.status import read_status
from sensebatch.store.store import open_store

FOLDERS = Path(__file__).parent / "folders" / "format_1"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a copy of the folders, from which their manifest has the path it had.

    The embedded checkpoint, which was trained again since, passes for the one of then.
    """
    shutil.copytree(FOLDERS, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (then,) = set(read_log(tmp_path / "done" / "log.parquet")["checkpoint"].to_pylist())

    def identity_of_then(*args: Any, **options: Any) -> ModelIdentity:
        return replace(model_identity(*args, **options), checkpoint=then)

    monkeypatch.setattr(loading, "model_identity", identity_of_then)
    return tmp_path


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes this program one whose tables have a further column."""
    step = "ALTER TABLE batches ADD COLUMN later INTEGER NOT NULL DEFAULT 7;"
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "STEPS", (*migrations.STEPS, step))
        yield


def command(*args: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    return ended.value.code if isinstance(ended.value.code, int) else 0


def files_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for folder in ("images", "text")
        for path in sorted((root / folder).rglob("*"))
        if path.is_file()
    }


NULLABLE = {field.name for field in SCHEMA if field.nullable}


def old_rows(root: Path, columns: list[str]) -> list[dict[str, Any]]:
    return pq.read_table(root / "log.parquet", columns=columns).to_pylist()


def test_finished_folder_of_the_first_format_draws_nothing_again(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folders / "done"
    columns = pq.read_schema(root / "log.parquet").names
    before, rows = files_of(root), old_rows(root, columns)
    (root / "log.parquet").unlink()
    assert command("run", "m/jobs.yaml", "--output-dir", root) == 0
    assert "nothing was left to run" in capsys.readouterr().err
    assert files_of(root) == before
    assert old_rows(root, columns) == rows
    assert command("report", root, "--json") == 0
    assert json.loads(capsys.readouterr().out)["total"]["images"] == len(rows) + 4


def test_columns_of_the_first_format_keep_their_types_and_later_ones_may_be_null() -> None:
    found = pq.read_schema(FOLDERS / "done" / "log.parquet")
    assert [SCHEMA.field(name).type for name in found.names] == found.types
    assert {field.name for field in found if field.nullable} <= NULLABLE
    assert all(field.nullable for field in SCHEMA if field.name not in found.names)


def test_interrupted_folder_of_the_first_format_continues_where_it_was(folders: Path) -> None:
    root = folders / "interrupted"
    columns = pq.read_schema(root / "log.parquet").names
    before, rows = files_of(root), old_rows(root, columns)
    status = read_status(root)
    assert (status.counts.done, status.counts.failed, status.counts.started) == (4, 1, 2)
    assert status.kept_images == 2
    assert command("run", "m/jobs.yaml", "--output-dir", root, "--retry-failed") == 0
    after = files_of(root)
    assert {name: after[name] for name in before} == before
    assert old_rows(root, columns)[: len(rows)] == rows
    new = read_log(root / "log.parquet").to_pylist()[len(rows) :]
    # The derived id of the edit is now one of its image's bytes; it is the same job all the same.
    assert sorted((row["job_id"], row["attempt"]) for row in new) == [
        ("edit-4b58378b21e59ba7", 2),
        ("stories-seed=1", 1),
        ("stories-seed=2", 1),
    ]
    # How many kept images are taken depends on the words, and so on the checkpoint.
    assert all(row["num_kept_images"] in (0, 2) for row in new if row["task"] == "interleave")
    assert not list((root / "checkpoints").iterdir())


@pytest.mark.usefixtures("later")
def test_older_state_is_brought_to_todays_tables_and_kept_as_it_was(folders: Path) -> None:
    path = folders / "interrupted" / "state.db"
    with open_store(path.parent) as store:
        assert store.state.counts().done == 4
        assert len(store.state.started_batches()) == 1
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT later FROM batches").fetchall() == [(7,)]
        attempts = db.execute("SELECT * FROM attempts").fetchall()
    with closing(sqlite3.connect(f"{path}.format-1")) as old:
        assert old.execute("PRAGMA user_version").fetchone() == (1,)
        assert old.execute("SELECT * FROM attempts").fetchall() == attempts
    made = path.with_name("state.db.format-1").stat().st_mtime_ns
    with open_store(path.parent):
        assert path.with_name("state.db.format-1").stat().st_mtime_ns == made


@pytest.mark.usefixtures("later")
def test_older_state_is_read_without_being_changed(folders: Path) -> None:
    root = folders / "interrupted"
    before = (root / "state.db").read_bytes()
    assert read_status(root).counts.done == 4
    with closing(Database(root / "state.db", read_only=True)) as opened, opened.reading() as db:
        assert db.execute("SELECT later FROM batches").fetchall() == [(7,)]
    assert (root / "state.db").read_bytes() == before
    assert not (root / "state.db.format-1").exists()


def test_step_that_fails_leaves_the_state_as_it_was(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folders / "done" / "state.db"
    steps = ("CREATE TABLE more (x);", "ALTER TABLE nowhere ADD COLUMN y;")
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "STEPS", (*migrations.STEPS, *steps))
        with pytest.raises(RunFolderError, match="nowhere"):
            State(path)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'more'").fetchone()
    with open_store(path.parent) as store:
        assert store.state.counts().done == 7


@pytest.mark.usefixtures("later")
def test_state_is_not_changed_where_there_is_no_room_for_the_copy(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    path = folders / "done" / "state.db"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageFullError, match="no room left"):
            State(path)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)


def test_state_of_a_newer_version_is_refused_by_name(folders: Path) -> None:
    path = folders / "done" / "state.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    for read_only in (False, True):
        with pytest.raises(RunFolderError, match=r"made by a newer sensebatch \(state format 99"):
            State(path, read_only=read_only)


def test_rows_of_the_first_format_are_marked(folders: Path) -> None:
    root = folders / "interrupted"
    assert command("run", "m/jobs.yaml", "--output-dir", root, "--retry-failed") == 0
    log = read_log(root / "log.parquet", ["job_id", "status", "current", "in_manifest"])
    rows = log.to_pylist()
    assert [row["job_id"] for row in rows if not row["current"]] == ["edit-1649a193d96b009c"]
    # The row of the derived id that the edit had then is one of the same job.
    assert {row["in_manifest"] for row in rows} == {True}
    assert len([row for row in rows if row["status"] == "failed"]) == 1


def test_current_row_is_the_last_of_the_jobs_key_and_status() -> None:
    rows = [
        ("done", "k", "failed"),
        ("done", "k", "done"),
        ("done", "other", "done"),
        ("failed", "k", "done"),
        ("failed", "k", "failed"),
        ("edited", "other", "done"),
        ("pending", "k", "failed"),
    ]
    before = migrations.STEPS.index(migrations._CURRENT)
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        db.executescript("".join(migrations.STEPS[:before]))
        for job_id, key, status in rows:
            text = json.dumps({"key": key, "status": status})
            db.execute("INSERT INTO attempts (job_id, row) VALUES (?, ?)", (job_id, text))
        for job_id in ("done", "failed", "edited", "pending"):
            status = "pending" if job_id == "edited" else job_id
            values = (job_id, job_id, 0, 1, 1, "k", 0, 1, 0, 0, "{}", status, 1, 1, 0, "[]")
            marks = ", ".join("?" * len(values))
            db.execute(f"INSERT INTO jobs VALUES (NULL, {marks})", values)
        db.executescript("".join(migrations.STEPS[before:]))
        found = dict(db.execute("SELECT id, current FROM jobs"))
    assert found == {"done": 2, "failed": 5, "edited": None, "pending": None}
