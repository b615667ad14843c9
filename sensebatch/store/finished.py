"""Reads the jobs of a run that are done, with what they made; works during the run."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sensebatch.jobs import Job
from sensebatch.store.acceptance import Verdict
from sensebatch.store.attempts import row_from_json
from sensebatch.store.codec import job_from_json
from sensebatch.store.run_dir import RunDir
from sensebatch.store.state import State

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedJob:
    """A job that is done, and what it made."""

    job: Job
    key: str
    """The hash of everything that its pixels and text depend on."""
    image_files: tuple[Path, ...]
    """Its images, in the order drawn."""
    text_file: Path | None
    """Its think or interleave text; None without one."""
    row: Mapping[str, Any]
    """The log's row about the attempt that made them; docs/log.md explains the columns."""
    verdict: Verdict | None = None
    """What became of it if it is a try that was judged; None for any other job."""

    def open_images(self) -> list[Image.Image]:
        """Returns the images, read from their files.

        Raises:
            OSError: A file is missing or cannot be read.
        """
        from PIL import Image

        return [Image.open(io.BytesIO(file.read_bytes())) for file in self.image_files]

    def read_text(self) -> str | None:
        """Returns the text, read from its file; None without one.

        Raises:
            OSError: The file is missing or cannot be read.
        """
        return None if self.text_file is None else self.text_file.read_text(encoding="utf-8")


def finished_jobs(root: Path) -> Iterator[FinishedJob]:
    """Yields the jobs of the latest manifests that are done, in the order of the manifests.

    Tries that were rejected are among them, as long as they have their files.

    Args:
        root: The run's folder.

    Raises:
        RunFolderError: It is not a run's folder.
    """
    run_dir = RunDir(root)
    run_dir.require_state()
    state = State(run_dir.state, read_only=True)
    try:
        verdicts = state.verdicts()
        for definition, key, text in state.finished():
            row = row_from_json(text)
            text_path = row["text_path"]
            job = job_from_json(definition)
            yield FinishedJob(
                job=job,
                verdict=verdicts.get(job.id),
                key=key,
                image_files=tuple(root / path for path in row["image_paths"]),
                text_file=None if text_path is None else root / text_path,
                row=row,
            )
    finally:
        state.close()
