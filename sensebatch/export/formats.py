"""The formats of an export: a row each. A new format is a module and a row here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from sensebatch.export import hf, imagefolder, webdataset
from sensebatch.export.images import LoadedSample
from sensebatch.export.ledger import Shard
from sensebatch.export.shards import Limits
from sensebatch.export.target import Target


class Format(Protocol):
    """What a module of a format has."""

    def limits(self, shard_bytes: int) -> Limits:
        """Returns how much goes into a shard."""

    def pattern(self, task: str, split: str) -> str:
        """Returns which files of an export are those of a task and split."""

    def is_own(self, name: str, task: str) -> bool:
        """Returns whether an export of this format may have made a file of this name."""

    def write(
        self, target: Target, shard: Shard, samples: Iterator[LoadedSample]
    ) -> dict[str, int]:
        """Writes a shard and returns the bytes of its files by name."""


FORMATS: Mapping[str, Format] = {
    "hf": hf,
    "imagefolder": imagefolder,
    "webdataset": webdataset,
}
