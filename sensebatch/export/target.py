"""Where an export goes: a folder, or a place that fsspec knows, such as a bucket.

Names are relative, with `/`. A file of a folder is whole or absent; so is an object of a bucket.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from filelock import FileLock, Timeout

from sensebatch.errors import ConfigError, SensebatchError, StorageError
from sensebatch.store.files import atomic_file, reason, storage_errors, sync_folders

LOCK = ".sensebatch/lock"
"""In the folder of records, which readers skip."""
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
"""Which of the package's extras brings what a protocol needs."""
_BUCKETS = tuple(f"{protocol}://" for protocol in (*EXTRAS, "hf", "az", "abfs", "oci", "r2"))
"""Places without folders."""


class Target(Protocol):
    """Where an export goes."""

    @property
    def name(self) -> str:
        """As the user named it."""

    @property
    def folder(self) -> Path | None:
        """The folder, if it is one of this machine."""

    def files(self) -> dict[str, int]:
        """Returns the bytes of every file there is, by name."""

    def read(self, name: str) -> bytes | None:
        """Returns the bytes of a file; None where there is none."""

    def write(self, name: str) -> Any:
        """Returns a context manager of a file to write, which is whole when it ends."""

    def write_loose(self, name: str, content: bytes) -> None:
        """Writes one of many files; they are on the disk after the next `settle`."""

    def settle(self) -> None:
        """Makes sure that what was written outlives a power cut."""

    def remove(self, name: str) -> None:
        """Removes a file that may be missing."""

    def held(self) -> Any:
        """Returns a context manager during which no other process writes here, as far as known."""


class Folder:
    """A folder of this machine.

    Args:
        root: Is made when something is written.
        name: As the user named it.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.name = name

    @property
    def folder(self) -> Path:
        """The folder."""
        return self.root

    def files(self) -> dict[str, int]:
        """Returns the bytes of every file there is, by name."""
        with storage_errors(self.root):
            if self.root.exists() and not self.root.is_dir():
                raise ConfigError(f"{self.name}: expected a folder, found a file")
            return dict(_walk(self.root, ""))

    def read(self, name: str) -> bytes | None:
        """Returns the bytes of a file; None where there is none."""
        with storage_errors(self.root / name):
            try:
                return (self.root / name).read_bytes()
            except FileNotFoundError:
                return None

    @contextmanager
    def write(self, name: str) -> Iterator[BinaryIO]:
        """Yields a file to write, which is whole and on the disk when the block ends."""
        path = self.root / name
        with atomic_file(path) as file:
            yield file
        sync_folders([path], self.root)

    def write_loose(self, name: str, content: bytes) -> None:
        """Writes one of many files; they are on the disk after the next `settle`."""
        path = self.root / name
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def settle(self) -> None:
        """Makes sure that what was written outlives a power cut."""
        # A call for each of ten thousand files would take longer than all the rest.
        if hasattr(os, "sync"):
            os.sync()

    def remove(self, name: str) -> None:
        """Removes a file that may be missing, and its folder if nothing else is in it."""
        path = self.root / name
        with storage_errors(path):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            path.parent.rmdir()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the folder for this process; the lock dies with it."""
        path = self.root / LOCK
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)
            try:
                lock.acquire(timeout=0)
            except Timeout:  # an OSError as well
                raise ConfigError(f"{self.name}: in use by another export; wait for it") from None
        try:
            yield
        finally:
            lock.release()


def _walk(root: Path, below: str) -> Iterator[tuple[str, int]]:
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(root / entry.name, f"{below}{entry.name}/")
        else:
            yield f"{below}{entry.name}", entry.stat(follow_symlinks=False).st_size


class Remote:
    """A place that fsspec knows.

    Args:
        fs: The file system.
        root: The path in it.
        name: As the user named it.
    """

    folder = None

    def __init__(self, fs: Any, root: str, name: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")
        self._has_folders = not name.startswith(_BUCKETS)
        self._was_reached = False
        self.name = name

    def files(self) -> dict[str, int]:
        """Returns the bytes of every file there is, by name."""
        with self._errors():
            self._fs.invalidate_cache()
            found = self._fs.find(self._root, detail=True)
            start = len(self._root) + 1
            return {path[start:]: info["size"] for path, info in sorted(found.items())}

    def read(self, name: str) -> bytes | None:
        """Returns the bytes of a file; None where there is none."""
        with self._errors():
            try:
                return self._fs.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None

    @contextmanager
    def write(self, name: str) -> Iterator[BinaryIO]:
        """Yields a file to write, which is whole when the block ends."""
        path = f"{self._root}/{name}"
        with self._errors():
            self._make_folder(path)
            with self._fs.open(path, "wb") as file:
                yield cast(BinaryIO, file)

    def write_loose(self, name: str, content: bytes) -> None:
        """Writes one of many files."""
        path = f"{self._root}/{name}"
        with self._errors():
            self._make_folder(path)
            self._fs.pipe_file(path, content)

    def settle(self) -> None:
        """Does nothing: an object that was written is safe."""

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds nothing: a bucket has no locks."""
        yield

    def remove(self, name: str) -> None:
        """Removes a file that may be missing."""
        with self._errors(), suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")

    def _make_folder(self, path: str) -> None:
        # Where there are no folders, this would make a bucket whose name was mistyped.
        if self._has_folders:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns errors into a mistake as long as nothing was reached, and a failure after that."""
        try:
            yield
            self._was_reached = True
        except SensebatchError:
            raise
        # Each of fsspec's file systems raises errors of its own library.
        except Exception as error:
            if not self._was_reached:
                raise ConfigError(f"{self.name}: cannot be used: {_said(error)}") from error
            raise StorageError(
                f"{self.name}: {_said(error)}; run the same command again"
            ) from error


def _said(error: Exception) -> str:
    if isinstance(error, OSError):
        return reason(error)
    return f"{type(error).__name__}: {error}".rstrip(": .")


def open_target(place: str) -> Folder | Remote:
    """Returns where an export goes; makes nothing.

    Args:
        place: A folder or a URL that fsspec knows: `s3://bucket/set`, `file:///data/set`.

    Raises:
        ConfigError: It is empty, nobody knows its protocol, a package for it is missing, or it
            cannot be reached.
    """
    if not place.strip():
        raise ConfigError("OUT: expected a folder or a URL, found an empty text")
    protocol, separator, path = place.partition("://")
    if not separator:
        return Folder(Path(place), place)
    if protocol in ("file", "local"):
        return Folder(Path(path), place)
    from fsspec.core import url_to_fs

    try:
        fs, root = url_to_fs(place)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        hint = f"pip install 'sensebatch[{extra}]'" if extra else str(error)
        raise ConfigError(f"{place}: a package for {protocol}:// is missing: {hint}") from error
    except Exception as error:
        raise ConfigError(f"{place}: cannot be used: {_said(error)}") from error
    return Remote(fs, root, place)
