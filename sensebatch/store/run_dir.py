"""The run's folder: what lies where, who holds it, and the settings it was made with.

Knows paths only; what is in `state.db` or in an image is known elsewhere.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from sensebatch.bounded import in_the_way, is_unicode
from sensebatch.errors import JobError, RunFolderError, StorageError
from sensebatch.store import state_dir
from sensebatch.store.files import (
    reason,
    repair_command,
    storage_errors,
    sync_folders,
    write_atomic,
)
from sensebatch.yaml_values import YamlTextError, dump_yaml, read_yaml

_NO_FOLDER = frozenset(
    {
        errno.EACCES,
        errno.EEXIST,
        errno.EINVAL,
        errno.EILSEQ,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    }
)
"""Errors of making a folder that another path would not have."""

_PUT_BACK = "put back what was there and run the same command again"

LOCK_WAIT_S = 2.0
"""How long a run waits for the lock: `status` holds it for a moment to see whether it is free."""


class RunDir:
    """The layout of a run's folder.

    Args:
        root: The folder; made by `locked`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.settings = root / "run.yaml"
        self.state = state_dir.state_path(root)
        """The state database, in this folder or where the folder says."""
        self.log = root / "log.parquet"
        self.summary = root / "summary.txt"
        self.messages = root / "run.log"
        self.images = root / "images"
        self.text = root / "text"
        self.errors = root / "errors"
        self.log_parts = root / "log"
        self.kept_images = root / "checkpoints"
        self._lock = root / ".lock"
        self._held: int | None = None
        """A descriptor of the lock's file while this process holds it, if its identity is known."""
        self._holder = root / ".lock-holder.json"

    def image_name(self, job_id: str, extension: str, index: int | None = None) -> str:
        """Returns an image's path in the folder, with `/`; an interleave job's has an `index`.

        Raises:
            JobError: The id would leave the folder.
        """
        name = f"{_checked(job_id)}.{extension}"
        if index is not None:
            name = f"{_checked(job_id)}/{index:03d}.{extension}"
        return f"images/{name}"

    def text_name(self, job_id: str) -> str:
        """Returns the path, in the folder, of a job's think or interleave text."""
        return f"text/{_checked(job_id)}.txt"

    def error_name(self, job_id: str, attempt: int) -> str:
        """Returns the path, in the folder, of a failed attempt's traceback."""
        return f"errors/{_checked(job_id)}-{attempt}.txt"

    @contextmanager
    def locked(self, *, needs_state: bool = True) -> Iterator[None]:
        """Makes the folder and holds it for one process; the lock dies with the process.

        Args:
            needs_state: Whether images without a state database are refused.

        Raises:
            RunFolderError: Another process holds it, what is there is not a run's folder, or none
                can be made there.
            StorageError: The file system failed, or a part of the folder has something else in its
                place.
        """
        self._make()
        with storage_errors(self.root):
            self._require_parts()
            if needs_state:
                self.require_state_or_nothing()
        lock = FileLock(self._lock)
        with storage_errors(self._lock):
            try:
                lock.acquire(timeout=LOCK_WAIT_S)
            except Timeout:  # an OSError as well
                raise RunFolderError(
                    f"{self.root}: in use by another run{self._held_by()}; wait for it or stop it"
                ) from None
        self._held = _open_known(self._lock)
        try:
            holder = {"pid": os.getpid(), "host": socket.gethostname()}
            write_atomic(self._holder, json.dumps(holder).encode())
            yield
        finally:
            try:
                if not self._has_lost_lock():
                    with suppress(OSError):
                        self._holder.unlink(missing_ok=True)
            finally:
                if self._held is not None:
                    os.close(self._held)
                    self._held = None
                lock.release()

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Keeps processes from working in the folder during the block, if this user may.

        Raises:
            RunFolderError: One works in it.
        """
        lock = FileLock(self._lock)
        try:
            lock.acquire(timeout=LOCK_WAIT_S)
        except Timeout:  # an OSError as well
            raise RunFolderError(
                f"{self.root}: in use by a run{self._held_by()}; wait for it or stop it"
            ) from None
        except (OSError, NotImplementedError):
            if self.in_use():
                raise RunFolderError(
                    f"{self.root}: in use by a run{self._held_by()}; wait for it or stop it"
                ) from None
        try:
            yield
        finally:
            lock.release()

    def _make(self) -> None:
        """Makes the folder if it is not there."""
        if not is_unicode(str(self.root)):
            # The log and the state hold it as text.
            raise RunFolderError(f"{str(self.root)!a}: expected a folder whose name is UTF-8")
        with storage_errors(self.root):
            try:
                self.root.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                if error.errno not in _NO_FOLDER:
                    raise
                self.require_nothing_in_the_way()
                raise RunFolderError(
                    f"{self.root}: expected a folder that can be made: {reason(error)}"
                ) from None

    def require_nothing_in_the_way(self) -> None:
        """Refuses a path at which no folder can be, without making one.

        Raises:
            RunFolderError: There is a file at it, or at one of the folders it would lie in.
        """
        if (why := in_the_way(self.root)) is not None:
            raise RunFolderError(f"{self.root}: expected a folder that can be made: {why}")

    def _require_parts(self) -> None:
        """Refuses a folder in which something else has the place of a folder or a file.

        Jobs would fail one by one, or be taken for jobs whose files were deleted.
        """
        for path in (self.images, self.text, self.errors, self.kept_images, self.log_parts):
            if os.path.lexists(path) and not path.is_dir():
                found = "a link that leads nowhere" if path.is_symlink() else "a file"
                raise StorageError(f"{path}: expected a folder, found {found}; {_PUT_BACK}")
        for path in (self.state, self.log, self.settings, self.summary, self._lock, self._holder):
            if path.is_dir():
                raise StorageError(f"{path}: expected a file, found a folder; {_PUT_BACK}")

    def require_in_place(self) -> None:
        """Stops a run whose folder was moved, removed or unmounted, or whose lock was removed.

        Files would go to a new folder of its name, and the open state database would answer for
        them from where nobody looks. Without its lock, another process may work in the folder, and
        each would remove the files of the other.

        Raises:
            StorageError: It is no longer where it was, or its state or its lock is not.
        """
        with storage_errors(self.root):
            if not (self.state.exists() and self._says_where_state_is()):
                if self._lock.exists():
                    raise StorageError(
                        f"{self.state}: expected the state of the run, found it removed; bring it "
                        f"back, or rebuild it with: {repair_command(self.root)}"
                    )
                raise StorageError(
                    f"{self.root}: expected the run's folder where it was, found it moved, removed "
                    "or unmounted; bring it back and run the same command again"
                )
            if self._has_lost_lock():
                raise StorageError(
                    f"{self._lock}: expected the lock of this run, found it removed or replaced; "
                    "another run may have begun in the folder: make sure that none works there and "
                    "run the same command again"
                )

    def _has_lost_lock(self) -> bool:
        """Returns whether the lock that this process holds is no longer the one in the folder.

        Where that cannot be told, it is not.
        """
        if self._held is None:
            return False
        try:
            return not os.path.samestat(os.fstat(self._held), self._lock.stat())
        except FileNotFoundError:
            return True
        except OSError:
            return False

    def _says_where_state_is(self) -> bool:
        is_here = self.state.parent == self.root
        return is_here or state_dir.pointer_path(self.root).exists()

    def place_state(self, folder: Path, *, is_lost: bool = False) -> None:
        """Has the state database in another folder from now on; see `state_dir.place_state`."""
        self.state = state_dir.place_state(self.root, folder, is_lost=is_lost)

    def settle_state(self) -> None:
        """Finishes what a process was killed at that moved the state, and makes its folder.

        Raises:
            RunFolderError: The state is that of another run's folder.
            StorageError: The file system failed.
        """
        state_dir.require_own(self.root)
        state_dir.remove_left(self.root)
        with storage_errors(self.state.parent):
            self.state.parent.mkdir(parents=True, exist_ok=True)

    def missing_folders(self) -> list[Path]:
        """Returns the folders that `locked` is going to make, the innermost first."""
        return [folder for folder in (self.root, *self.root.parents) if not _exists(folder)]

    def remove_unused(self, folders: Sequence[Path]) -> None:
        """Removes the files of a run that never had a job, then folders as far as they are empty.

        Args:
            folders: Of `missing_folders`, before the run was opened.
        """
        state = [self.root / f"{state_dir.STATE}{ending}" for ending in state_dir.ENDINGS]
        state_dir.forget(self.root)
        with suppress(OSError):
            for path in (*state, self.log, self._holder, self._lock):
                path.unlink(missing_ok=True)
            for folder in folders:
                folder.rmdir()

    def in_use(self) -> bool:
        """Returns whether a process works in the folder now; needs no right to write there."""
        try:
            return _is_locked(self._lock)
        except OSError:  # no lock, or one that cannot be read
            return False

    def _held_by(self) -> str:
        try:
            holder = json.loads(self._holder.read_text())
            return f" (process {holder['pid']} on {holder['host']})"
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def require_state(self) -> None:
        """Refuses to look at a folder without a state database.

        Raises:
            RunFolderError: There is none.
        """
        if not self.state.is_file():
            state_dir.require_found(self.root)
            hint = f"; rebuild it with: {repair_command(self.root)}" if self.has_outputs() else ""
            raise RunFolderError(f"{self.root}: expected a run's folder, found no state.db{hint}")

    def require_state_or_nothing(self) -> None:
        """Refuses a folder with images and without a state database.

        Raises:
            RunFolderError: It is one.
        """
        if not self.state.exists():
            if self.has_outputs():
                state_dir.require_found(self.root)
            self._refuse_if_any("images", "text", "log.parquet", how="without state.db")

    def require_no_outputs(self) -> None:
        """Refuses a folder whose images a state database without a job cannot answer for.

        Raises:
            RunFolderError: There are some: what the state database knew of them is lost.
        """
        self._refuse_if_any("images", "text", how="and no job in state.db")

    def _refuse_if_any(self, *names: str, how: str) -> None:
        found = [name for name in names if (self.root / name).exists()]
        if found:
            raise RunFolderError(
                f"{self.root}: expected an empty folder or a run's, found {', '.join(found)} "
                f"{how}; choose another folder, or rebuild state.db from what is there with: "
                f"{repair_command(self.root)}"
            )

    def has_outputs(self) -> bool:
        """Returns whether there is anything that a run makes."""
        return any(path.exists() for path in (self.images, self.text, self.log))

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Writes run.yaml."""
        write_atomic(self.settings, dump_yaml(dict(settings)).encode())
        sync_folders([self.settings], self.root)


def read_settings(path: Path) -> dict[str, Any]:
    """Returns the content of a run.yaml, or nothing if it cannot be read."""
    try:
        found = read_yaml(path).value
    except (OSError, YamlTextError):
        return {}
    return found if isinstance(found, dict) else {}


def _open_known(path: Path) -> int | None:
    """Opens a file if its path and its descriptor say that they are the same one.

    Not every network file system has numbers by which to tell a file from another one.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    with suppress(OSError):
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    os.close(descriptor)
    return None


def _is_locked(path: Path) -> bool:
    """Returns whether a process holds a lock.

    Raises:
        OSError: The file cannot be read.
    """
    if fcntl is None:
        try:
            with FileLock(path).acquire(timeout=0):
                return False
        except Timeout:
            return True
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _exists(folder: Path) -> bool:
    """Returns whether a folder is there; one whose name cannot be used is not."""
    return os.path.exists(folder)  # noqa: PTH110, Path.exists raises for such a name


def _checked(job_id: str) -> str:
    path = PurePosixPath(job_id)
    if not job_id or path.is_absolute() or ".." in path.parts or "\\" in job_id:
        raise JobError(f"id {job_id!r}: expected a name that stays in the run's folder")
    return job_id
