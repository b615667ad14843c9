"""Expressions about one job, in the SQL of SQLite: `status = 'failed' AND seed > 3`.

SQLite itself reads and computes them, in memory and with nothing but the columns: an
expression cannot read a file, change anything, or look at other jobs.
"""

from __future__ import annotations

import difflib
import json
import re
import sqlite3
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from sensebatch.errors import ConfigError

_UNKNOWN_COLUMN = re.compile(r"no such column: (.*)")
_NAME = re.compile(r"\w+")
_MAX_FURTHER = 1000
"""Most names of matrix and metadata that are columns."""
_NUMBER = "#"
"""The column with a job's place; no other column has such a name."""
_END = "\n)"
"""What follows an expression: a comment at its end ends with its line."""
_LIST_WIDTH = 78
"""The columns of a terminal that a list of names takes."""
_MAX_VALUE_BYTES = 2**26
"""The largest text that an expression may make."""
_REFUSED_FUNCTIONS = frozenset({"load_extension", "fts3_tokenizer", "sqlite_log"})
_NOTHING_ELSE = "expected an expression about one job without SELECT"


class Valued(Protocol):
    """Something that has the columns."""

    def value(self, name: str) -> Any:
        """Returns a column as plain data."""


class Where:
    """An expression that is true or false of a job.

    Args:
        text: The expression.
        columns: Names of the columns.
        extra_columns: Returns names inside `matrix` and `metadata`, with which of the two they are
            in; called if the expression uses a name that is not a column.

    Raises:
        ConfigError: It is not an expression about these columns.
    """

    def __init__(
        self,
        text: str,
        columns: Collection[str],
        extra_columns: Callable[[], Mapping[str, str]],
    ) -> None:
        self._text = text
        self._bad_pattern = ""
        self._used: list[str] = []
        self._extra: Mapping[str, str] = {}
        try:
            self._compile(columns)
        except ConfigError:
            self._extra = _further(extra_columns(), columns)
            if not self._extra:
                raise
            self._compile([*columns, *self._extra])
        self._db = self._open(self._used)

    def holds(self, jobs: Sequence[Valued]) -> list[bool]:
        """Returns, for each job, whether the expression is true of it.

        Raises:
            ConfigError: It cannot be computed for one of them.
        """
        marks = ", ".join("?" * (len(self._used) + 1))
        values = (
            (number, *(_stored(self._value(job, name)) for name in self._used))
            for number, job in enumerate(jobs)
        )
        try:
            self._db.set_authorizer(None)
            self._db.execute("DELETE FROM jobs")
            self._db.executemany(f"INSERT INTO jobs VALUES ({marks})", values)
            self._db.set_authorizer(_Authorizer())
            true = {number for (number,) in self._db.execute(self._query())}
        except (sqlite3.Error, OverflowError) as error:
            raise ConfigError(f"--where {self._text!r}: {self._bad_pattern or error}") from None
        return [number in true for number in range(len(jobs))]

    def _matches(self, pattern: str | None, text: Any) -> bool | None:
        """Returns whether a regular expression is found in a text; `prompt REGEXP 'star|ring'`."""
        if pattern is None or text is None:
            return None
        try:
            return re.search(str(pattern), str(text)) is not None
        except re.error as error:
            self._bad_pattern = f"expected a regular expression, found {pattern!r}: {error}"
            raise

    def _value(self, job: Valued, name: str) -> Any:
        if name not in self._extra:
            return job.value(name)
        return json.loads(job.value(self._extra[name])).get(name)

    def _query(self) -> str:
        return f'SELECT "{_NUMBER}" FROM jobs WHERE ({self._text}{_END}'

    def _compile(self, columns: Collection[str]) -> None:
        """Finds out which columns the expression uses."""
        db = self._open(columns)
        authorizer = _Authorizer()
        db.set_authorizer(authorizer)
        try:
            db.execute(self._query())
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise ConfigError(f"--where {self._text!r}: {_reason(error, columns)}") from None
        finally:
            db.close()
        self._used = [name for name in columns if name in authorizer.read]

    def _open(self, columns: Collection[str]) -> sqlite3.Connection:
        """Returns a database in memory with an empty table of these columns."""
        db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
        db.create_function("has", 2, _has, deterministic=True)
        db.create_function("regexp", 2, self._matches, deterministic=True)
        names = "".join(f', "{name}"' for name in columns)
        db.execute(f'CREATE TABLE jobs ("{_NUMBER}" INTEGER PRIMARY KEY{names})')
        return db


def _further(extra: Mapping[str, str], columns: Collection[str]) -> dict[str, str]:
    """Returns the names that can be columns beside these: SQLite does not tell cases apart."""
    taken = {name.lower() for name in columns}
    found = {}
    for name, where in list(extra.items())[:_MAX_FURTHER]:
        if _NAME.fullmatch(name) and name.lower() not in taken:
            taken.add(name.lower())
            found[name] = where
    return found


class _Authorizer:
    """Lets SQLite read the columns and compute, and nothing else."""

    def __init__(self) -> None:
        self.read: set[str] = set()
        """Names of the columns that were asked for."""
        self._num_selects = 0

    def __call__(self, action: int, _: str | None, second: str | None, *_others: object) -> int:
        if action == sqlite3.SQLITE_READ:
            self.read.add(second or "")
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_SELECT:
            self._num_selects += 1
            return sqlite3.SQLITE_OK if self._num_selects == 1 else sqlite3.SQLITE_DENY
        is_harmless = action == sqlite3.SQLITE_FUNCTION and second not in _REFUSED_FUNCTIONS
        return sqlite3.SQLITE_OK if is_harmless else sqlite3.SQLITE_DENY


def _reason(error: Exception, columns: Collection[str]) -> str:
    """Returns what is wrong with an expression."""
    said = str(error)
    if match := _UNKNOWN_COLUMN.match(said):
        close = difflib.get_close_matches(match[1], columns, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"expected one of these columns, found {match[1]!r}{hint}\n{listing(columns)}"
    if "not authorized" in said or "one statement" in said:
        return _NOTHING_ELSE
    # Quotes that nothing closes reach to the end of all.
    return "expected an SQL expression: " + re.sub(rf'{re.escape(_END)}"$', '"', said)


def listing(columns: Iterable[str]) -> str:
    """Returns the names of columns for an error, in lines that fit any terminal."""
    names = f"columns: {', '.join(sorted(columns))}"
    return textwrap.fill(
        names, _LIST_WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _stored(value: Any) -> Any:
    """Returns a value as SQLite holds it: lists and objects as JSON, times as text."""
    if isinstance(value, datetime):
        return value.isoformat(" ", "microseconds")
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, ensure_ascii=False)
    return value


def _has(items: str | None, item: Any) -> bool:
    """Returns whether a list has an item; `has(tags, 'sky')`."""
    try:
        found = json.loads(items or "[]")
    except ValueError:
        return False
    return item in found if isinstance(found, list) else False
