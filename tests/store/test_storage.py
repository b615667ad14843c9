"""A file system that fails stops a run, whatever it says; the same command continues afterwards."""

from __future__ import annotations

import errno
import io
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sensebatch.errors import RunFolderError, StorageError, StorageFullError
from sensebatch.jobs import Job
from sensebatch.store.files import write_atomic
from sensebatch.store.store import open_store
from sensebatch.tasks import Task
from tests.executor.fakes import make_job, run_folder

pytestmark = pytest.mark.slow

BAD_NAMES = [errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ]
"""A job's own name may be what is wrong."""
CODES = sorted(set(errno.errorcode) - {*BAD_NAMES, errno.EINTR})
FEW = [errno.EACCES, errno.EIO, errno.EMFILE, errno.ENOSPC, errno.ENOTDIR, errno.ETIMEDOUT]


def jobs() -> list[Job]:
    return [make_job("a"), make_job("b"), make_job("story", Task.INTERLEAVE)]


def failing(
    call: Callable[..., Any], code: int, *, in_folder: str = "", skip: int = 0
) -> Callable[..., Any]:
    """Returns a call that fails with an errno on paths with `in_folder`, after `skip` of them."""
    left = skip

    def fail(*args: Any, **options: Any) -> Any:
        nonlocal left
        if in_folder in str(args[0]):
            left -= 1
            if left < 0:
                raise OSError(code, os.strerror(code), *args[:1] if in_folder else ())
        return call(*args, **options)

    return fail


def in_ascii(code: str, folder: Path) -> list[str]:
    """Returns what a program prints in a locale whose file names are ASCII."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", code, folder], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


@pytest.mark.parametrize("names_job", [False, True])
@pytest.mark.parametrize("code", [*CODES, *BAD_NAMES], ids=errno.errorcode.get)
def test_every_error_of_a_flush_is_one_of_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, names_job: bool
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", failing(os.fsync, code))
    is_full = code in (errno.ENOSPC, errno.EDQUOT)
    with pytest.raises(StorageFullError if is_full else StorageError, match="the same command"):
        write_atomic(path, b"after", names_job=names_job)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"before"]


@pytest.mark.parametrize(
    ("operation", "code"),
    [*itertools.product(["fsync", "replace", "mkdir", "open"], FEW)],
    ids=lambda value: errno.errorcode.get(value, value),
)
def test_every_error_of_the_file_system_stops_the_run_and_fails_no_job(
    tmp_path: Path, operation: str, code: int
) -> None:
    with open_store(tmp_path):
        pass
    with pytest.MonkeyPatch.context() as patch:
        if operation == "fsync":
            patch.setattr(os, "fsync", failing(os.fsync, code, skip=3))
        elif operation == "replace":
            patch.setattr(os, "replace", failing(os.replace, code, in_folder="images"))
        elif operation == "mkdir":
            patch.setattr(Path, "mkdir", failing(Path.mkdir, code, in_folder="images"))
        else:
            patch.setattr(Path, "open", failing(Path.open, code, in_folder="images"))
        is_full = code in (errno.ENOSPC, errno.EDQUOT)
        with pytest.raises(StorageFullError if is_full else StorageError, match="the same command"):
            run_folder(tmp_path, jobs())
    ran = run_folder(tmp_path, jobs())
    counts = ran.summary.counts
    assert (counts.done, counts.failed, counts.remaining) == (3, 0, 0)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("code", BAD_NAMES, ids=errno.errorcode.get)
@pytest.mark.parametrize("operation", ["replace", "mkdir", "open"])
def test_name_that_the_file_system_does_not_take_fails_its_job_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, code: int
) -> None:
    owner: Any = os if operation == "replace" else Path
    call = getattr(owner, operation)
    monkeypatch.setattr(owner, operation, failing(call, code, in_folder="images/story"))
    ran = run_folder(tmp_path, jobs())
    assert (ran.summary.counts.done, ran.summary.counts.failed) == (2, 1)
    assert [attempt.job_id for attempt in ran.seen.finished if attempt.status == "failed"] == [
        "story"
    ]


@pytest.mark.skipif(os.name == "nt", reason="file names of Windows are Unicode in every locale")
def test_name_that_the_locale_does_not_have_fails_its_job_alone(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from tests.executor.fakes import make_job, run_folder

for _ in range(2):
    ran = run_folder(Path(sys.argv[1]), [make_job(id) for id in ("a", "\\u65e5\\u672c", "b")])
    counts = ran.summary.counts
    print(counts.done, counts.failed, counts.remaining)
    for attempt in ran.seen.finished:
        if attempt.status == "failed":
            print(ascii(attempt.job_id), attempt.error_type, attempt.error_file)
            print(ascii(attempt.error_message))
"""
    first, failed, message, second = in_ascii(code, tmp_path)
    assert (first, second) == ("2 1 0", "2 1 0")
    assert failed == r"'\u65e5\u672c' JobError None"
    assert "file names of this locale are ascii" in message
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["a.png", "b.png"]


