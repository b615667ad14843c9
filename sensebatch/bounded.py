"""Files and JSON read within bounds: no input makes a run wait, crash or fill the memory.

What others wrote is read here: manifests, configurations, headers of weights, prompts.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

MAX_DEPTH = 100
"""Deepest nesting of lists and mappings."""
MAX_DIGITS = 100
"""Longest number, in characters."""
MAX_SHOWN = 255
"""Longest name that a message shows as it is."""
MAX_VALUES = 2_000_000
"""Most values of a JSON text."""
MAX_TEXT_BYTES = 2**26
"""Largest text that is read as a whole where nothing else is said."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|([\[{])|([\]}])', re.DOTALL)
"""Strings, of which the last may have no end, and brackets. Nothing is tried twice, so that a text
of escapes takes neither memory nor time."""


class UnreadableFileError(OSError):
    """A path that is not a file, or a file of more bytes than anything of its kind has."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.strerror = message


def read_file(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """Returns the bytes of a file.

    Raises:
        OSError: It cannot be read.
        UnreadableFileError: It is a folder, a pipe or a device, or larger than `max_bytes`.
    """
    size = check_file(path, max_bytes)
    with path.open("rb") as file:
        # A buffer of that size is made at once, so it is not `max_bytes`.
        return file.read(size)


def check_file(path: Path, max_bytes: int | None = None) -> int:
    """Returns a file's size after making sure that reading it waits for nobody.

    Raises:
        OSError: There is no such file.
        UnreadableFileError: It is a folder, a pipe or a device, or larger than `max_bytes`.
    """
    stat = path.stat()
    if S_ISDIR(stat.st_mode):
        raise UnreadableFileError("expected a file, found a folder")
    # A pipe may never end, and has nothing left when it is read again.
    if not S_ISREG(stat.st_mode):
        raise UnreadableFileError("expected a file, found a device or pipe")
    if max_bytes is not None and stat.st_size > max_bytes:
        raise UnreadableFileError(
            f"expected a file of at most {max_bytes:,} bytes, found {stat.st_size:,}"
        )
    return stat.st_size


def load_json(content: bytes | str) -> Any:
    """Returns the value of a JSON text, in UTF-8 with or without a byte order mark.

    Raises:
        json.JSONDecodeError: It is not JSON; the error says where.
        ValueError: It is not UTF-8, repeats a key, is nested too deeply, holds too many values, a
            number that is too long or not finite, or half of a surrogate pair.
    """
    if isinstance(content, bytes):
        content = content.removeprefix(BYTE_ORDER_MARK).decode()
    # Every value but the first of its list comes after a comma. Those inside texts count as well.
    if content.count(",") >= MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES:,} values")
    check_depth(content)
    value = json.loads(
        content,
        object_pairs_hook=_without_repeats,
        parse_constant=_refuse_constant,
        parse_float=_finite,
        parse_int=_whole,
    )
    if "\\u" in content and not is_unicode(value):
        raise ValueError("half of a surrogate pair, which is not a character")
    return value


def check_depth(text: str) -> None:
    """Makes sure that a JSON text is not nested more deeply than `MAX_DEPTH`.

    Raises:
        ValueError: It is.
    """
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for match in _BRACKET.finditer(text):
        if match[1]:
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"values nested more than {MAX_DEPTH} deep")
        elif match[2]:
            depth -= 1


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} characters")
    return int(text)


def _finite(text: str) -> float:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} characters")
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large for a number")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        repeated = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"{repeated[:60]!r} is given twice")
    return mapping


def is_unicode(value: object) -> bool:
    """Whether every text inside a value can be written as UTF-8; lone surrogates cannot."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return True
    if isinstance(value, Mapping):
        return all(is_unicode(key) and is_unicode(item) for key, item in value.items())
    if isinstance(value, list):
        return all(is_unicode(item) for item in value)
    return True


def quoted(value: object, most: int = 80) -> str:
    """Returns a value as a message shows it: on one line, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def abridged(text: str, most: int) -> str:
    """Returns a text of which the middle is left out where it has more than `most` characters."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} ... ({len(text) - 2 * half:,} characters left out) ... {text[-half:]}"


def escaped(text: str) -> str:
    """Returns a text in which what would do something to a terminal is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def in_the_way(folder: Path) -> str | None:
    """Returns what keeps a folder from being made, for people; None if it is nothing of that kind.

    Args:
        folder: The folder; those it lies in may be missing as well.
    """
    for path in (*reversed(folder.parents), folder):
        try:
            if path.is_symlink() and not path.exists():
                return f"{shown(str(path))} is a link that leads nowhere"
            if path.exists() and not path.is_dir():
                return f"{shown(str(path))} is a file"
        except OSError:  # a name that no folder can have
            return None
    return None


def shown(name: str) -> str:
    """Returns a name as it is, or as `quoted` if it is long or would do something to a terminal."""
    return name if len(name) <= MAX_SHOWN and name.isprintable() else quoted(name)
