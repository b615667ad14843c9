"""Where a run's state database lies, if not in the run's folder: on a disk of this machine.

The run's folder then has a file that says where, and the state's folder one that says whose it is.
Each is written before it is needed, so a kill at any moment leaves a state that is found.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import uuid
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sensebatch.bounded import in_the_way
from sensebatch.errors import RunFolderError
from sensebatch.store.file_systems import network_file_system
from sensebatch.store.files import repair_command, storage_errors, sync_folders, write_atomic

STATE = "state.db"
ENDINGS = ("", "-wal", "-shm", "-journal")
"""What is appended to the name of a database for it and for the files that SQLite has beside it."""
_POINTER = ".state-dir.json"
"""In a run's folder: where its state is."""
_OWNER = "run-folder.txt"
"""Beside a state: the run's folder that it is of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointer:
    """Where the state of a run's folder is."""

    state: str
    """Path of the database."""
    host: str
    """Name of the machine."""


def pointer_path(root: Path) -> Path:
    """Returns the path of the file that says where a folder's state is."""
    return root / _POINTER


def read_pointer(root: Path) -> Pointer | None:
    """Returns where the state of a run's folder is; None if it is in the folder itself."""
    try:
        return Pointer(**json.loads(pointer_path(root).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def state_path(root: Path) -> Path:
    """Returns the path of a folder's state database."""
    pointer = read_pointer(root)
    return root / STATE if pointer is None else Path(pointer.state)


def run_folder_of(state: Path) -> Path:
    """Returns the run's folder that a state database is of."""
    try:
        return Path((state.parent / _OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return state.parent


def require_found(root: Path) -> None:
    """Refuses a folder whose state is on another machine, or was removed.

    Raises:
        RunFolderError: It is not where the folder says.
    """
    pointer = read_pointer(root)
    if pointer is None or Path(pointer.state).is_file():
        return
    here = socket.gethostname()
    where = "" if here == pointer.host else f", and this is {here}"
    raise RunFolderError(
        f"{root}: expected its state at {pointer.state} on {pointer.host}, found none{where}; run "
        f"it there, or bring the folder {Path(pointer.state).parent.name} and say with --state-dir "
        f"what it lies in, or rebuild it with: {repair_command(root)} --state-dir DIR"
    )


def require_own(root: Path) -> None:
    """Refuses a copy of a run's folder, whose state is that of the other.

    Raises:
        RunFolderError: The state is that of another folder.
    """
    pointer = read_pointer(root)
    if pointer is None:
        return
    state = Path(pointer.state)
    if _is_of_another(root, pointer):
        raise RunFolderError(
            f"{root}: expected a state of its own, found {state}, which is that of "
            f"{run_folder_of(state)}; rebuild one for this folder with: {repair_command(root)} "
            "--state-dir DIR"
        )
    if run_folder_of(state) != root.resolve() and state.parent.is_dir():
        _write_owner(state.parent, root)


def _is_of_another(root: Path, pointer: Pointer) -> bool:
    """Whether a state is that of another folder, which is where it was and says so too."""
    owner = run_folder_of(Path(pointer.state))
    return owner != root.resolve() and read_pointer(owner) == pointer


def place_state(root: Path, folder: Path, *, is_lost: bool = False) -> Path:
    """Has the state of a run's folder in another folder from now on; returns its path.

    A state that is in the run's folder moves. One that was moved together with its folder is found
    by that folder's name.

    Args:
        root: The run's folder; held.
        folder: On a disk of this machine; made if it does not exist.
        is_lost: Whether a state that is not where it was is given up for a new one.

    Raises:
        RunFolderError: The folder is on a network or cannot be made, or the state is elsewhere.
        StorageError: The file system failed.
    """
    if (why := in_the_way(folder)) is not None:
        raise RunFolderError(f"--state-dir: expected a folder that can be made: {why}")
    found = network_file_system(folder)
    if found is not None:
        raise RunFolderError(
            f"--state-dir: expected a folder on a disk of this machine, found {folder} on {found}"
        )
    folder = folder.resolve()
    pointer = read_pointer(root)
    if pointer is not None and not (is_lost and _is_of_another(root, pointer)):
        state = Path(pointer.state)
        if state.parent.parent == folder and (state.is_file() or not is_lost):
            return state
        moved = folder / state.parent.name / STATE
        if moved.is_file():
            return _point(root, moved)
        if state.is_file():
            raise RunFolderError(
                f"{root}: expected --state-dir {state.parent.parent}, where its state is, found "
                f"{folder}; to move it, move {state.parent} there first"
            )
        if not is_lost:
            require_found(root)
    new = folder / f"{root.resolve().name}-{uuid.uuid4().hex[:8]}" / STATE
    with storage_errors(new.parent):
        new.parent.mkdir(parents=True)
    if pointer is None and (root / STATE).is_file() and not is_lost:
        _copy(root / STATE, new)
    return _point(root, new)


def remove_left(root: Path) -> None:
    """Removes a state from a run's folder that has another one in the meantime."""
    if read_pointer(root) is not None and state_path(root).is_file():
        for ending in ENDINGS:
            with storage_errors(root):
                (root / f"{STATE}{ending}").unlink(missing_ok=True)


def forget(root: Path) -> None:
    """Removes a state that is elsewhere, of a run that never had a job."""
    pointer = read_pointer(root)
    if pointer is None:
        return
    state = Path(pointer.state)
    with suppress(OSError):
        for ending in ENDINGS:
            state.with_name(f"{STATE}{ending}").unlink(missing_ok=True)
        (state.parent / _OWNER).unlink(missing_ok=True)
        state.parent.rmdir()
        pointer_path(root).unlink(missing_ok=True)


def _point(root: Path, state: Path) -> Path:
    _write_owner(state.parent, root)
    pointer = Pointer(state=str(state), host=socket.gethostname())
    write_atomic(pointer_path(root), json.dumps(asdict(pointer)).encode())
    sync_folders([pointer_path(root)], root)
    return state


def _write_owner(folder: Path, root: Path) -> None:
    write_atomic(folder / _OWNER, str(root.resolve()).encode())
    sync_folders([folder / _OWNER], folder.parent)


def _copy(state: Path, new: Path) -> None:
    """Copies a database with what its WAL holds."""
    with storage_errors(new):
        with closing(sqlite3.connect(state)) as source, closing(sqlite3.connect(new)) as target:
            source.backup(target)
        with new.open("rb+") as file:
            os.fsync(file.fileno())
