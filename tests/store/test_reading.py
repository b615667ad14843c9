"""Looking at a run's folder: nothing is left there, and nobody has to be allowed to write."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sensebatch.errors import RunFolderError
from sensebatch.store import database
from sensebatch.store.finished import finished_jobs
from sensebatch.store.status import read_status
from tests.executor.fakes import FakeEngine, make_job, run_folder

pytestmark = pytest.mark.slow

JOBS = [make_job(f"j{i}") for i in range(5)]

AS_ANYBODY = """
import dataclasses, json, os, sys
from pathlib import Path
from sensebatch.store import kept, status
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
try:
    (Path(sys.argv[1]) / "new").write_text("")
    sys.exit("can write")
except OSError:
    pass
found = status.read_status(Path(sys.argv[1]))
print(json.dumps({"counts": dataclasses.asdict(found.counts), "running": found.running}))
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """Returns a folder that every user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
        for path in Path(folder).rglob("*"):
            if path.is_dir():
                path.chmod(0o755)


def killed(root: Path) -> None:
    """Makes a folder that a killed process left in its second batch, with commits in the WAL."""
    live = root.with_name("live")

    def copy() -> None:
        if len(engine.batches) == 2 and not root.exists():
            while read_status(live).counts.done < 2:  # committed in the background
                time.sleep(0.01)
            shutil.copytree(live, root)

    engine = FakeEngine(copy)
    run_folder(live, JOBS, engine=engine)
    assert (root / "state.db-wal").stat().st_size


def names(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


def seen_by_anybody(root: Path) -> dict[str, dict[str, int]]:
    """Returns the status of a folder as a user sees it who may only read."""
    for path in (root, *root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    command = [sys.executable, "-c", AS_ANYBODY, str(root)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, dict[str, int]] = json.loads(ran.stdout)
    return found


def test_status_leaves_nothing_behind(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run_folder(root, JOBS)
    before = names(root)
    assert read_status(root).counts.done == 5
    assert names(root) == before
    assert not [name for name in before if name.startswith("state.db-")]


def test_status_of_a_killed_run_counts_what_the_wal_has(tmp_path: Path) -> None:
    root = tmp_path / "run"
    killed(root)
    found = read_status(root)
    assert not found.running
    assert (found.counts.done, found.counts.started, found.counts.pending) == (2, 2, 1)
    assert run_folder(root, JOBS).summary.done == 3


@pytest.mark.skipif(sys.platform == "win32", reason="file modes of POSIX")
@pytest.mark.parametrize("without", [(), ("state.db-shm",)], ids=["all", "no index"])
def test_killed_run_is_counted_by_who_may_only_read(place: Path, without: tuple[str, ...]) -> None:
    root = place / "run"
    killed(root)
    for name in without:
        (root / name).unlink()
    before = names(root)
    counts = seen_by_anybody(root)["counts"]
    assert (counts["done"], counts["started"], counts["pending"]) == (2, 2, 1)
    assert names(root) == before


@pytest.mark.skipif(sys.platform == "win32", reason="file modes of POSIX")
def test_finished_run_is_counted_by_who_may_only_read(place: Path) -> None:
    root = place / "run"
    run_folder(root, JOBS)
    before = names(root)
    assert seen_by_anybody(root)["counts"]["done"] == 5
    assert names(root) == before


@pytest.mark.skipif(sys.platform == "win32", reason="file modes of POSIX")
def test_running_run_is_seen_by_who_may_only_read(place: Path) -> None:
    root = place / "run"
    seen: list[Any] = []

    def look() -> None:
        if not seen:
            modes = {path: path.stat().st_mode for path in (root, *root.rglob("*"))}
            seen.append(seen_by_anybody(root))
            for path, mode in modes.items():
                path.chmod(mode)

    run_folder(root, JOBS, engine=FakeEngine(look))
    assert seen[0]["running"]
    assert (seen[0]["counts"]["started"], seen[0]["counts"]["pending"]) == (2, 3)


def test_wal_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "run"
    killed(root)
    (root / "state.db-shm").unlink()
    real = shutil.copyfile

    def copy(source: Path, target: Path) -> None:
        if source.name.endswith("-wal"):
            raise PermissionError(13, os.strerror(13), str(source))
        real(source, target)

    monkeypatch.setattr(database, "_is_writable", lambda _: False)
    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(RunFolderError, match=r"state\.db-wal: cannot be read: Permission denied"):
        read_status(root)


def test_finished_jobs_can_be_looked_at_while_a_run_begins(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run_folder(root, JOBS[:3])
    jobs = finished_jobs(root)
    first = next(jobs)
    run_folder(root, JOBS)
    assert [first.job.id, *(finished.job.id for finished in jobs)] == ["j0", "j1", "j2"]
    assert not [name for name in names(root) if name.startswith("state.db-")]
