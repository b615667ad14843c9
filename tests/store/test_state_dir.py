"""Folders on a network: the journal of their state, and a state on a disk of the machine."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sensebatch.config import ExecutionConfig
from sensebatch.errors import RunFolderError, StorageError
from sensebatch.executor.run import execute
from sensebatch.executor.worker import EngineWorker
from sensebatch.store import file_systems, state_dir
from sensebatch.store.chains import reading
from sensebatch.store.database import Database
from sensebatch.store.file_systems import file_system, network_file_system
from sensebatch.store.merge import merge
from sensebatch.store.repair import repair
from sensebatch.store.run_dir import RunDir
from sensebatch.store.state_dir import read_pointer
from sensebatch.store.status import read_status
from sensebatch.store.store import open_store
from tests.executor.fakes import (
    IDENTITY,
    FakeEngine,
    Flag,
    Recorder,
    make_config,
    mixed_jobs,
    outcome,
    read_input,
    run_folder,
)
from tests.executor.test_crash import Killed, Life, mortal
from tests.store.test_merge import run_shards

pytestmark = pytest.mark.slow

CONFIG = make_config(execution=ExecutionConfig(max_attempts=2))

MOUNTS = r"""
proc /proc proc rw 0 0
/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw,vers=4.2 0 0
/dev/sdb1 /home/me/my\040disk xfs rw 0 0
//server/share /mnt/share cifs rw 0 0
/dev/sdc1 /mnt/share ext4 rw 0 0
10.0.0.1@tcp:/lustre /scratch lustre rw 0 0
me@host: /mnt/ssh fuse.sshfs rw 0 0
/dev/sdd1 /mnt/usb fuseblk rw 0 0
gocryptfs /mnt/secret fuse.gocryptfs rw 0 0
bucket /mnt/bucket fuse rw 0 0
tmpfs /scratchy tmpfs rw 0 0
"""


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The table of mounts, to be written to."""
    table = tmp_path / "mounts"
    table.write_text(MOUNTS, encoding="utf-8")
    monkeypatch.setattr(file_systems, "MOUNTS", table)
    return table


@pytest.fixture
def network(mounts: Path, tmp_path: Path) -> Path:
    """A folder on NFS, for all that the table says."""
    folder = tmp_path / "network"
    folder.mkdir()
    with mounts.open("a", encoding="utf-8") as file:
        file.write(f"server:/export {folder} nfs rw,nolock 0 0\n")
    return folder


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize(
    ("path", "kind", "is_network"),
    [
        ("/data/run", "ext4", False),
        ("/", "ext4", False),
        ("/home/me/run", "nfs4", True),
        ("/home", "nfs4", True),
        ("/homely", "ext4", False),
        ("/home/me/my disk/run", "xfs", False),
        ("/mnt/share/run", "ext4", False),
        ("/scratch/run", "lustre", True),
        ("/scratchy/run", "tmpfs", False),
        ("/mnt/ssh/run", "fuse.sshfs", True),
        ("/mnt/usb/run", "fuseblk", False),
        ("/mnt/secret/run", "fuse.gocryptfs", False),
        ("/mnt/bucket/run", "fuse", True),
    ],
)
def test_the_longest_and_latest_mount_point_decides(path: str, kind: str, is_network: bool) -> None:
    found = file_system(Path(path))
    assert found is not None
    assert (found.kind, found.is_network) == (kind, is_network)
    assert (network_file_system(Path(path)) is not None) == is_network


def test_without_a_table_the_system_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Part:
        fstype, mountpoint = "SMBFS", "/"

    monkeypatch.setattr(file_systems, "MOUNTS", Path("/nowhere"))
    monkeypatch.setattr("psutil.disk_partitions", lambda all: [Part()] if all else [])
    assert str(network_file_system(Path("/x"))) == "smbfs (/)"


def journal_mode(state: Path) -> str:
    with closing(sqlite3.connect(state)) as db:
        return db.execute("PRAGMA journal_mode").fetchone()[0]


def test_a_state_on_a_network_has_a_rollback_journal(network: Path, tmp_path: Path) -> None:
    run_folder(network / "run", mixed_jobs(), CONFIG)
    run_folder(tmp_path / "run", mixed_jobs(), CONFIG)
    assert journal_mode(network / "run" / "state.db") == "delete"
    assert journal_mode(tmp_path / "run" / "state.db") == "wal"
    assert outcome(network / "run") == outcome(tmp_path / "run")


