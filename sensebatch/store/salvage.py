"""What a run's folder still has: rows in a damaged state and in the log, images by their metadata.

Reads only.
"""

from __future__ import annotations

import re
import shutil
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sensebatch.errors import RunFolderError, StorageError
from sensebatch.jobs import IMAGE_MARK
from sensebatch.store import tables
from sensebatch.store.attempts import Marks, row_from_json
from sensebatch.store.database import Database
from sensebatch.store.images import EXTENSIONS, FORMATS, read_metadata
from sensebatch.store.log import PART_ROWS, stated_rows
from sensebatch.store.manifests import MANIFESTS
from sensebatch.store.migrations import NewerVersionError
from sensebatch.store.run_dir import RunDir
from sensebatch.store.shards import SHARD
from sensebatch.tasks import Task

_NEEDED = frozenset(
    {"id", "key", "task", "image_index", "prompt", "seed", "width", "height", "think", "sampling"}
)
"""What the metadata of an image must have for a row to be made of it."""
RUN = "run"
"""Name in `meta`: the folder's id."""
_PART_NAME = re.compile(r"part-(\d{5,})\.parquet")


class OldState:
    """A copy of a state that may be damaged, and what can be read of it.

    Args:
        path: The state database.
        folder: Where the copy goes; empty.

    Raises:
        NewerVersionError: A newer version made it.
        OSError: It cannot be copied.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self._path = path
        self._copy = folder / path.name
        self._database: Database | None = None
        self.problems: list[str] = []
        """What could not be read; complete once everything else was."""
        if not path.exists():
            self.problems.append(f"{path.name} is missing")
            return
        for ending in ("", "-wal", "-journal"):
            source = path.with_name(f"{path.name}{ending}")
            if source.exists():
                shutil.copyfile(source, folder / source.name)
        with self._reading():
            self._database = Database(self._copy, read_only=True)
        with self._reading() as db:
            found = "ok" if db is None else db.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if found != "ok":
                raise ValueError(found)

    def close(self) -> None:
        """Closes the copy."""
        if self._database is not None:
            self._database.close()

    def meta(self) -> dict[str, str]:
        """Returns what a new state is to know under the same names."""
        found: dict[str, str] = {}
        with self._reading() as db:
            if db is not None:
                found.update(db.execute("SELECT name, value FROM meta"))
        known = (RUN, MANIFESTS, tables.EXTENSION, SHARD)
        return {name: found[name] for name in known if name in found}

    def batches(self) -> dict[int, Sequence[tuple[str, str]]]:
        """Returns the members of each batch that was begun and not committed, by its number."""
        found: dict[int, Sequence[tuple[str, str]]] = {}
        with self._reading() as db:
            if db is not None:
                found.update((batch.seq, batch.members) for batch in tables.started_batches(db))
        return found

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields the rows of the log, from the first on and without a gap."""
        number = 0
        with self._reading() as db:
            if db is None:
                return
            for seq, text in db.execute("SELECT seq, row FROM attempts ORDER BY seq"):
                number += 1
                if seq != number:
                    raise ValueError(f"row {number} is missing")
                yield row_from_json(text)
            if not number:
                raise ValueError("it has no row")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        """Gives the copy; what is wrong with it is a problem, and not an error."""
        try:
            if self._database is None:
                yield None
            else:
                with self._database.reading() as db:
                    yield db
        except NewerVersionError as error:
            raise NewerVersionError(f"{self._path}: {self._reason(error)}") from error
        except (RunFolderError, StorageError) as error:
            # What to do about it is being done.
            why, _, _ = self._reason(error).partition("; ")
            self.problems.append(f"{self._path.name} is damaged: {why}")
        except (ValueError, KeyError) as error:
            self.problems.append(f"{self._path.name} is damaged: {error}")

    def _reason(self, error: Exception) -> str:
        """Returns what an error says, without the path of the copy."""
        return str(error).removeprefix(f"{self._copy}: ")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFile:
    """A file of the log that can be read to its end."""

    path: Path
    run: str | None
    """The id of the folder it is of; None in files of versions that did not say."""
    first: int
    """The number of its first row in the log, from 1."""

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields its rows with their numbers."""
        number = self.first
        with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
            marks = {field.name for field in fields(Marks)}
            columns = [name for name in file.schema_arrow.names if name not in marks]
            for batch in file.iter_batches(PART_ROWS, columns=columns):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1


def log_files(run_dir: RunDir) -> tuple[list[LogFile], list[str]]:
    """Returns the files that have all rows that can be read, and what is wrong with the others.

    That is log.parquet alone if it is whole; else its parts, which lack the latest rows.
    """
    problems: list[str] = []
    log = _readable(run_dir.log, 1, problems)
    if log is not None:
        return [log], problems
    parts = []
    for path in sorted(run_dir.log_parts.glob("*.parquet")):
        if match := _PART_NAME.fullmatch(path.name):
            part = _readable(path, int(match[1]) * PART_ROWS + 1, problems)
            parts += [] if part is None else [part]
    return parts, problems


def _readable(path: Path, first: int, problems: list[str]) -> LogFile | None:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for _ in file.iter_batches(PART_ROWS):
                pass
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
        return None
    except (OSError, ValueError, pa.ArrowException) as error:
        problems.append(f"{path.name} is damaged: {error}")
        return None
    stated = stated_rows(path)
    if stated is None:
        return LogFile(path=path, run=None, first=first)
    return LogFile(path=path, run=stated.run, first=stated.first or first)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundJob:
    """All files of a job, as the metadata in its images has it."""

    metadata: Mapping[str, Any]
    image_paths: tuple[str, ...]
    """In the run's folder, in the order drawn."""
    text_path: str | None
    written_at: datetime


