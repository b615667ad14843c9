"""Job ids: which can name a file, when two name the same file, and how they are derived.

A derived id depends on the fields of the job and on the bytes of its input images, never on its
place or on how a path is written.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sensebatch.jobs import folded_id
from sensebatch.tasks import Task

MAX_ID_BYTES = 150
MAX_SLUG_BYTES = 40

_FORBIDDEN = re.compile(r'[/\\<>:"|?*]')
_OUTPUT_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".txt")
_WINDOWS_DEVICES = frozenset(
    ["con", "prn", "aux", "nul"]
    + [f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789¹²³"]
)
_FILE_BITS = _SPELLING_BITS = 16
_MASK = (1 << 16) - 1
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
_SAFE = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_=-]*[A-Za-z0-9_])?")
_SLUG_GAPS = re.compile(r"[^\w+-]+")
_RATIO = re.compile(r"([0-9]{1,6}):([0-9]{1,6})")


def id_error(job_id: str) -> str | None:
    """Returns why an id cannot name files on every common file system; None if it can."""
    if _SAFE.fullmatch(job_id) and len(job_id) <= MAX_ID_BYTES and not _is_device(job_id):
        return None
    if not job_id:
        return "expected an id that is not empty"
    num_bytes = len(job_id.encode(errors="surrogatepass"))
    if num_bytes > MAX_ID_BYTES:
        return f"expected an id of at most {MAX_ID_BYTES} bytes, found {num_bytes}: {job_id!r}"
    wanted = next((wanted for is_broken, wanted in _rules(job_id) if is_broken), None)
    return None if wanted is None else f"expected an id {wanted}, found {job_id!r}"


def _rules(job_id: str) -> Iterator[tuple[bool, str]]:
    """Yields whether an id breaks each rule, and what the rule asks for."""
    first, last = job_id[0], job_id[-1]
    if match := _FORBIDDEN.search(job_id):
        yield True, f"without {match.group()!r}, since it names a file"
    hidden = any(unicodedata.category(char) in _HIDDEN_CATEGORIES for char in job_id)
    yield hidden, "without control characters"
    yield first in ".-" or first.isspace(), f"that does not start with {first!r}"
    yield last == "." or last.isspace(), f"that does not end with {last!r}"
    yield job_id.casefold().endswith(_OUTPUT_SUFFIXES), "without a file's suffix"
    yield _is_device(job_id), "that is not a reserved name of Windows"


def given_id(value: object) -> str | None:
    """Returns the id in a row's field; None if it is missing or cannot be used."""
    if not isinstance(value, str):
        return None
    job_id = unicodedata.normalize("NFC", value)
    return job_id if id_error(job_id) is None else None


def _is_device(job_id: str) -> bool:
    return job_id.partition(".")[0].strip().lower() in _WINDOWS_DEVICES


class IdRegistry:
    """Remembers which ids were used and in which rows, in about a hundred bytes each."""

    def __init__(self) -> None:
        self._files: list[tuple[str, str]] = []
        self._numbers: dict[str, int] = {}
        self._rows: dict[int, int] = {}
        """By an id's digest: from the lowest bits on the file, how the id is spelled, the row."""

    def start_file(self, file: str, unit: str) -> None:
        """Starts a file, whose rows are counted in `unit`s."""
        self._numbers[file] = len(self._files)
        self._files.append((file, unit))

    def add(self, job_id: str, file: str, number: int) -> str | None:
        """Remembers an id and returns the place of a row that had the same one, or None.

        Args:
            job_id: A valid id.
            file: Was started; not always the last one, since jobs may wait for others.
            number: The row's number in the file.
        """
        digest, current = _digest(folded_id(job_id)), self._numbers[file]
        known = self._rows.get(digest)
        if known is None:
            spelled = (number << _SPELLING_BITS) | _spelling(job_id)
            self._rows[digest] = (spelled << _FILE_BITS) | current
            return None
        other, unit = self._files[known & _MASK]
        row = f"{unit} {known >> (_FILE_BITS + _SPELLING_BITS)}"
        return row if known & _MASK == current else f"{other}: {row}"

    def differs_in_case(self, job_id: str) -> bool:
        """Returns whether an id that was added before is spelled otherwise than at first."""
        known = self._rows[_digest(folded_id(job_id))]
        return (known >> _FILE_BITS) & _MASK != _spelling(job_id)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _spelling(job_id: str) -> int:
    """Returns enough of a digest to word a message by."""
    return _digest(job_id) & _MASK


def derived_id(task: Task, content: Mapping[str, Any]) -> str:
    """Returns an id made of the task and a hash of the row's fields.

    Args:
        task: The job's task.
        content: The row's own fields, with the hashes of its input images in place of their paths.
    """
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return f"{task}-{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"


def slug(value: object) -> str:
    """Returns a value as part of an id.

    Numbers and plain words stay as they are, `16:9` becomes `16x9` and spaces become dashes. A
    value that loses more than that gets a hash at its end.
    """
    if isinstance(value, int | float):
        return json.dumps(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = unicodedata.normalize("NFC", text)
    if ratio := _RATIO.fullmatch(text):
        return "x".join(ratio.groups())
    plain = text.replace(" ", "-")
    cut = _SLUG_GAPS.sub("-", plain).encode()[:MAX_SLUG_BYTES]
    short = cut.decode(errors="ignore").strip("-")
    if short and short == plain:
        return short
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{short}~{digest}" if short else digest


def with_suffixes(job_id: str, values: Iterable[tuple[str, object]]) -> str:
    """Returns an id with `-name=value` for each pair, in the order of the names."""
    return job_id + "".join(f"-{name}={slug(value)}" for name, value in sorted(values, key=_name))


def _name(pair: tuple[str, object]) -> str:
    return pair[0]
