"""What an export has written so far: one record a shard, in the export itself.

A shard's record is written after its files and removed before they change, so that an export that
was interrupted continues with what is whole. The export's own record says what it is of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sensebatch.errors import ConfigError
from sensebatch.export.target import LOCK, Target

FOLDER = ".sensebatch"
"""Readers of datasets skip names that begin with a dot."""
_HEAD = f"{FOLDER}/export.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A part of an export that is written as a whole, and written again as a whole."""

    task: str
    split: str
    number: int
    """From 0, within its task and split."""
    rows: tuple[str, ...]
    """The digest of each row, in order."""
    num_bytes: int
    """The size of rows and images as they were read, which decides how much goes into a shard."""
    files: Mapping[str, int] = field(default_factory=dict)
    """Bytes of its files by name, once they are written."""

    @property
    def stem(self) -> str:
        """Its name without an ending: `t2i/train-00003`."""
        return f"{self.task}/{self.split}-{self.number:05d}"


class Ledger:
    """The records of an export.

    Args:
        target: Where it is.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._head: dict[str, Any] = {}

    def open(self, terms: Mapping[str, Any]) -> tuple[list[Shard], dict[str, int]]:
        """Returns the whole shards that are there, and the bytes of every other file.

        Args:
            terms: What must be the same for an export to continue: run, format, conversion.

        Raises:
            ConfigError: Something else is there.
        """
        files = self._target.files()
        if _HEAD not in files:
            self._require_empty(files)
            self._head = {"terms": dict(terms)}
            return [], files
        self._head = self._read(_HEAD)
        self._require_same(terms)
        shards = []
        for name in filter(is_record, files):
            shard = self._shard(name)
            # A shard whose files were touched, or never written whole, is made again.
            if shard and all(files.get(path) == size for path, size in shard.files.items()):
                shards.append(shard)
        known = {name for shard in shards for name in (*shard.files, _record(shard))}
        left = {name: size for name, size in files.items() if name not in known and name != _HEAD}
        return sorted(shards, key=lambda shard: shard.stem), left

    def begin(self) -> None:
        """Writes the export's own record, before anything else."""
        self._write(_HEAD, self._head)

    def given(self, name: str, now: str | None) -> str | None:
        """Returns what a user gave for the card, now or else last; None if that was never.

        Args:
            name: `license` or `title`.
            now: What is given to this export, which `begin` records; None for nothing.
        """
        given = self._head.setdefault("given", {})
        if now is not None:
            given[name] = now
        return given.get(name)

    def add(self, shard: Shard) -> None:
        """Records a shard whose files are in place."""
        self._write(
            _record(shard),
            {
                "task": shard.task,
                "split": shard.split,
                "number": shard.number,
                "rows": list(shard.rows),
                "num_bytes": shard.num_bytes,
                "files": dict(shard.files),
            },
        )

    def drop(self, shard: Shard) -> None:
        """Forgets a shard, before its files change."""
        self._target.remove(_record(shard))

    @property
    def cards(self) -> list[str]:
        """The SHA-256 of the last card, after that of the one it replaced, if there was one.

        Where an export was killed before it wrote the last one, the other one is still there.
        """
        return self._head.get("cards", [])

    def replace_card(self, there: str | None, digest: str) -> None:
        """Keeps the SHA-256 of a card that is about to be written.

        Args:
            there: The SHA-256 of the card it replaces; None where there is none. It need not be the
                last one that was kept: an export may have been killed before it wrote that.
            digest: Its SHA-256.
        """
        self._head["cards"] = [digest] if there is None else [there, digest]
        self.begin()

    def _require_empty(self, files: Mapping[str, int]) -> None:
        found = sorted(name for name in files if name.partition("/")[0] not in _HARMLESS)
        if found:
            raise ConfigError(
                f"{self._target.name}: expected an empty folder or an earlier export, found "
                f"{found[0]!r}; name another place"
            )

    def _require_same(self, terms: Mapping[str, Any]) -> None:
        there = self._head.get("terms", {})
        for name in terms:
            if there.get(name) != terms[name]:
                raise ConfigError(
                    f"{self._target.name}: expected an export of {name} {_shown(terms[name])}, "
                    f"found one of {name} {_shown(there.get(name))}; name another place"
                )

    def _shard(self, name: str) -> Shard | None:
        try:
            said = self._read(name)
            shard = Shard(**{**said, "rows": tuple(said["rows"])})
        except (ConfigError, TypeError, KeyError):
            return None
        return shard if _record(shard) == name and shard.files else None

    def _read(self, name: str) -> dict[str, Any]:
        content = self._target.read(name)
        try:
            said = json.loads(content or b"")
            if not isinstance(said, dict):
                raise ValueError("expected an object")
        except ValueError as error:
            raise ConfigError(
                f"{self._target.name}: expected {name} as an export wrote it: {error}"
            ) from error
        return said

    def _write(self, name: str, said: Mapping[str, Any]) -> None:
        with self._target.write(name) as file:
            file.write(json.dumps(said, separators=(",", ":")).encode())


_HARMLESS = frozenset([".git", ".gitattributes", ".cache", ".DS_Store", FOLDER])
"""What may lie in a place that is otherwise empty, such as a new repository of the Hub."""


def is_record(name: str) -> bool:
    """Returns whether a file is the record of a shard."""
    return name.startswith(f"{FOLDER}/") and name not in (_HEAD, LOCK)


def _record(shard: Shard) -> str:
    return f"{FOLDER}/{shard.stem.replace('/', '-')}.json"


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
