"""The manifests that a run's folder belongs to: another one is refused, an unchanged one not read.

Knows files by their paths and by what the file system says of them, never what is in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import sensebatch
from sensebatch.errors import RunFolderError
from sensebatch.jobs import KEY_VERSION, ModelIdentity
from sensebatch.store import tables

_SETTLED_S = 2.0
"""Age from which every later change of a file shows in its times, on every common file system."""

_ABSENT = "absent"
"""The stamp of a place where there is nothing."""

MANIFESTS, _READ = "manifests", "read"
"""Names in `meta`: the manifests of the folder, and what decided the latest reading."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestFiles:
    """Files whose rows, with the settings and the images they name, are all that the jobs are."""

    paths: tuple[Path, ...]
    settings: str
    """Everything else that decides what a row means."""
    is_other: bool = False
    """Whether the user says that the folder shall belong to these manifests as well."""


class Reading:
    """One reading of manifests: whether it is needed, what it depends on, and whose folder it is.

    Args:
        db: Inside a transaction.
        files: The manifests; None where jobs have another source.
        identity: The model, on which every job's key depends.
        root: The run's folder.
    """

    def __init__(
        self,
        db: sqlite3.Connection,
        files: ManifestFiles | None,
        identity: ModelIdentity,
        root: Path,
    ) -> None:
        self._db = db
        self._files = files
        self._identity = identity
        self._root = root
        self._started = time.time()

    def is_known(self) -> bool:
        """Returns whether the latest reading had the same files and settings, all unchanged."""
        if self._files is None or tables.get_meta(self._db, _READ) != self._depends_on():
            return False
        stamps = self._db.execute("SELECT path, stamp FROM inputs")
        return all(_is_unchanged(path, stamp) for path, stamp in stamps)

    def begin(self) -> None:
        """Forgets what the reading before depended on."""
        self._db.execute("DELETE FROM meta WHERE name = ?", (_READ,))
        self._db.execute("DELETE FROM inputs")

    def add(self, paths: Iterable[str]) -> None:
        """Records files that a job is made of, as they are now."""
        if self._files is not None:
            stamps = [(path, _stamp(path, changed_before=self._started)) for path in paths]
            self._db.executemany("INSERT OR IGNORE INTO inputs VALUES (?, ?)", stamps)

    def add_absent(self, paths: Iterable[str]) -> None:
        """Records places where there is nothing, and where a file would change what a job is."""
        if self._files is not None:
            stamps = [(path, _ABSENT) for path in paths]
            self._db.executemany("INSERT OR IGNORE INTO inputs VALUES (?, ?)", stamps)

    def finish(self, *, same: int, replaced: int) -> None:
        """Records that the folder belongs to the manifests, and that they were read.

        Args:
            same: Jobs that the folder had before, with the same key.
            replaced: Jobs of the folder with files that another definition will replace.

        Raises:
            RunFolderError: The folder belongs to other manifests.
        """
        if self._files is None:
            return
        known = json.loads(tables.get_meta(self._db, MANIFESTS) or "[]")
        own = [list(self._places(path)) for path in self._files.paths]
        if not _is_own(known, own) and not self._files.is_other and self._has_outputs():
            missing = not any(os.path.lexists(path) for path, _ in known)
            if not known or (same and (missing or not replaced)):
                # The folder of an earlier version, or manifests that were moved or renamed.
                known = [place for place in known if os.path.lexists(place[0])]
            else:
                raise self._refusal([path for path, _ in known])
        merged = [place for place in known if place not in own] + own
        tables.set_meta(self._db, MANIFESTS, json.dumps(merged))
        self.add(str(path) for path in self._files.paths)
        tables.set_meta(self._db, _READ, self._depends_on())

    def _depends_on(self) -> str:
        """Returns a hash of all that decides the jobs besides the files' content."""
        assert self._files is not None
        content = [
            sensebatch.__version__,
            KEY_VERSION,
            os.getcwd(),  # noqa: PTH109, jobs hold paths as they are written
            [str(path) for path in self._files.paths],
            self._files.settings,
            asdict(self._identity),
        ]
        return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogatepass")).hexdigest()

    def _places(self, path: Path) -> tuple[str, str]:
        """Returns a manifest's absolute path, and the one from the run's folder."""
        absolute = os.path.abspath(path)  # noqa: PTH100, a link is a place of its own
        return absolute, os.path.relpath(absolute, self._root)

    def _has_outputs(self) -> bool:
        query = "SELECT 1 FROM jobs WHERE outputs <> '[]' LIMIT 1"
        return self._db.execute(query).fetchone() is not None

    def _refusal(self, known: Sequence[str]) -> RunFolderError:
        assert self._files is not None
        return RunFolderError(
            f"{self._root}: belongs to {', '.join(known)}, found another manifest, "
            f"{', '.join(str(path) for path in self._files.paths)}; give it an --output-dir of its "
            "own, or say --other-manifest to have its jobs in this folder as well"
        )


def _is_own(known: Sequence[Sequence[str]], places: Sequence[Sequence[str]]) -> bool:
    """Whether all manifests are the folder's: at their places, or moved together with it."""
    absolute = {path for path, _ in known}
    relative = {path for _, path in known}
    return all(path in absolute for path, _ in places) or all(
        path in relative for _, path in places
    )


def _is_unchanged(path: str, stamp: str) -> bool:
    if stamp == _ABSENT:
        return not os.path.exists(path)  # noqa: PTH110, as many of them
    return bool(stamp) and stamp == _stamp(path)


def _stamp(path: str, *, changed_before: float | None = None) -> str:
    """Returns what the file system says of a file; empty if that may miss a change of it."""
    try:
        found = os.stat(path)  # noqa: PTH116, hundreds of thousands of them
    except (OSError, ValueError):
        return ""
    latest = max(found.st_mtime, found.st_ctime)
    if changed_before is not None and latest > changed_before - _SETTLED_S:
        return ""
    fields = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
    return " ".join(map(str, fields))
