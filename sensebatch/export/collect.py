"""The rows of an export, collected before anything is written: what is missing is said at once."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sensebatch.dataset.records import Record
from sensebatch.errors import ExportError, JobError
from sensebatch.export.columns import LOG_COLUMNS
from sensebatch.export.samples import ImageFile, Sample, prompt_group, sample_of
from sensebatch.export.shards import Row
from sensebatch.export.splits import Splits
from sensebatch.store.acceptance import Verdict
from sensebatch.store.attempts import HELD
from sensebatch.store.files import reason
from sensebatch.store.rows import SAMPLING_COLUMNS

NUM_NAMED = 5
"""Missing files that an error names."""
SETTINGS = (
    "model",
    "model_license",
    "checkpoint",
    "lora",
    "dtype",
    "precision",
    *(name for name in LOG_COLUMNS if name in SAMPLING_COLUMNS),
)
"""What a card says of how a set was made."""
MAX_VALUES = 20
"""Values of a setting that are kept."""
_UNKNOWN_BYTES = 2**19
"""Taken for the size of an image inside of a manifest."""


class Spool:
    """Keeps rows in a temporary file, since a set may have more of them than memory holds."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115, closed by __exit__

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, sample: Sample) -> int:
        """Keeps a row and returns its place."""
        place = self._file.seek(0, 2)
        pickle.dump(sample, self._file)
        return place

    def get(self, rows: Iterable[Row]) -> Iterator[Sample]:
        """Yields the rows of a plan."""
        for row in rows:
            self._file.seek(row.place)
            yield pickle.load(self._file)


@dataclass(slots=True, kw_only=True)
class Collected:
    """What there is to export."""

    rows: list[Row] = field(default_factory=list)
    not_done: int = 0
    """Selected jobs without images or text to export, besides those that were not needed."""
    not_needed: int = 0
    """Tries that are held since enough others are accepted, and what starts from such."""
    not_accepted: int = 0
    """Tries that were not accepted, what starts from them, and the questions about tries."""
    dropped: int = 0
    """Rejected tries whose images were removed, and questions about them; never in it."""
    look_alikes: int = 0
    """Jobs that were left out before, since their images look like those of an earlier one."""
    missing: list[str] = field(default_factory=list)
    """What is wrong with the files of jobs that are left out."""
    changed: list[str] = field(default_factory=list)
    """Which texts are not those that the run wrote; their jobs are left out too."""
    settings: dict[str, set[str]] = field(default_factory=dict)
    """The values of each of `SETTINGS`, as text."""


def collect(
    records: Iterable[Record],
    spool: Spool,
    splits: Splits,
    *,
    skip_missing: bool,
    with_rejected: bool = False,
) -> Collected:
    """Returns the rows of jobs that are done.

    Args:
        records: The selected jobs.
        spool: Keeps the rows.
        splits: Which of them each row is in.
        skip_missing: Whether jobs with missing files are left out.
        with_rejected: Whether tries that were not accepted are in it, and questions about tries.

    Raises:
        ExportError: Files are missing, all of which were looked for, or a text was changed.
    """
    found = Collected()
    for record in records:
        if not record.is_done:
            found.not_needed += record.status == HELD
            found.not_done += record.status != HELD
            continue
        if not (with_rejected or is_accepted(record)):
            found.not_accepted += 1
            continue
        if record.is_dropped or record.is_of_dropped:
            found.dropped += 1
            continue
        try:
            sample = sample_of(record)
            num_bytes = sum(_size(record.root, image) for image in sample.images)
        except (OSError, ValueError) as error:
            found.missing.append(f"job {record.job.id}: {_said(record.root, error)}")
            continue
        except JobError as error:
            found.changed.append(f"job {record.job.id}: {error}")
            continue
        found.rows.append(
            Row(
                task=sample.task,
                split=splits.of(prompt_group(sample)),
                digest=sample.digest,
                num_bytes=num_bytes + len(sample.canonical()),
                num_images=len(sample.images),
                place=spool.put(sample),
            )
        )
        _note(found.settings, sample)
    if found.missing and not skip_missing:
        raise ExportError(_missing(found.missing))
    if found.changed and not skip_missing:
        raise ExportError(damaged(found.changed[0]))
    return found


def damaged(problem: str) -> str:
    """Returns what ends an export because of a file that is not as it should be.

    Args:
        problem: The job and what is wrong with its file.
    """
    return (
        f"{problem}\n"
        "sensebatch status --verify checks all files; --skip-missing leaves such jobs out"
    )


def is_accepted(record: Record) -> bool:
    """Returns whether a job is an accepted try or none, no question about one, and whether all
    that it starts from is likewise."""
    is_accepted_itself = record.job.attempt_at is None or record.verdict is Verdict.ACCEPTED
    return is_accepted_itself and record.job.verdict is None and record.is_of_accepted


def _note(settings: dict[str, set[str]], sample: Sample) -> None:
    """Notes the settings that a row was made with."""
    for name in SETTINGS:
        values = settings.setdefault(name, set())
        value = sample.values.get(name)
        if value is not None and len(values) <= MAX_VALUES:
            values.add(str(value))


def _size(root: Path, image: ImageFile) -> int:
    if isinstance(image.source, str):
        return (root / image.source).stat().st_size
    if image.source.member is not None:
        return _UNKNOWN_BYTES
    # What another job has made is in the run's folder.
    folder = Path() if image.source.output is None else root
    return (folder / image.source.path).stat().st_size


def _said(root: Path, error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    file = Path(str(error.filename or ""))
    name = file.relative_to(root) if file.is_relative_to(root) else file
    return f"{name}: {reason(error)}"


def _missing(problems: list[str]) -> str:
    which = "1 job that lacks" if len(problems) == 1 else f"{len(problems):,} jobs that lack"
    lines = [f"expected the files of every job, found {which} some:"]
    lines += [f"  {problem}" for problem in problems[:NUM_NAMED]]
    if len(problems) > NUM_NAMED:
        lines.append(f"  ... and {len(problems) - NUM_NAMED:,} more")
    lines.append(
        "sensebatch run makes images and texts again; relative paths of input images are those "
        "from where it was started; --skip-missing leaves such jobs out"
    )
    return "\n".join(lines)
