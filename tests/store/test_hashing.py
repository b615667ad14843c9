"""Perceptual hashes that are added to rows which have none."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from sensebatch.errors import RunFolderError
from sensebatch.store import log
from sensebatch.store.hashing import add_hashes
from sensebatch.store.log import read_log
from sensebatch.store.run_dir import RunDir
from sensebatch.tasks import Task
from tests.executor.fakes import make_job, run_folder

pytestmark = pytest.mark.slow


def hashes(root: Path) -> list[list[str] | None]:
    return read_log(root / "log.parquet")["image_phash"].to_pylist()


def without_hashes(root: Path) -> None:
    """Makes the rows of a folder what earlier versions wrote."""
    with closing(sqlite3.connect(root / "state.db")) as db:
        for seq, text in db.execute("SELECT seq, row FROM attempts").fetchall():
            row = json.loads(text)
            del row["image_phash"]
            db.execute("UPDATE attempts SET row = ? WHERE seq = ?", (json.dumps(row), seq))
        db.execute("DELETE FROM meta WHERE name LIKE 'log%'")
        db.commit()


def test_hashes_of_files_are_those_of_the_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "PART_ROWS", 2)
    jobs = [make_job("a"), make_job("b"), make_job("fails", prompt="fails")]
    run_folder(tmp_path, [*jobs, make_job("story", Task.INTERLEAVE, prompt="grows")])
    expected = hashes(tmp_path)
    without_hashes(tmp_path)
    seen: list[tuple[int, int]] = []
    found = add_hashes(tmp_path, lambda done, total: seen.append((done, total)))
    assert (found.jobs, found.wrong, seen) == (3, (), [(3, 3)])
    # A failed attempt of today has none either, but says so.
    assert [own or [] for own in hashes(tmp_path)] == expected
    assert add_hashes(tmp_path).jobs == 0


def test_image_that_is_not_as_it_was_made_is_left_out(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job("a"), make_job("b"), make_job("c")])
    without_hashes(tmp_path)
    Image.new("RGB", (64, 32)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "b.png").unlink()
    found = add_hashes(tmp_path)
    assert (found.jobs, found.wrong) == (1, ("a", "b"))
    assert [bool(own) for own in hashes(tmp_path)] == [False, False, True]


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job("a")])
    with RunDir(tmp_path).locked(), pytest.raises(RunFolderError, match="in use"):
        add_hashes(tmp_path)
