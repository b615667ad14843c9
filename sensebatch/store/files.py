"""Writing files so that they are whole or absent, and saying what is wrong with a disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sensebatch.errors import RunFolderError, StorageFullError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_UNUSABLE = frozenset(
    {
        errno.EIO,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        # A folder that was removed, and file systems that lost their server.
        errno.ENOENT,
        errno.ESTALE,
        errno.ENOTCONN,
    }
)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns failures of the disk, which concern every job, into errors that stop the run.

    Raises:
        StorageFullError: The disk or the quota is full.
        RunFolderError: The disk is broken, gone, or may not be written.
        OSError: Anything else, such as a name that is too long.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFullError(
                f"{path}: no room left on the disk; make some and run the same command again"
            ) from error
        if error.errno in _UNUSABLE:
            raise RunFolderError(
                f"{path}: expected a place that can be written: {error.strerror}"
            ) from error
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes its name, and the place of an older one, when the block ends.

    The content is on the disk then; `sync_folders` does the same for the name. Makes its folders.

    Raises:
        StorageFullError: The disk is full; what was at `path` before is still there.
        RunFolderError: The folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)  # noqa: PTH105, one name to stop at in tests
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file that is never seen half written; see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(data)


def sync_folders(paths: Iterable[Path], root: Path) -> None:
    """Puts the names of files on the disk: every folder from each file up to `root`.

    Raises:
        StorageFullError: The disk is full.
        RunFolderError: The folder cannot be written.
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
