"""What the three formats have in common: rows, still unchecked, with a place each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sensebatch import yaml_values
from sensebatch.manifest.fields import SKIP_RESIZE
from sensebatch.manifest.problems import Location

Report = Callable[[int, Location, str], None]
"""Receives a mistake of the file itself: row number, field, message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """One row as it was read: a mapping of names that were given, nothing checked."""

    fields: Mapping[str, Any]
    number: int
    """Its line, or its row counted from 0."""
    line_of: Callable[[Location], int] | None = None
    """Finds the line of a field; None where a row has one line or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestRows:
    """A manifest that was opened."""

    rows: Iterator[RawRow]
    """Reads on as it is consumed."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Checked."""
    stores_images: bool = False
    """Whether a row may hold the bytes of its pictures."""


def is_unicode(value: object) -> bool:
    """Whether every text inside a value can be written as UTF-8."""
    if isinstance(value, str):
        return yaml_values.is_unicode(value)
    if isinstance(value, Mapping):
        return all(is_unicode(key) and is_unicode(item) for key, item in value.items())
    if isinstance(value, list):
        return all(is_unicode(item) for item in value)
    return True


def given(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a mapping without its nulls, but for the one that means something."""
    fields = {name: value for name, value in mapping.items() if value is not None}
    if mapping.get("input_max_pixels", "") is None:
        fields["input_max_pixels"] = SKIP_RESIZE
    return fields
