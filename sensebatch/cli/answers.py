"""The answers of a run of questions: printed, and as the JSONL that upstream writes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sensebatch.manifest.jsonl import jsonl_rows
from sensebatch.manifest.rows import RawRow
from sensebatch.store.files import atomic_file
from sensebatch.store.finished import FinishedJob

ANSWERS_FILE = "answers.jsonl"


def answer_text(finished: FinishedJob) -> str:
    """Returns the answer of a finished job: its text without thoughts."""
    answer = finished.row.get("answer")
    return finished.read_text() or "" if answer is None else answer


def chances_line(finished: FinishedJob) -> str | None:
    """Returns the probabilities of a job's choices for people; None without choices."""
    found = _chances(finished)
    return ", ".join(f"{choice} {found[choice]:.1%}" for choice in found) or None


def answer_json(finished: FinishedJob) -> dict[str, Any]:
    """Returns an answer as plain data, with the probabilities of its choices if it has some."""
    job, chances = finished.job, _chances(finished)
    values: dict[str, Any] = {
        "id": job.id,
        "image": _alone([image.path for image in job.images]),
        "question": job.prompt,
        "answer": answer_text(finished),
    }
    return {**values, "choice_probabilities": chances} if chances else values


def write_answers(root: Path, answered: Iterable[FinishedJob], source: Path) -> Path:
    """Writes the answers of a JSONL manifest into the run's folder; returns the file.

    Args:
        root: The run's folder.
        answered: The finished jobs, in the order of the manifest.
        source: The manifest. Paths of images are written as it has them.

    Raises:
        StorageError: The file cannot be written.
    """
    rows = jsonl_rows(source, lambda *_: None)
    row: RawRow | None = None
    path = root / ANSWERS_FILE
    with atomic_file(path) as file:
        for finished in answered:
            line = int(finished.job.source.row.rpartition(" ")[2])
            while row is None or row.number < line:
                row = next(rows)
            values = answer_json(finished)
            images = row.fields.get("image", row.fields.get("images"))
            values["image"] = _alone(images) if isinstance(images, list) else images
            file.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
    return path


def _chances(finished: FinishedJob) -> dict[str, float]:
    choices = finished.job.sampling.choices
    return dict(zip(choices, finished.row.get("choice_probabilities") or (), strict=False))


def _alone(images: list[Any]) -> Any:
    """Returns the only one of some images, or all of them if there is another number."""
    return images[0] if len(images) == 1 else images or None