def found_jobs(root: Path, claimed: Collection[str]) -> tuple[list[FoundJob], list[str]]:
    """Returns the jobs whose images are all there, and the files of no known job.

    Args:
        root: The run's folder.
        claimed: Files that are known to be of a job.
    """
    images: dict[tuple[str, str], list[tuple[int, str, Mapping[str, Any]]]] = {}
    unknown = set()
    for path in sorted((root / "images").rglob("*")):
        name = path.relative_to(root).as_posix()
        if name in claimed or not path.is_file():
            continue
        unknown.add(name)
        metadata = _metadata(path)
        if metadata is not None and name in _names(metadata, path.suffix):
            place = (metadata["image_index"], name, metadata)
            images.setdefault((metadata["id"], metadata["key"]), []).append(place)
    for path in sorted((root / "text").rglob("*")):
        name = path.relative_to(root).as_posix()
        if name not in claimed and path.is_file():
            unknown.add(name)
    jobs = []
    for own in images.values():
        own.sort(key=lambda place: place[0])
        if (job := _whole(root, own)) is not None:
            jobs.append(job)
            unknown -= {*job.image_paths, job.text_path}
    return jobs, sorted(unknown)


def _metadata(path: Path) -> Mapping[str, Any] | None:
    """Returns what is embedded in an image of ours; None where nothing is."""
    if path.suffix.removeprefix(".") not in EXTENSIONS.values():
        return None
    try:
        with Image.open(path, formats=FORMATS) as image:
            metadata = read_metadata(image)
    except (OSError, ValueError, SyntaxError):
        return None
    if not isinstance(metadata, dict) or not set(metadata) >= _NEEDED:
        return None
    return metadata if metadata["task"] in list(Task) else None


def _names(metadata: Mapping[str, Any], suffix: str) -> tuple[str, str]:
    """Returns where an image may be: that of a job with one, or one of several."""
    job_id, index = metadata["id"], metadata["image_index"]
    return f"images/{job_id}{suffix}", f"images/{job_id}/{index:03d}{suffix}"


def _whole(root: Path, images: Sequence[tuple[int, str, Mapping[str, Any]]]) -> FoundJob | None:
    """Returns a job if nothing of what it made is missing.

    Its text is written after its images, and says how many there are.
    """
    indexes, names, all_metadata = zip(*images, strict=True)
    metadata = all_metadata[0]
    spec = Task(metadata["task"]).spec
    if indexes != tuple(range(len(images))):
        return None
    times = [(root / name).stat().st_mtime_ns for name in names]
    text_path = None
    if spec.text.always or metadata["think"]:
        text_path = f"text/{metadata['id']}.txt"
        try:
            text = (root / text_path).read_text(encoding="utf-8")
            times.append((root / text_path).stat().st_mtime_ns)
        except (OSError, ValueError):
            return None
        if times[-1] < max(times) or (spec.text.always and text.count(IMAGE_MARK) != len(images)):
            return None
    return FoundJob(
        metadata=metadata,
        image_paths=tuple(names),
        text_path=text_path,
        written_at=datetime.fromtimestamp(max(times) / 1e9, UTC),
    )
