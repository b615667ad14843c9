"""What a run's folder has made, job by job: the one way in for everything that is done with it.

Listings, galleries and exports read jobs here, never the state or the log on their own: a record
has the row of the log that is current, so that no caption ends up at an image of another attempt.
Jobs are read one by one, also while a run works in the folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sensebatch.dataset.duplicates import near_duplicates
from sensebatch.dataset.picks import Pick, PickedJob, Picks
from sensebatch.dataset.selection import Selection, Selector, check_matrix
from sensebatch.declarations import declared, plain
from sensebatch.jobs import Job, Sampling
from sensebatch.store.acceptance import Judgement, Verdict
from sensebatch.store.attempts import DONE, row_from_json
from sensebatch.store.codec import job_from_json
from sensebatch.store.log import ROW_SCHEMA
from sensebatch.store.run_dir import RunDir
from sensebatch.store.state import DescribedJob, State

TAGS = "tags"
"""Name in a job's metadata: its tags."""

OWN_COLUMNS = ("id", "status", "verdict", "score", "in_manifest", "attempts", "pick", TAGS, "text")
"""What a record has besides the columns of the log, or in the place of one of them."""

SETTINGS = tuple(declared(Sampling))
"""The sampling settings; those that the log leaves out are columns of a record too."""

COLUMNS = tuple(dict.fromkeys((*OWN_COLUMNS, *ROW_SCHEMA.names, *SETTINGS, "system_prompt")))
"""The names of all that `Record.values` returns."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A job, and what is there of it now."""

    root: Path
    """The run's folder."""
    job: Job
    key: str
    """The hash of everything that its pixels and text depend on."""
    status: str
    """`pending`, `done` or `failed`: what the job is now."""
    in_manifest: bool
    """Whether the job is in the manifests still."""
    attempts: int
    row_text: str | None = field(repr=False)
    """The row as the state keeps it."""
    judgement: Judgement | None = None
    """What is known of a try that was asked about; None for any other job."""
    is_of_accepted: bool = True
    """Whether all tries that it starts from, itself or through others, are accepted."""
    is_of_dropped: bool = False
    """Whether it starts from an image that was removed since it was rejected."""
    picked: PickedJob = field(default_factory=PickedJob)
    """What a person said of it."""

    @property
    def id(self) -> str:
        """The job's id."""
        return self.job.id

    @cached_property
    def row(self) -> Mapping[str, Any] | None:
        """The row of the log that says what the job is now; docs/log.md explains the columns.

        None for a job that was not tried yet, was edited since, or has lost its files.
        """
        return None if self.row_text is None else row_from_json(self.row_text)

    @property
    def is_done(self) -> bool:
        """Whether its files are there."""
        return self.status == DONE and self.row_text is not None

    @property
    def verdict(self) -> Verdict | None:
        """What became of a try that was judged; None for any other job."""
        return None if self.judgement is None else self.judgement.verdict

    @property
    def is_dropped(self) -> bool:
        """Whether it was rejected and its files were removed."""
        return self.row is not None and bool(self.row.get("dropped"))

    @property
    def image_files(self) -> tuple[Path, ...]:
        """Its images, in the order drawn; none unless it is done, and not those dropped."""
        if self.row is None or not self.is_done or self.is_dropped:
            return ()
        return tuple(self.root / path for path in self.row["image_paths"])

    @property
    def text_file(self) -> Path | None:
        """Its think or interleave text; None without one, and unless it is done."""
        if not self.is_done or self.row is None or self.row["text_path"] is None or self.is_dropped:
            return None
        return self.root / self.row["text_path"]

    def read_text(self) -> str | None:
        """Returns the text, read from its file; None without one.

        Raises:
            OSError: The file is missing or cannot be read.
        """
        return None if self.text_file is None else self.text_file.read_text(encoding="utf-8")

    @property
    def finish_reason(self) -> str | None:
        """Why its text ended; None unless it is done, and where an earlier version made it."""
        return None if self.row is None else self.row.get("finish_reason")

    @property
    def phashes(self) -> tuple[str, ...]:
        """The perceptual hash of each image; none where they were not computed."""
        return tuple((self.row.get("image_phash") if self.row and self.is_done else None) or ())

    @property
    def pick(self) -> Pick | None:
        """Whether a person keeps or rejects it."""
        return self.picked.pick

    @cached_property
    def tags(self) -> tuple[str, ...]:
        """The job's tags, then those that a person gave it."""
        own = self.job.metadata.get(TAGS)
        words = own if isinstance(own, list | tuple) else () if own is None else (own,)
        return tuple(dict.fromkeys((*map(str, words), *self.picked.tags)))

    @property
    def matrix(self) -> Mapping[str, Any]:
        """The values of the row's matrix that made the job."""
        return self.job.matrix

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """What the manifest passed through, without tags."""
        return {name: value for name, value in self.job.metadata.items() if name != TAGS}

    def value(self, name: str) -> Any:
        """Returns one of `COLUMNS`, as plain data; None where it is not known."""
        if name in _OWN:
            return _OWN[name](self)
        if name in _OF_JOB:
            return _OF_JOB[name](self.job)
        return None if self.row is None else self.row.get(name)

    def values(self) -> dict[str, Any]:
        """Returns all `COLUMNS` but the text by name."""
        return {name: self.value(name) for name in COLUMNS if name != "text"}


def _text(record: Record) -> str | None:
    try:
        return record.read_text()
    except OSError:
        return None


