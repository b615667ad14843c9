"""A state that was lost is rebuilt from the log and the images, and the run continues."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sensebatch.config import OutputConfig
from sensebatch.errors import RunFolderError
from sensebatch.jobs import Job
from sensebatch.store import log
from sensebatch.store.repair import Repaired, repair
from sensebatch.store.status import read_status
from sensebatch.store.store import open_store
from sensebatch.tasks import Task
from tests.executor.fakes import (
    IDENTITY,
    FakeEngine,
    Flag,
    make_config,
    make_job,
    mixed_jobs,
    outcome,
    run_folder,
)
from tests.store.test_reading import killed

pytestmark = pytest.mark.slow

JOBS = [make_job(f"j{i}") for i in range(5)]


def lose(root: Path) -> None:
    for path in root.glob("state.db*"):
        path.unlink()


def truncate(root: Path) -> None:
    lose(root)
    (root / "state.db").touch()


def scramble(root: Path) -> None:
    for path in root.glob("state.db-*"):
        path.unlink()
    whole = (root / "state.db").read_bytes()
    (root / "state.db").write_bytes(whole[:100] + b"\xff" * 8000 + whole[8100:])


def replace_by_text(root: Path) -> None:
    lose(root)
    (root / "state.db").write_bytes(b"not a database, but long enough to be read as one" * 40)


def cut(root: Path) -> None:
    for path in root.glob("state.db-*"):
        path.unlink()
    os.truncate(root / "state.db", 3000)


LOSSES = [lose, truncate, scramble, replace_by_text, cut]


@pytest.mark.parametrize("loss", LOSSES)
def test_folder_without_a_usable_state_is_refused_with_the_way_out_and_continues_after_it(
    tmp_path: Path, loss: Callable[[Path], None]
) -> None:
    run_folder(tmp_path / "whole", mixed_jobs())
    root = tmp_path / "run"
    run_folder(root, mixed_jobs(), stop=Flag(after=9))
    before = pq.read_table(root / "log.parquet")
    num_done = read_status(root).counts.done
    assert 0 < num_done < 10
    loss(root)
    for look in (read_status, lambda root: run_folder(root, mixed_jobs())):
        with pytest.raises(RunFolderError, match="sensebatch repair "):
            look(root)
    found = repair(root)
    assert (found.rows, found.done, found.to_run) == (before.num_rows, num_done, ())
    assert found.problems[0].startswith("state.db is ")
    assert not re.search(r"/|\\|;|sensebatch", " ".join(found.problems))
    assert pq.read_table(root / "log.parquet").equals(before)
    ran = run_folder(root, mixed_jobs())
    assert len(ran.seen.finished) < len(mixed_jobs())
    assert outcome(root) == outcome(tmp_path / "whole")


@pytest.mark.parametrize("lost", ["all", "half"])
def test_lost_wal_costs_no_image_and_no_composition(tmp_path: Path, lost: str) -> None:
    root = tmp_path / "run"
    killed(root)
    wal = root / "state.db-wal"
    (root / "state.db-shm").unlink()
    if lost == "all":
        wal.unlink()
    else:
        os.truncate(wal, wal.stat().st_size // 2)
    with pytest.raises(RunFolderError, match="sensebatch repair "):
        read_status(root)
    found = repair(root)
    assert (found.done + found.restored, found.to_run) == (2, ())
    ran = run_folder(root, JOBS)
    assert ran.engine.batches == [("j2", "j3"), ("j4",)]
    assert outcome(root)[0] == outcome(tmp_path / "live")[0]


def test_state_that_is_behind_the_log_is_not_continued_with(tmp_path: Path) -> None:
    """The rows that the log alone has would be lost with its next writing."""
    run_folder(tmp_path, JOBS[:2])
    early = (tmp_path / "state.db").read_bytes()
    run_folder(tmp_path, JOBS)
    rows = pq.read_table(tmp_path / "log.parquet")
    (tmp_path / "state.db").write_bytes(early)
    for look in (read_status, lambda root: run_folder(root, JOBS)):
        with pytest.raises(RunFolderError, match=r"lost rows that log\.parquet has; .* repair "):
            look(tmp_path)
    found = repair(tmp_path)
    assert (found.rows, found.done, found.problems) == (5, 5, ())
    assert pq.read_table(tmp_path / "log.parquet").equals(rows)
    assert run_folder(tmp_path, JOBS).engine.batches == []


def test_batch_that_the_log_says_was_committed_is_not_begun_again(tmp_path: Path) -> None:
    root = tmp_path / "run"
    killed(root)
    assert read_status(root).counts.started == 2
    shutil.copyfile(tmp_path / "live/log.parquet", root / "log.parquet")
    shutil.copytree(tmp_path / "live/images", root / "images", dirs_exist_ok=True)
    found = repair(root)
    assert (found.done, found.batches) == (5, 0)


def test_rows_of_the_state_that_the_log_lacks_are_kept(tmp_path: Path) -> None:
    run_folder(tmp_path, JOBS)
    rows = pq.read_table(tmp_path / "log.parquet")
    (tmp_path / "log.parquet").unlink()
    with closing(sqlite3.connect(tmp_path / "state.db")) as db:
        db.execute("DROP TABLE jobs")
    found = repair(tmp_path)
    assert (found.rows, found.done) == (5, 5)
    assert found.problems == ("log.parquet is missing",)
    assert pq.read_table(tmp_path / "log.parquet").equals(rows)


def test_damaged_log_gives_its_parts_and_images_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "PART_ROWS", 2)
    monkeypatch.setattr("sensebatch.store.salvage.PART_ROWS", 2)
    run_folder(tmp_path, JOBS)
    rows = pq.read_table(tmp_path / "log.parquet")
    lose(tmp_path)
    (tmp_path / "log.parquet").write_bytes(b"damaged")
    found = repair(tmp_path)
    assert (found.rows, found.done, found.restored) == (5, 4, 1)
    assert (tmp_path / "log.parquet.damaged-1").read_bytes() == b"damaged"
    again = pq.read_table(tmp_path / "log.parquet")
    assert again.slice(0, 4).equals(rows.slice(0, 4))
    assert run_folder(tmp_path, JOBS).engine.batches == []


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_images_without_any_row_say_what_they_are(tmp_path: Path, image_format: str) -> None:
    jobs = [make_job("a"), make_job("b", seed=3), make_job("thinks", think=True)]
    config = make_config(output=OutputConfig(image_format=image_format))
    run_folder(tmp_path, jobs, config)
    before = pq.read_table(tmp_path / "log.parquet").to_pylist()
    lose(tmp_path)
    (tmp_path / "log.parquet").unlink()
    found = repair(tmp_path)
    assert (found.rows, found.done, found.restored, found.unknown) == (3, 0, 3, ())
    same = ["job_id", "key", "task", "status", "prompt", "seed", "width", "height", "cfg_scale"]
    same += ["cfg_interval", "image_paths", "image_sha256", "text_path", "text_sha256"]
    same += ["num_images", "image_tokens", "checkpoint", "dtype"]
    after = pq.read_table(tmp_path / "log.parquet").to_pylist()
    for old, new in zip(before, sorted(after, key=lambda row: row["job_id"]), strict=True):
        assert {name: new[name] for name in same} == {name: old[name] for name in same}
        assert (new["num_kept_images"], new["total_s"]) == (1, 0.0)
    assert run_folder(tmp_path, jobs, config).engine.batches == []


def rows_of(root: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(root / "log.parquet").to_pylist()
    return rows


def restored_story(root: Path, spoil: Callable[[Path], None]) -> Repaired:
    """Rebuilds a folder of one story from its images, after something was done to them."""
    run_folder(root, [make_job("s", Task.INTERLEAVE, prompt="grows")])
    lose(root)
    (root / "log.parquet").unlink()
    (root / "text/s.txt").write_text("One <image> two <image> three <image> four <image>.")
    spoil(root)
    return repair(root)


def test_story_is_whole_if_its_text_has_as_many_images_and_is_no_older(tmp_path: Path) -> None:
    def nothing(_: Path) -> None:
        pass

    def shorten(root: Path) -> None:
        (root / "images/s/003.png").unlink()

    def interrupt(root: Path) -> None:
        (root / "images/s/001.png").unlink()

    def age(root: Path) -> None:
        os.utime(root / "text/s.txt", (1, 1))

    assert restored_story(tmp_path / "whole", nothing).restored == 1
    for number, spoil in enumerate([shorten, interrupt, age]):
        with pytest.raises(RunFolderError, match="nothing can be rebuilt"):
            restored_story(tmp_path / str(number), spoil)


def test_files_that_are_missing_changed_or_of_nobody_are_named(tmp_path: Path) -> None:
    run_folder(tmp_path, JOBS)
    lose(tmp_path)
    images = tmp_path / "images"
    (images / "j0.png").unlink()
    (images / "j1.png").write_bytes(b"another image")
    shutil.copyfile(images / "j2.png", images / "copy.png")
    (tmp_path / "text").mkdir(exist_ok=True)
    (tmp_path / "text/notes.txt").write_text("the user's")
    found = repair(tmp_path)
    assert (found.done, found.restored, found.to_run) == (3, 0, ("j0", "j1"))
    assert found.unknown == ("images/copy.png", "images/j1.png", "text/notes.txt")
    ran = run_folder(tmp_path, JOBS)
    assert [job_id for batch in ran.engine.batches for job_id in batch] == ["j0", "j1"]
    assert (images / "copy.png").exists()


def test_image_of_another_definition_beside_a_job_that_is_done_stays(tmp_path: Path) -> None:
    run_folder(tmp_path / "run", [make_job("a")])
    config = make_config(output=OutputConfig(image_format="webp"))
    run_folder(tmp_path / "other", [make_job("a", seed=8)], config)
    shutil.copyfile(tmp_path / "other/images/a.webp", tmp_path / "run/images/a.webp")
    found = repair(tmp_path / "run")
    assert (found.done, found.restored, found.unknown) == (1, 0, ("images/a.webp",))


def test_image_of_a_later_definition_than_its_row_counts(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job("a")])
    early = (tmp_path / "log.parquet").read_bytes()
    run_folder(tmp_path, [make_job("a", seed=8)])
    lose(tmp_path)
    (tmp_path / "log.parquet").write_bytes(early)
    found = repair(tmp_path)
    assert (found.done, found.restored, found.to_run) == (0, 1, ())
    assert run_folder(tmp_path, [make_job("a", seed=8)]).engine.batches == []


def test_failed_jobs_stay_failed_and_attempts_are_counted_on(tmp_path: Path) -> None:
    jobs = [make_job("a"), make_job("bad", prompt="this one fails")]
    run_folder(tmp_path, jobs)
    lose(tmp_path)
    assert repair(tmp_path).failed == 1
    assert run_folder(tmp_path, jobs).engine.batches == []
    with open_store(tmp_path) as store:
        store.ingest(jobs, IDENTITY)
        store.state.retry_failed()
    ran = run_folder(tmp_path, jobs)
    assert [(attempt.job_id, attempt.attempt) for attempt in ran.seen.finished] == [("bad", 2)]
    assert ran.seen.finished[0].session == 3


def test_interrupted_batch_continues_with_its_kept_images(tmp_path: Path) -> None:
    jobs: list[Job] = [make_job(f"s{i}", Task.INTERLEAVE, seed=i) for i in range(3)]
    run_folder(tmp_path / "whole", jobs)
    for after in itertools.count(1):
        root = tmp_path / str(after)
        run_folder(root, [make_job("a"), *jobs], stop=Flag(after=after))
        if read_status(root).kept_images:
            break
    (number,) = (folder.name for folder in (root / "checkpoints").iterdir())
    lose(root)
    assert repair(root).batches == 1
    engine = FakeEngine()
    ran = run_folder(root, [make_job("a"), *jobs], engine=engine)
    assert ran.summary.counts.done == 4
    assert max(row["num_kept_images"] or 0 for row in rows_of(root)) > 0
    whole, found = outcome(tmp_path / "whole")[0], outcome(root)[0]
    assert {name: found[name] for name in whole} == whole
    with closing(sqlite3.connect(root / "state.db")) as db:
        (used,) = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'batches'").fetchone()
    assert used > int(number)


def test_nothing_that_can_be_rebuilt_changes_nothing(tmp_path: Path) -> None:
    config = make_config(output=OutputConfig(embed_metadata=False))
    run_folder(tmp_path, JOBS, config)
    truncate(tmp_path)
    (tmp_path / "log.parquet").unlink()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(RunFolderError, match=r"nothing can be rebuilt: .*log\.parquet is missing"):
        repair(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*") if ".lock" not in path.name) == [
        name for name in before if ".lock" not in name
    ]
    with pytest.raises(RunFolderError, match="neither images nor a log"):
        repair(tmp_path / "elsewhere")


def test_whole_folder_is_left_alone_or_rebuilt_to_itself(tmp_path: Path) -> None:
    run_folder(tmp_path, mixed_jobs())
    before = outcome(tmp_path)
    rows = pq.read_table(tmp_path / "log.parquet")
    states = [path.name for path in tmp_path.glob("state.db*")]
    state = (tmp_path / "state.db").read_bytes()
    assert not repair(tmp_path).is_rebuilt
    assert [path.name for path in tmp_path.glob("state.db*")] == states
    assert (tmp_path / "state.db").read_bytes() == state
    found = repair(tmp_path, is_forced=True)
    assert (found.to_run, found.problems, found.unknown) == ((), (), ())
    assert found.former == "state.db.damaged-1"
    assert pq.read_table(tmp_path / "log.parquet").equals(rows)
    assert run_folder(tmp_path, mixed_jobs()).engine.batches == []
    assert outcome(tmp_path) == before


def test_folder_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    run_folder(tmp_path, JOBS)
    with closing(sqlite3.connect(tmp_path / "state.db")) as db:
        db.execute("PRAGMA user_version = 99")
    named = re.escape(f"{tmp_path / 'state.db'}: made by a newer sensebatch")
    with pytest.raises(RunFolderError, match=f"^{named}"):
        repair(tmp_path)


def test_folder_that_is_in_use_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sensebatch.store.run_dir.LOCK_WAIT_S", 0.05)
    run_folder(tmp_path, JOBS)
    with open_store(tmp_path), pytest.raises(RunFolderError, match="in use by another run"):
        repair(tmp_path)
