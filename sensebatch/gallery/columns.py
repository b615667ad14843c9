"""What items are searched, filtered and sorted by: a column for each setting, figure and word.

Columns are found in the records, so that a new column of the log, a new setting or a manifest's own
metadata appears by itself. Pure: values in, plain data for the page out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sensebatch.declarations import declared
from sensebatch.jobs import Sampling

MAX_WORD = 200
"""Most characters of a word; longer texts are details of an item."""
MAX_EXACT = 2**53 - 1
"""The largest whole number that a browser holds."""
DIGITS = 6
"""Digits that are kept of a measured figure."""

JOB, MATRIX, METADATA, SETTINGS, FIGURES, MACHINE = (
    "Job",
    "Matrix",
    "Metadata",
    "Settings",
    "Figures",
    "Model and machine",
)
RESERVED = frozenset(["id", "prompt", "pick", "pick_tag"])
"""Names that the page gives to what it knows of every item."""

_GROUPS = {
    **dict.fromkeys(
        (
            "run",
            "status",
            "verdict",
            "score",
            "dropped",
            "function",
            "answer",
            "task",
            "finish_reason",
            "tags",
            "size",
            "width",
            "height",
            "num_images",
            "num_input_images",
            "error_type",
            "near_duplicate",
            "alike",
            "in_manifest",
            "source_file",
        ),
        JOB,
    ),
    **dict.fromkeys(("seed", *declared(Sampling), "think"), SETTINGS),
    **dict.fromkeys(
        (
            "model",
            "model_license",
            "checkpoint",
            "lora",
            "dtype",
            "precision",
            "device",
            "vram_mode",
            "budget_bytes",
            "attn_backend",
            "torch_version",
            "system_prompt_source",
            "worker",
            "node",
            "session",
        ),
        MACHINE,
    ),
}
"""The group of each column; what is in none is a figure."""
_ORDER = {name: place for place, name in enumerate(_GROUPS)}
_UNITS = {"_s": "s", "_bytes": "bytes", "_at": "time", "_tok_per_s": "tok/s"}


@dataclass(slots=True, kw_only=True)
class Column:
    """A value for each item."""

    name: str
    group: str
    values: list[Any] = field(default_factory=list)

    def declaration(self) -> dict[str, Any]:
        """Returns what the page has to know of the column before its values."""
        ending = next((end for end in reversed(_UNITS) if self.name.endswith(end)), "")
        is_measured = self.group in (FIGURES, MACHINE) and ending
        title = self.name.removesuffix(ending) if is_measured else self.name
        return {
            "name": self.name,
            "title": title
            if self.group in (MATRIX, METADATA)
            else title.replace("_", " ").capitalize(),
            "kind": self.kind,
            "group": self.group,
            "unit": _UNITS[ending] if is_measured and self.kind == "number" else "",
        }

    @property
    def kind(self) -> str:
        """`set`, `number` or `word`."""
        if any(isinstance(value, tuple) for value in self.values):
            return "set"
        is_numeric = all(value is None or _is_number(value) for value in self.values)
        return "number" if is_numeric else "word"

    def encoded(self) -> dict[str, Any]:
        """Returns the values as the page reads them; one for all where they are the same."""
        kind = self.kind
        if kind == "number":
            numbers = [_rounded(value) for value in self.values]
            return {"numbers": _shared(numbers)}
        words: dict[str, int] = {}
        if kind == "word":
            codes = [
                -1 if value is None else words.setdefault(word(value), len(words))
                for value in self.values
            ]
            return {"words": list(words), "codes": _shared(codes)}
        sets: dict[tuple[int, ...], int] = {}
        codes = []
        for value in self.values:
            members = tuple(words.setdefault(word(one), len(words)) for one in value or ())
            codes.append(sets.setdefault(members, len(sets)) if members else -1)
        return {"words": list(words), "sets": list(sets), "codes": _shared(codes)}


class Columns:
    """The columns of a gallery, filled item by item."""

    def __init__(self) -> None:
        self._columns: dict[tuple[str, str], Column] = {}
        self._count = 0

    def add(self, values: Mapping[str, Any], *, matrix: Mapping[str, Any], **extra: Any) -> None:
        """Adds an item.

        Args:
            values: By the names of columns.
            matrix: The values of the manifest's matrix that made the job.
            extra: `metadata`: what the manifest passed through.
        """
        for name, value in values.items():
            self._put(name, _GROUPS.get(name, FIGURES), value)
        for group, own in ((MATRIX, matrix), (METADATA, extra.get("metadata", {}))):
            for name, value in own.items():
                self._put(name, group, _plain(value))
        self._count += 1

    def _put(self, name: str, group: str, value: Any) -> None:
        if value is None or (isinstance(value, str) and len(value) > MAX_WORD):
            return
        column = self._columns.get((group, name))
        if column is None:
            column = self._columns[group, name] = Column(name=name, group=group)
        column.values += [None] * (self._count - len(column.values))
        column.values.append(value)

    def finished(self) -> Sequence[Column]:
        """Returns the columns that have a value for some item, in the order they are listed.

        Names are unique: where a manifest's own name is that of another column, it gets its group
        before it. A matrix that varies a setting gives no column of its own.
        """
        own = {name for group, name in self._columns if group not in (MATRIX, METADATA)}
        names = own | RESERVED
        columns = []
        for (group, name), column in self._columns.items():
            if group == MATRIX and name in own & _ORDER.keys():
                continue
            column.values += [None] * (self._count - len(column.values))
            if group in (MATRIX, METADATA):
                unique = name if name not in names and name.isidentifier() else ""
                column.name = unique or f"{group.lower()}.{name}"
                names.add(column.name)
            columns.append(column)
        return sorted(columns, key=lambda column: _ORDER.get(column.name, len(_ORDER)))


def word(value: Any) -> str:
    """Returns a value as a word."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(word, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """Returns what can be shown of a value that a manifest passed through: no nested ones."""
    if isinstance(value, dict):
        return None
    if isinstance(value, list | tuple):
        is_flat = not any(isinstance(one, dict | list | tuple) for one in value)
        return tuple(map(word, value)) if is_flat else None
    return value


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | datetime):
        return False
    return not isinstance(value, int) or abs(value) <= MAX_EXACT


def _rounded(value: Any) -> Any:
    if isinstance(value, datetime):
        return round(value.timestamp(), 1)
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _shared(values: Iterable[Any]) -> Any:
    """Returns the values, or the one that all are."""
    found = list(values)
    is_same = bool(found) and all(value == found[0] for value in found)
    return found[0] if is_same else found