def _setting(name: str) -> Callable[[Job], Any]:
    return lambda job: plain(getattr(job.sampling, name))


_OWN: Mapping[str, Callable[[Record], Any]] = {
    "id": lambda record: record.job.id,
    "job_id": lambda record: record.job.id,
    "key": lambda record: record.key,
    "status": lambda record: record.status,
    "verdict": lambda record: None if record.verdict is None else record.verdict.value,
    "score": lambda record: None if record.judgement is None else record.judgement.score,
    "in_manifest": lambda record: record.in_manifest,
    "attempts": lambda record: record.attempts,
    "pick": lambda record: None if record.pick is None else record.pick.value,
    TAGS: lambda record: list(record.tags),
    "text": _text,
}
"""What a record says itself."""

_OF_JOB: Mapping[str, Callable[[Job], Any]] = {
    "task": lambda job: job.task.value,
    "prompt": lambda job: job.prompt,
    "seed": lambda job: job.seed,
    "width": lambda job: None if job.resolution is None else job.resolution.width,
    "height": lambda job: None if job.resolution is None else job.resolution.height,
    **{name: _setting(name) for name in SETTINGS},
    "think": lambda job: job.think,
    "system_prompt": lambda job: job.system_prompt,
    "num_input_images": lambda job: len(job.images),
    "input_image_paths": lambda job: [image.place for image in job.images],
    "input_image_sha256": lambda job: [image.sha256 for image in job.images],
    "source_file": lambda job: job.source.file,
    "source_row": lambda job: job.source.row,
    "metadata": lambda job: json.dumps(dict(job.metadata), ensure_ascii=False, sort_keys=True),
    "matrix": lambda job: json.dumps(dict(job.matrix), ensure_ascii=False),
}
"""What the job says, whatever was logged of it: its tags, its metadata and its place in the
manifest may have changed since it was drawn."""


class Dataset:
    """The jobs of a run's folder.

    Args:
        root: The folder.
        state: Its database, open to be read.
    """

    def __init__(self, root: Path, state: State) -> None:
        self.root = root
        self._state = state

    @property
    def run_id(self) -> str:
        """The folder's id: 12 hex digits, drawn when it was made."""
        return self._state.run_id

    @property
    def knows_manifests(self) -> bool:
        """Whether manifests were read since `sensebatch repair`, which finds neither the input
        images of jobs nor what was decided about tries."""
        return self._state.knows_manifests

    @cached_property
    def extra_columns(self) -> Mapping[str, str]:
        """Names of matrix and metadata that `COLUMNS` has not, and in which of the two they are."""
        metadata = dict.fromkeys(self._state.names_in("metadata"), "metadata")
        found = {**metadata, **dict.fromkeys(self._state.names_in("matrix"), "matrix")}
        return {name: where for name, where in found.items() if name not in COLUMNS}

    def stale_picks(self, picks: Picks) -> tuple[list[str], list[str]]:
        """Returns the ids of picks that do not count: of unknown jobs, and of replaced images.

        Raises:
            ConfigError: The file has no picks of the folder.
        """
        known = self._state.keys_of(picks.of_run(self.run_id))
        unknown, replaced = [], []
        for job_id, picked in picks.of_run(self.run_id).items():
            if job_id not in known:
                unknown.append(job_id)
            elif picked.key not in (None, known[job_id]):
                replaced.append(job_id)
        return unknown, replaced

    def records(
        self, selection: Selection | None = None, *, look_alikes: list[str] | None = None
    ) -> Iterator[Record]:
        """Yields jobs in the order of the manifests, those that are no longer in them last.

        Args:
            selection: Which; None for all jobs in the manifests.
            look_alikes: Takes the ids of the jobs that `selection.dedupe` leaves out, before the
                first job.

        Raises:
            ConfigError: The selection does not fit the folder; raised before the first job.
        """
        selection = Selection() if selection is None else selection
        if selection.matrix:
            check_matrix(selection.matrix, self._state.names_in("matrix"))
        selector = Selector(selection, self.run_id, COLUMNS, lambda: self.extra_columns)
        if selection.dedupe is None:
            return self._chosen(selection, selector)
        firsts = near_duplicates(self._chosen(selection, selector), selection.dedupe)
        left_out = {job_id: first for job_id, first in firsts.items() if first != job_id}
        if look_alikes is not None:
            look_alikes += left_out
        return (record for record in self._chosen(selection, selector) if record.id not in left_out)

    def _chosen(self, selection: Selection, selector: Selector) -> Iterator[Record]:
        return selector.chosen(
            _record(self.root, described, selector)
            for described in self._state.described(removed=selection.removed)
        )


def _record(root: Path, described: DescribedJob, selector: Selector) -> Record:
    job = job_from_json(described.definition)
    return Record(
        root=root,
        job=job,
        key=described.key,
        status=described.status,
        in_manifest=described.in_manifest,
        attempts=described.attempts,
        row_text=described.row,
        judgement=described.judgement,
        is_of_accepted=described.is_of_accepted,
        is_of_dropped=described.is_of_dropped,
        picked=selector.picked(job.id, described.key),
    )


@contextmanager
def open_dataset(root: Path) -> Iterator[Dataset]:
    """Opens a run's folder to be read; works while a run writes it.

    Raises:
        RunFolderError: It is not a run's folder, or its state has to be rebuilt.
    """
    run_dir = RunDir(root)
    run_dir.require_state()
    state = State(run_dir.state, read_only=True)
    try:
        yield Dataset(root, state)
    finally:
        state.close()
