"""Removes the files of jobs that are no longer in the manifests, and nothing else.

A file goes only if it is still the one that such a job made, by its SHA-256, and no job of the
manifests has it or starts from it. What was put in its place since stays. So do the files of jobs
whose manifest the latest run merely did not read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sensebatch.store.attempts import digests_of, row_from_json
from sensebatch.store.codec import job_from_json
from sensebatch.store.files import sha256_of
from sensebatch.store.run_dir import RunDir
from sensebatch.store.state import RemovedJob, State
from sensebatch.store.store import open_store, require_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedFile:
    """A file of a removed job."""

    job_id: str
    path: str
    """In the run's folder."""
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prunable:
    """What there is to remove, and what is left."""

    numbers: tuple[int, ...]
    """Numbers of the removed jobs in the state."""
    files: tuple[PrunedFile, ...]
    changed: tuple[str, ...]
    """Files that are no longer as the job made them; they stay."""
    inputs: tuple[str, ...]
    """Images that a job of the manifests starts from; they stay."""
    unread: tuple[str, ...]
    """Manifests that are still there, and that the latest run did not read; what their jobs made
    stays."""


def prunable(root: Path) -> Prunable:
    """Returns what `prune` would remove.

    Raises:
        RunFolderError: It is not a run's folder, or its state has to be rebuilt.
    """
    run_dir = RunDir(root)
    run_dir.require_state()
    with closing(State(run_dir.state, read_only=True)) as state:
        if not run_dir.in_use():
            require_whole(run_dir, state)
        return _prunable(root, state)


def prune(root: Path) -> Prunable:
    """Removes the files of removed jobs; returns which they were.

    The state forgets the files first, and has them removed then, so that a kill in between leaves
    nothing but what the next run removes.

    Raises:
        RunFolderError: It is not a run's folder, or a process works in it.
        StorageError: The file system failed; the next run removes the rest.
    """
    RunDir(root).require_state()
    with open_store(root) as store:
        found = _prunable(root, store.state)
        if found.numbers:
            store.state.forget_outputs(found.numbers, (file.path for file in found.files))
            store.remove_stale(store.state.stale_files())
            store.log.write()
        return found


def _prunable(root: Path, state: State) -> Prunable:
    listed, starts = state.outputs(), state.input_digests()
    inputs: list[str] = []
    numbers: list[int] = []
    files: list[PrunedFile] = []
    changed: list[str] = []
    unread: set[str] = set()
    for job in state.removed():
        manifest = job_from_json(job.definition).source.file
        if not state.is_read_last(manifest) and os.path.lexists(manifest):
            unread.add(manifest)
            continue
        numbers.append(job.number)
        for path, digest, is_whole in _files(root, job):
            if path in listed:
                continue
            if is_whole and digest in starts:
                inputs.append(path)
            elif is_whole:
                nbytes = (root / path).stat().st_size
                files.append(PrunedFile(job_id=job.id, path=path, nbytes=nbytes))
            else:
                changed.append(path)
    return Prunable(
        numbers=tuple(numbers),
        files=tuple(files),
        changed=tuple(changed),
        inputs=tuple(inputs),
        unread=tuple(sorted(unread)),
    )


def _files(root: Path, job: RemovedJob) -> Iterator[tuple[str, str, bool]]:
    """Yields the files of a job that are there, with their hashes and whether they still fit."""
    if job.row is None:
        return
    for path, digest in digests_of(row_from_json(job.row)):
        if os.path.lexists(root / path):
            yield path, digest, sha256_of(root / path) == digest
