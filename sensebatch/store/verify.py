"""Whether the files of a run are those that it wrote, by their SHA-256."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sensebatch.store.attempts import digests_of, row_from_json
from sensebatch.store.files import sha256_of
from sensebatch.store.run_dir import RunDir
from sensebatch.store.state import State


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedFile:
    """A file that a job is done with."""

    job_id: str
    path: str
    """In the run's folder."""
    found: str
    """`whole`, `changed` or `missing`."""


def verify(root: Path) -> Iterator[VerifiedFile]:
    """Yields every image and text that a job is done with, as it is read.

    Jobs that are no longer in the manifests count as well.

    Raises:
        RunFolderError: It is not a run's folder.
    """
    run_dir = RunDir(root)
    run_dir.require_state()
    with closing(State(run_dir.state, read_only=True)) as state:
        files = [
            (job_id, path, digest)
            for job_id, text in state.made()
            for path, digest in digests_of(row_from_json(text))
        ]
    for job_id, path, digest in files:
        found = sha256_of(root / path)
        yield VerifiedFile(job_id=job_id, path=path, found=_word(root / path, found, digest))


def _word(file: Path, found: str | None, expected: str) -> str:
    if found == expected:
        return "whole"
    return "changed" if file.exists() else "missing"
