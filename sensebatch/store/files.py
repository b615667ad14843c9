"""Writing files so that they are whole or absent, and reporting what is wrong with a disk."""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sensebatch.errors import JobError, StorageError, StorageFullError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_BAD_NAME = frozenset({errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ})
_IN_THE_WAY = {
    errno.EISDIR: "expected a file, found a folder",
    errno.ENOTDIR: "expected a folder, found a file",
    errno.EEXIST: "expected a folder, found a file or a link that leads nowhere",
}


@contextmanager
def storage_errors(path: Path, *, names_job: bool = False) -> Iterator[None]:
    """Turns failures of the file system into errors that stop the run.

    Args:
        path: What is read or written.
        names_job: Whether a job gave the name. A name that the file system does not take is then
            that job's mistake; the OSError is let through.

    Raises:
        JobError: A job's name has a character that file names of this locale cannot have.
        StorageFullError: The disk or the quota is full.
        StorageError: Anything else that the file system raised.
    """
    try:
        yield
    except UnicodeEncodeError as error:
        if not names_job:
            raise
        raise JobError(f"{path}: {_not_encoded(error)}") from error
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFullError(
                f"{path}: no room left on the disk; make some and run the same command again"
            ) from error
        # Only calls that take a name say which one.
        if names_job and error.errno in _BAD_NAME and error.filename is not None:
            raise
        found = _IN_THE_WAY.get(error.errno or 0, f"the file system failed: {reason(error)}")
        raise StorageError(
            f"{path}: {found}; run the same command again once that is fixed"
        ) from error


def _not_encoded(error: UnicodeEncodeError) -> str:
    """Returns why a path cannot be one, and what to do about it."""
    found = error.object[error.start : error.end]
    return (
        f"file names of this locale are {error.encoding}, which has no {found!a}; set LC_ALL to a "
        "UTF-8 locale such as C.UTF-8"
    )


def reason(error: OSError) -> str:
    """Returns what the operating system says of an error, without its number and path."""
    return error.strerror or str(error) or type(error).__name__


def repair_command(root: Path) -> str:
    """Returns the command that rebuilds the state of a run's folder."""
    return f"sensebatch repair {shlex.quote(str(root))}"


def is_file(path: str) -> bool:
    """Returns whether there is a file at a path.

    Raises:
        OSError: Whether there is one cannot be found out.
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116, hundreds of thousands of them
    except (FileNotFoundError, NotADirectoryError):
        return False
    except UnicodeEncodeError as error:
        raise OSError(errno.EILSEQ, _not_encoded(error), path) from error


def can_be_named(path: str) -> bool:
    """Returns whether file names of this locale can have all characters of a path."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def sha256_of(path: Path) -> str | None:
    """Returns the SHA-256 of a file's bytes, or None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, UnicodeEncodeError):
        return None


@contextmanager
def atomic_file(path: Path, *, names_job: bool = False) -> Iterator[BinaryIO]:
    """Opens a file that takes its name, and the place of an older one, when the block ends.

    The content is on the disk then; `sync_folders` does the same for the name. Makes its folders.

    Args:
        path: The file.
        names_job: As for `storage_errors`.

    Raises:
        StorageFullError: The disk is full; what was at `path` before is still there.
        StorageError: The file system failed; likewise.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors(path.parent, names_job=names_job):
        path.parent.mkdir(parents=True, exist_ok=True)
    with storage_errors(path, names_job=names_job):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)  # noqa: PTH105, one name to stop at in tests
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def write_atomic(path: Path, data: bytes, *, names_job: bool = False) -> None:
    """Writes a file that is never seen half written; see `atomic_file`."""
    with atomic_file(path, names_job=names_job) as file:
        file.write(data)


def unused(path: Path) -> Path:
    """Returns a path, or the same with `-2`, `-3` and so on: the first that does not exist."""
    found, number = path, 1
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


def sync_folders(paths: Iterable[Path], root: Path) -> None:
    """Puts the names of files on the disk: every folder from each file up to `root`.

    Raises:
        StorageFullError: The disk is full.
        StorageError: The file system failed.
    """
    folders: set[Path] = set()
    for path in paths:
        for folder in path.parents:
            folders.add(folder)
            if folder == root:
                break
    if os.name == "nt":
        return
    with storage_errors(root):
        for folder in sorted(folders):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