def test_a_state_with_a_log_is_converted_with_all_that_its_log_holds(
    network: Path, tmp_path: Path
) -> None:
    """As an earlier version left it, killed."""
    with closing(Database(tmp_path / "state.db")) as database:
        with database.transaction() as db:
            db.execute("INSERT INTO meta VALUES ('a', 'b')")
        for name in ("state.db", "state.db-wal"):
            shutil.copyfile(tmp_path / name, network / name)
    assert (network / "state.db-wal").stat().st_size
    with closing(Database(network / "state.db")) as database, database.reading() as db:
        assert db.execute("SELECT value FROM meta WHERE name = 'a'").fetchone() == ("b",)
        assert not (network / "state.db-wal").exists()
        # Others can read beside it.
        assert journal_mode(network / "state.db") == "delete"


def test_status_reads_a_state_on_a_network_while_a_run_writes(network: Path) -> None:
    counts: list[int] = []
    root = network / "run"
    engine = FakeEngine(lambda: counts.append(read_status(root).counts.done))
    run_folder(root, mixed_jobs(), CONFIG, engine=engine)
    assert counts == sorted(counts)
    assert counts[-1] > 0


def run_apart(
    root: Path, folder: Path | None, *, engine: FakeEngine | None = None, stop: Flag | None = None
) -> FakeEngine:
    """Runs mixed jobs with the state in a folder of its own."""
    engine = engine or FakeEngine()
    with open_store(root, state_dir=folder) as store:
        store.ingest(mixed_jobs(), IDENTITY)
        execute(
            store=store,
            worker=EngineWorker(engine),
            config=CONFIG,
            read_image=reading(root, read_input),
            observer=Recorder(),
            stop=stop or Flag(),
        )
    return engine


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("whole")
    run_folder(root, mixed_jobs(), CONFIG)
    return outcome(root)


