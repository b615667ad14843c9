"""Items of a gallery: what is shown of each job, from its record.

Knows records, not the page's files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensebatch.bounded import read_file
from sensebatch.dataset.records import Record
from sensebatch.declarations import declared
from sensebatch.gallery.columns import word
from sensebatch.gallery.rows import command_line, manifest_row
from sensebatch.jobs import InputImage, Sampling
from sensebatch.store.acceptance import Asked
from sensebatch.store.attempts import FAILED
from sensebatch.store.files import reason
from sensebatch.tasks import Output

InputOf = Callable[[InputImage, Path], Mapping[str, str]]
"""Returns what is shown of an input image of a run's folder."""

MAX_SNIPPET = 240
"""Characters of a text that stand for the image of a job that makes none."""
MAX_TEXT_BYTES = 2**20
"""Most that is read of a text or a traceback."""

_NOT_COLUMNS = frozenset(
    {
        "attempts",
        "batch_id",
        "choice_log_probabilities",
        "choice_probabilities",
        "current",
        "error_file",
        "error_message",
        "history",
        "id",
        "image_paths",
        "image_phash",
        "image_sha256",
        "input_image_paths",
        "input_image_sha256",
        "job_id",
        "key",
        "matrix",
        "metadata",
        "pick",
        "prompt",
        "run",
        "shared_figures",
        "source_row",
        "system_prompt",
        "text",
        "text_path",
        "text_sha256",
    }
)
"""What a record has that items are not filtered by, or only in another form."""
_MORE = {
    "source_file": "manifest",
    "source_row": "row of the manifest",
    "batch_id": "batch",
    "choice_probabilities": "probabilities of the choices",
    "system_prompt": "system prompt",
    "error_file": "traceback file",
}
"""Texts that are shown with an item and are not columns, by what they are called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One job, as the gallery has it."""

    id: str
    key: str
    prompt: str
    values: Mapping[str, Any]
    """By the name of the column."""
    matrix: Mapping[str, Any]
    metadata: Mapping[str, Any]
    images: tuple[tuple[str, str], ...]
    """(path in the run's folder, hash of the file) of each image."""
    snippet: str | None
    """The beginning of the text of a job that made no image."""
    details: Mapping[str, Any]
    """What is read when someone opens it."""


def make_item(record: Record, *, run: str, alike: str | None, input_of: InputOf) -> Item:
    """Returns what is shown of a job.

    Args:
        record: The job.
        run: What the gallery calls its run.
        alike: The first of the jobs whose images look like its own; None if there is no other.
        input_of: Returns what is shown of an input image of a run's folder.
    """
    row = record.row or {}
    is_done = record.is_done
    details = _details(record, input_of)
    text = details.get("text") if is_done and not row.get("image_paths") else None
    has_images = is_done and not record.is_dropped
    paths = row.get("image_paths") or () if has_images else ()
    digests = row.get("image_sha256") or () if has_images else ()
    return Item(
        id=record.job.id,
        key=record.key,
        prompt=record.job.prompt,
        values={"run": run, **_columns(record), **_likeness(record.id, alike)},
        matrix=record.matrix,
        metadata=record.metadata,
        images=tuple(zip(paths, digests, strict=True)),
        snippet=None if text is None else _without_thoughts(text)[:MAX_SNIPPET],
        details=details,
    )


def _likeness(job_id: str, alike: str | None) -> dict[str, Any]:
    if alike is None:
        return {}
    return {"near_duplicate": alike != job_id, "alike": alike}


def _columns(record: Record) -> dict[str, Any]:
    values = record.values()
    size = record.job.resolution
    columns = {name: _plain(value) for name, value in values.items() if name not in _NOT_COLUMNS}
    for name, setting in declared(Sampling).items():
        if not setting.setting.of(record.job.task.spec):
            del columns[name]
    columns |= {
        "tags": tuple(record.tags),
        "size": None if size is None else f"{size.width}x{size.height}",
        "attempt": record.attempts,
    }
    return columns


def _plain(value: Any) -> Any:
    """Returns a value of a column: a set of words for a list of them, one word for numbers."""
    if not isinstance(value, list | tuple):
        return value
    if all(isinstance(one, str) for one in value):
        return tuple(value) or None
    return word(list(value))


def _details(record: Record, input_of: InputOf) -> dict[str, Any]:
    job, values = record.job, record.values()
    details = {
        "is_story": job.task.spec.output is not Output.IMAGE or None,
        "text": _text_of(record),
        "inputs": [_input(image, record.root, input_of) for image in job.images] or None,
        "history": list(job.history) or None,
        "manifest": manifest_row(job),
        "command": command_line(job, values.get("model"), record.root),
        "checks": _checks(record),
        "more": [[title, word(values[name])] for name, title in _MORE.items() if values.get(name)],
    }
    if record.status == FAILED:
        details["error"] = values.get("error_message")
        details["traceback"] = _file_text(record.root, values.get("error_file"))
    return {name: value for name, value in details.items() if value is not None}


def _checks(record: Record) -> list[list[str]] | None:
    """Returns what was asked about a try, and what was answered; None if nothing was."""
    if record.judgement is None or not record.judgement.asked:
        return None
    return [[one.question, _answer(one)] for one in record.judgement.asked]


def _answer(asked: Asked) -> str:
    if asked.share is None:
        return "failed, so it speaks against the image"
    return f"{asked.answer} {asked.share:.5g}, needs {asked.at_least:g}"


def _input(image: InputImage, root: Path, input_of: InputOf) -> Mapping[str, str]:
    """Returns what is shown of an input image, with the job that made it if one did."""
    made_by = {} if image.output is None else {"job": image.output[0]}
    return {**input_of(image, root), **made_by}


def _text_of(record: Record) -> str | None:
    path = record.text_file
    return None if path is None else _file_text(record.root, str(path.relative_to(record.root)))


def _without_thoughts(text: str) -> str:
    return text.partition("</think>")[2].strip() or text


def _file_text(root: Path, path: str | None) -> str | None:
    """Returns a text of the run's folder; None if it no longer exists."""
    if path is None:
        return None
    try:
        return read_file(root / path, MAX_TEXT_BYTES).decode("utf-8", "replace")
    except OSError as error:
        return f"[{path}: {reason(error)}]"
