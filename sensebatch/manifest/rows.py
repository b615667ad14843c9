"""What all formats have in common: unchecked rows, each with its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from sensebatch.bounded import load_json
from sensebatch.manifest.fields import IMAGE_FIELDS, SKIP_RESIZE, JobFields
from sensebatch.manifest.problems import Location

Report = Callable[[int, Location, str], None]
"""Receives an error in the file itself: row number, field, message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """One row as it was read: what was given by name, unchecked."""

    fields: Mapping[str, Any]
    number: int
    """Its line, or its index counted from 0."""
    line_of: Callable[[Location], int] | None = None
    """Returns the line of a field; None for a format whose rows have at most one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestRows:
    """An open manifest."""

    rows: Iterator[RawRow]
    """Read as they are consumed."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Checked defaults for all rows."""
    stores_images: bool = False
    """Whether rows may hold the bytes of their images."""


def given(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a row without nulls, the same from every format.

    Tables hold whole numbers as 7.0, mappings as JSON text, and missing images and checks as
    structs of nulls. Two nulls stay: that of `input_max_pixels` becomes a word, and that of an
    image may mean one that should be there.
    """
    fields: dict[str, Any] = {}
    for name, value in mapping.items():
        value = _alike(name, value)
        if value is not None or name in IMAGE_FIELDS:
            fields[name] = value
        elif name == "input_max_pixels":
            fields[name] = SKIP_RESIZE
    return fields


def _alike(name: str, value: Any) -> Any:
    """Returns a field's value in the types of our own manifests."""
    if name in IMAGE_FIELDS:
        return _image(value)
    if name == "accept":
        return _checks(value)
    if name == "id":
        value = _whole(value)
        return str(value) if type(value) is int else value
    if name in ("metadata", "matrix"):
        value = _mapping(value)
        if name == "matrix" and isinstance(value, dict):
            return {axis: _alike(axis, item) for axis, item in value.items()}
        return value
    return _whole(value) if name in whole_number_fields() else value


@lru_cache(maxsize=1)
def whole_number_fields() -> frozenset[str]:
    """Returns the fields that hold whole numbers or lists of them."""
    properties = JobFields.model_json_schema()["properties"]
    return frozenset(name for name, schema in properties.items() if _has_integer(schema))


def _has_integer(schema: Mapping[str, Any]) -> bool:
    parts = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    if "items" in schema:
        parts.append(schema["items"])
    return schema.get("type") == "integer" or any(_has_integer(part) for part in parts)


def _whole(value: Any) -> Any:
    """Returns an integer for a whole number, which tables with gaps hold as 7.0."""
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _mapping(value: Any) -> Any:
    """Returns the mapping in JSON text; anything else as it is, for the checks to report."""
    if not isinstance(value, str):
        return value
    try:
        loaded = load_json(value)
    except ValueError:
        return value
    return loaded if isinstance(loaded, dict) else value


def _checks(value: Any) -> Any:
    """Returns checks without nulls: in a table, those of a row have the names of all rows."""
    if isinstance(value, list):
        return [_checks(item) for item in value]
    if not isinstance(value, dict) or not value:
        return value
    return {name: part for name, part in value.items() if part is not None} or None


def _image(value: Any) -> Any:
    """Returns an image, or None for a struct of nulls; likewise for each image of a list."""
    if isinstance(value, list):
        return [_image(item) for item in value]
    if isinstance(value, dict) and value and all(part is None for part in value.values()):
        return None
    return value
