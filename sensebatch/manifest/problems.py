"""Collects the errors in a manifest and words them: what was expected, what was found.

Knows pydantic's error records; knows nothing of rows, files or jobs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from sensebatch import errors
from sensebatch.errors import ManifestError, Problem

MAX_KEPT = 100
"""How many errors are kept for printing; the others are only counted."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a value that could not be read; no field accepts it."""

    message: str


MAX_MESSAGE_CHARS = 1000
"""The most characters of a message; paths and errors of libraries may be longer."""

_BRANCHES = frozenset(["<path>", "<struct>", "<list>", "<number>", "<word>", "<check>"])
"""Parts of a location that name a branch of a union rather than a field."""

Location = tuple[str | int, ...]
"""A field and a path inside it: `("images", 1)`."""

ALIKE = 0.75
"""How similar two names must be, from 0 to 1, for one to be a typo of the other."""

_INSTEAD = {
    **dict.fromkeys(("guidance_scale", "guidance", "cfg", "cfg_weight"), "cfg_scale"),
    **dict.fromkeys(("steps", "num_inference_steps"), "num_steps"),
    **dict.fromkeys(("num_images", "num_images_per_prompt", "count", "batch_size"), "n"),
    **dict.fromkeys(("size", "aspect_ratio", "ratio"), "resolution"),
    **dict.fromkeys(("text", "caption", "instruction"), "prompt"),
    **dict.fromkeys(("image_path", "input_image", "source_image"), "image"),
}
"""Our fields by the names that other tools use."""

_INNER = {
    "accept": ("ask", "choices", "is", "at_least"),
    "history": ("question", "answer"),
}
"""The names of mappings inside fields, where they are not those of images."""

NO_FUNCTION = (
    "a mapping of ask, choices, is and at_least, or a list of these; a function (module:function) "
    "is named in the configuration file, under accept, and never in a manifest"
)

_EXPECTED = {
    "bool_type": "true or false",
    "bytes_type": "bytes",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_type": "a whole number",
    "invalid-json-value": "a value that JSON can hold",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "missing": "a value",
    "model_type": "a mapping",
    "recursion_loop": "a value that is nested less deeply",
    "string_too_short": "text",
    "string_type": "text",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
}
"""What was expected, by pydantic's type of error; braces are filled from its context."""


class ProblemList:
    """Keeps the first errors and counts all of them."""

    def __init__(self) -> None:
        self.kept: list[Problem] = []
        self.num_problems = 0

    def add(self, problem: Problem) -> None:
        """Adds one error."""
        self.num_problems += 1
        if len(self.kept) < MAX_KEPT:
            self.kept.append(problem)

    def raise_any(self) -> None:
        """Raises the errors, if there are any.

        Raises:
            ManifestError: There is at least one.
        """
        if self.num_problems:
            raise ManifestError(self.kept, self.num_problems)


class RowErrors:
    """The errors in one row, without duplicates and without their place in the file."""

    def __init__(self) -> None:
        self._errors: dict[tuple[Location, str], None] = {}

    def __len__(self) -> int:
        return len(self._errors)

    def __iter__(self) -> Iterator[tuple[Location, str]]:
        return iter(self._errors)

    def add(self, location: str | Location, message: str) -> None:
        """Adds an error in a field; an empty name stands for the row as a whole."""
        if isinstance(location, str):
            location = (location,) if location else ()
        self._errors[(location, message)] = None

    def add_validation(self, error: ValidationError, known: Iterable[str]) -> frozenset[str]:
        """Adds everything that pydantic found, in our words.

        Args:
            error: What the validation raised.
            known: Names that may be suggested for an unknown field.

        Returns:
            The fields that are wrong, or missing because of a misspelled name.
        """
        concerned: set[str] = set()
        for record in error.errors(include_url=False):
            self.add(*_worded(record, known))
            name = str(record["loc"][0])
            concerned |= {name, *_meant(name, known)}
        return frozenset(concerned)


def field_name(location: Location) -> str:
    """Returns a location as people write it: `images[1]`, `metadata.source`."""
    name = ""
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        else:
            shown = printable(part)
            name += f".{shown}" if name else shown
    return name


def printable(text: str) -> str:
    """Returns a text that is safe to show on a terminal, which would obey some characters."""
    return text if text.isprintable() else ascii(text)


def found(value: object) -> str:
    """Returns a wrong value as a message shows it: shortened, or as its type."""
    return value.message if isinstance(value, Unreadable) else errors.found(value)


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?`; empty if no known name is close enough."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=ALIKE)
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown_field(name: str, known: Iterable[str]) -> str:
    """Returns the message about an unknown field."""
    known = list(known)
    if name == "function" and tuple(known) == _INNER["accept"]:
        return f"expected {NO_FUNCTION}, found {found(name)}"
    meant = _INSTEAD.get(name.lower())
    if meant is not None and meant in known:
        advice = f"; it is called {meant!r} here"
    elif name.lower() == "negative_prompt":
        advice = "; there are no negative prompts: describe what to show, not what to leave out"
    else:
        advice = suggestion(name, known)
    return f"expected a known field, found {found(name)}{advice}"


def _meant(name: str, known: Iterable[str]) -> list[str]:
    """Returns the field that an unknown name probably stands for, if there is one."""
    if name.lower() in _INSTEAD:
        return [_INSTEAD[name.lower()]]
    return difflib.get_close_matches(name, list(known), n=1, cutoff=ALIKE)


def _worded(record: Any, known: Iterable[str]) -> tuple[Location, str]:
    """Returns the location and the message of one of pydantic's error records."""
    location: Location = tuple(part for part in record["loc"] if part not in _BRANCHES)
    if record["type"] == "extra_forbidden":
        # A mapping inside a field has names of its own.
        inner = _INNER.get(str(location[0]), ("bytes", "path")) if len(location) > 1 else known
        return location, unknown_field(str(location[-1]), inner)
    if location[0] == "accept" and record["type"] in ("model_type", "wrong_type"):
        return location, f"expected {NO_FUNCTION}, found {found(record['input'])}"
    if location[0] == "metadata":
        # Every other part is a branch of the union that makes up a JSON value.
        location = ("metadata", *record["loc"][1::2])
    kind = record["type"]
    expected = record["msg"] if kind == "wrong_type" else _EXPECTED.get(kind)
    if expected is None:
        return location, f"{record['msg']}, found {found(record['input'])}"
    value = None if kind == "missing" else record["input"]
    return location, f"expected {expected.format(**record.get('ctx', {}))}, found {found(value)}"
