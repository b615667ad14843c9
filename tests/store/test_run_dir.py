from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sensebatch.errors import JobError, RunFolderError, StorageError, StorageFullError
from sensebatch.store import run_dir
from sensebatch.store.files import write_atomic
from sensebatch.store.run_dir import RunDir
from sensebatch.store.status import read_status
from sensebatch.store.store import open_store
from tests.executor.fakes import FakeEngine, make_job, run_folder

HOLD = """
import sys, time
from pathlib import Path
from sensebatch.store.run_dir import RunDir
with RunDir(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(600)
"""


def test_second_process_is_refused_by_a_lock_that_a_dead_one_does_not_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_dir, "LOCK_WAIT_S", 0.05)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert RunDir(tmp_path / "run").in_use()
        with (
            pytest.raises(RunFolderError, match=rf"in use .*process {process.pid} on "),
            open_store(tmp_path / "run"),
        ):
            pass
        process.send_signal(signal.SIGKILL)
    assert not RunDir(tmp_path / "run").in_use()
    with open_store(tmp_path / "run"):
        pass


@pytest.mark.parametrize("is_replaced", [False, True])
def test_lock_that_was_removed_is_missed_and_the_next_holder_kept(
    tmp_path: Path, is_replaced: bool
) -> None:
    folder, other = RunDir(tmp_path), RunDir(tmp_path)
    with open_store(tmp_path):
        pass
    holder = tmp_path / ".lock-holder.json"
    with folder.locked():
        folder.require_in_place()
        (tmp_path / ".lock").unlink()
        if is_replaced:
            (tmp_path / ".lock").touch()
        holder.write_text("another's")
        with pytest.raises(StorageError, match=r"\.lock: expected the lock of this run"):
            folder.require_in_place()
        other.require_in_place()
    assert holder.read_text() == "another's"
    with folder.locked():
        folder.require_in_place()


def test_lock_whose_identity_cannot_be_told_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> os.stat_result:
        raise OSError(errno.ESTALE, "Stale file handle")

    with open_store(tmp_path):
        pass
    folder = RunDir(tmp_path)
    with folder.locked(), monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fail)
        folder.require_in_place()
    # Some file systems number a file that is opened otherwise than its path.
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "samestat", lambda *_: False)
        with folder.locked():
            folder.require_in_place()


def test_images_without_a_state_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with (
        pytest.raises(RunFolderError, match=r"found images without state\.db"),
        open_store(tmp_path),
    ):
        pass


def test_state_that_lost_its_jobs_costs_neither_images_nor_log(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job("a")])
    os.truncate(tmp_path / "state.db", 0)
    kept = [tmp_path / "images/a.png", tmp_path / "log.parquet"]
    before = [path.read_bytes() for path in kept]
    for _ in range(2):
        with (
            pytest.raises(RunFolderError, match=r"found images and no job in state\.db"),
            open_store(tmp_path),
        ):
            pass
    assert [path.read_bytes() for path in kept] == before


def test_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(RunFolderError, match=r"that can be made: .*run is a file"),
        open_store(tmp_path / "run"),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" / "run"
    with pytest.raises(RunFolderError, match=r"made: .*file is a file"), open_store(root):
        pass


def test_status_counts_while_a_run_works_and_after(tmp_path: Path) -> None:
    seen = []
    jobs = [make_job(f"j{i}") for i in range(3)] + [make_job("bad", prompt="fails")]
    run_folder(tmp_path, jobs, engine=FakeEngine(lambda: seen.append(read_status(tmp_path))))
    assert seen[0].running
    assert (seen[0].counts.started, seen[0].counts.pending) == (2, 2)
    after = read_status(tmp_path)
    assert not after.running
    assert (after.counts.done, after.counts.failed, after.counts.remaining) == (3, 1, 0)


def test_status_of_another_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no state\.db"):
        read_status(tmp_path)


@pytest.mark.parametrize("job_id", ["", "/etc/x", "../x", "a/../../x", "a\\b"])
def test_id_that_would_leave_the_folder_is_refused(job_id: str) -> None:
    with pytest.raises(JobError):
        RunDir(Path("run")).image_name(job_id, "png")


@pytest.mark.parametrize("code", [28, 122])
def test_full_disk_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    write_atomic(tmp_path / "a", b"old")

    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFullError, match="run the same command again"):
        write_atomic(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_folder_whose_name_is_not_unicode_is_refused_before_work(tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(
        RunFolderError, match=r"caf\\udce9'?: expected a folder whose name is UTF-8"
    ):
        run_folder(root, [make_job("a")])
    assert not root.exists()