def test_a_state_elsewhere_is_found_again_without_being_named(
    network: Path, tmp_path: Path, whole: Any
) -> None:
    root, folder = network / "run", tmp_path / "local"
    run_apart(root, folder, stop=Flag(after=4))
    (state,) = folder.glob("run-*/state.db")
    assert not list(root.glob("state.db*"))
    assert journal_mode(state) == "wal"
    assert (status := read_status(root)).counts.remaining
    assert status.pointer is not None
    assert status.pointer.state == str(state)
    run_apart(root, None, stop=Flag(after=4))
    run_apart(root, folder)
    assert outcome(root) == whole
    assert list(folder.iterdir()) == [state.parent]


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.executor.fakes import FakeEngine
from tests.store.test_state_dir import run_apart
left = int(sys.argv[3])
def step():
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
run_apart(Path(sys.argv[1]), Path(sys.argv[2]), engine=FakeEngine(step))
"""


def test_a_killed_run_with_its_state_elsewhere_resumes_to_the_same_bytes(
    tmp_path: Path, whole: Any
) -> None:
    root, folder = tmp_path / "run", tmp_path / "local"
    for step in ("3", "5"):
        command = [sys.executable, "-c", KILLED, str(root), str(folder), step]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    run_apart(root, None)
    assert outcome(root) == whole


def test_an_existing_run_takes_its_state_along_and_no_death_loses_it(
    tmp_path: Path, whole: Any
) -> None:
    life = Life(None)
    for steps in range(1, 40, 5):
        root, folder = tmp_path / f"run{steps}", tmp_path / f"local{steps}"
        run_folder(root, mixed_jobs(), CONFIG, stop=Flag(after=4))
        with mortal(life := Life(steps)):
            try:
                with open_store(root, state_dir=folder):
                    pass
            except Killed:
                pass
        run_apart(root, folder)
        assert outcome(root) == whole
        assert not list(root.glob("state.db*"))
        if life.taken < steps:
            break
    assert life.taken < steps, "it was not killed at the end"


def test_a_state_on_another_machine_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node7")
    root, folder = tmp_path / "run", tmp_path / "local"
    run_apart(root, folder)
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    monkeypatch.setattr("socket.gethostname", lambda: "node9")
    said = r"expected its state at .*state\.db on node7, found none, and this is node9"
    for attempt in (
        lambda: run_apart(root, None),
        lambda: run_apart(root, folder),
        lambda: run_apart(root, tmp_path / "third"),
        lambda: read_status(root),
        lambda: repair(root),
    ):
        with pytest.raises(RunFolderError, match=said):
            attempt()
    # Its folder was brought along.
    assert run_apart(root, moved).batches == []
    shutil.rmtree(moved)
    repaired = repair(root, state_dir=tmp_path / "new")
    assert repaired.is_rebuilt
    assert run_apart(root, None).batches == []
    assert outcome(root)[0] == whole[0]
    pointer = read_pointer(root)
    assert pointer is not None
    assert (pointer.host, Path(pointer.state).parents[1]) == ("node9", tmp_path / "new")


def test_a_state_dir_that_is_another_or_on_a_network_is_refused(
    network: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    with pytest.raises(RunFolderError, match=r"disk of this machine, found .* on nfs \("):
        run_apart(root, network / "state")
    run_apart(root, tmp_path / "local")
    with pytest.raises(RunFolderError, match="to move it, move"):
        run_apart(root, tmp_path / "other")


def test_a_copy_of_a_run_does_not_share_its_state_and_a_moved_run_keeps_it(tmp_path: Path) -> None:
    root, copy = tmp_path / "run", tmp_path / "copy"
    run_apart(root, tmp_path / "local")
    shutil.copytree(root, copy)
    with pytest.raises(RunFolderError, match=f"which is that of {root}"):
        run_apart(copy, None)
    repair(copy, state_dir=tmp_path / "local")
    assert run_apart(copy, None).batches == []
    root.rename(tmp_path / "moved")
    assert run_apart(tmp_path / "moved", None).batches == []
    assert len(list((tmp_path / "local").iterdir())) == 2


def test_a_run_whose_folder_disappears_stops_although_its_state_is_there(tmp_path: Path) -> None:
    root = tmp_path / "run"

    def lose() -> None:
        if root.exists():
            root.rename(tmp_path / "gone")

    engine = FakeEngine(lose)
    with pytest.raises(StorageError, match="found it moved, removed or unmounted"):
        run_apart(root, tmp_path / "local", engine=engine)


@pytest.mark.parametrize("is_apart", [False, True])
def test_a_run_whose_state_alone_disappears_says_so(is_apart: bool, tmp_path: Path) -> None:
    root = tmp_path / "run"

    def lose() -> None:
        RunDir(root).state.unlink(missing_ok=True)

    engine = FakeEngine(lose)
    with pytest.raises(StorageError, match=r"state\.db: .*removed; .*: sensebatch repair .*run$"):
        run_apart(root, tmp_path / "local" if is_apart else None, engine=engine)


def test_a_state_cannot_be_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"--state-dir: expected a folder .*file is a file"):
        run_apart(tmp_path / "run", tmp_path / "file" / "local")


def test_a_run_that_never_had_a_job_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        open_store(tmp_path / "run", state_dir=tmp_path / "local") as store,
    ):
        store.ingest((1 / 0 for _ in range(1)), IDENTITY)  # type: ignore[misc]
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "local").iterdir())


def test_shards_are_joined_with_the_state_elsewhere(tmp_path: Path, whole: Any) -> None:
    roots = run_shards(tmp_path, 2)
    merge(roots, tmp_path / "all", state_dir=tmp_path / "local")
    merge(roots, tmp_path / "all")
    assert run_apart(tmp_path / "all", None).batches == []
    assert outcome(tmp_path / "all") == whole
    assert not list((tmp_path / "all").glob("state.db*"))


def test_what_a_database_says_of_repair_names_the_run(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run_apart(root, tmp_path / "local")
    RunDir(root).state.write_bytes(b"damaged" * 100)
    with pytest.raises(RunFolderError, match=f"sensebatch repair {root}$"):
        read_status(root)
    assert repair(root).is_rebuilt
    assert run_apart(root, None).batches == []


def test_a_damaged_pointer_does_not_hide_a_state_that_is_there(tmp_path: Path) -> None:
    run_folder(tmp_path / "run", mixed_jobs(), CONFIG)
    state_dir.pointer_path(tmp_path / "run").write_text("{", encoding="utf-8")
    assert read_status(tmp_path / "run").counts.remaining == 0


def test_a_read_only_copy_with_a_hot_journal_is_read_as_it_was_committed(
    network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = network / "state.db"
    with closing(Database(path)) as database, database.transaction() as db:
        db.execute("INSERT INTO meta VALUES ('a', 'whole')")
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA cache_size = 1")
        db.execute("BEGIN")
        db.execute("UPDATE meta SET value = 'half'")
        for number in range(3000):
            db.execute("INSERT INTO meta VALUES (?, ?)", (f"n{number}", "x" * 500))
        copy = network / "copy"
        copy.mkdir()
        for name in ("state.db", "state.db-journal"):
            shutil.copyfile(network / name, copy / name)
    assert (copy / "state.db-journal").stat().st_size
    monkeypatch.setattr(os, "access", lambda *_: False)
    with closing(Database(copy / "state.db", read_only=True)) as database, database.reading() as db:
        assert db.execute("SELECT value FROM meta WHERE name = 'a'").fetchone() == ("whole",)