@pytest.mark.skipif(os.name == "nt", reason="file names of Windows are Unicode in every locale")
def test_finished_file_whose_name_the_locale_does_not_have_is_not_drawn_again(
    tmp_path: Path,
) -> None:
    run_folder(tmp_path, [make_job("日本")])
    code = """
import sys
from pathlib import Path
from sensebatch.errors import StorageError
from sensebatch.store.verify import verify
from tests.executor.fakes import make_job, run_folder

print([file.found for file in verify(Path(sys.argv[1]))])
try:
    run_folder(Path(sys.argv[1]), [make_job("\\u65e5\\u672c")])
except StorageError as error:
    print(ascii(error))
"""
    states, error = in_ascii(code, tmp_path)
    assert states == "['missing']"
    assert "file names of this locale are ascii" in error
    assert run_folder(tmp_path, [make_job("日本")]).engine.batches == []


@pytest.mark.parametrize("code", BAD_NAMES, ids=errno.errorcode.get)
def test_same_errors_of_what_takes_no_name_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    with open_store(tmp_path):
        pass
    monkeypatch.setattr(os, "fsync", failing(os.fsync, code, skip=3))
    with pytest.raises(StorageError):
        run_folder(tmp_path, jobs())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
def test_file_that_cannot_be_written_leaves_the_old_one_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(code, os.strerror(code))

    write_atomic(tmp_path / "a", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_: Full())
        with pytest.raises(StorageError, match="the same command"):
            write_atomic(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


PARTS = ["images", "text", "errors", "checkpoints", "log"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("instead", ["file", "link"])
def test_folder_that_something_else_has_the_place_of_stops_the_run(
    tmp_path: Path, part: str, instead: str
) -> None:
    run_folder(tmp_path, jobs())
    away = tmp_path.with_name(f"{tmp_path.name}-away")
    (tmp_path / part).mkdir(exist_ok=True)
    (tmp_path / part).rename(away)
    if instead == "file":
        (tmp_path / part).write_text("")
    else:
        (tmp_path / part).symlink_to(tmp_path / "unmounted")
    with pytest.raises(StorageError, match=rf"{part}: expected a folder, found a {instead}"):
        run_folder(tmp_path, jobs())
    (tmp_path / part).unlink()
    away.rename(tmp_path / part)
    ran = run_folder(tmp_path, jobs())
    assert (ran.changes.restored, ran.engine.batches) == (0, [])


@pytest.mark.parametrize(
    "part", [".lock", ".lock-holder.json", "log.parquet", "run.yaml", "state.db", "summary.txt"]
)
def test_file_that_a_folder_has_the_place_of_is_named(tmp_path: Path, part: str) -> None:
    run_folder(tmp_path, jobs())
    (tmp_path / part).unlink(missing_ok=True)
    (tmp_path / part).mkdir()
    with pytest.raises(StorageError, match=rf"{part}: expected a file, found a folder"):
        run_folder(tmp_path, jobs())


def test_folder_whose_name_is_too_long_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="can be made: File name too long"):
        run_folder(tmp_path / ("x" * 300), jobs())
