"""What a folder's state says of a shard: one of several folders that share the jobs of a manifest.

Every shard reads the whole manifest and plans all of its batches, so that each knows which of them
are its own without asking the others. The jobs of other shards are on record as elsewhere. From
then on the shard takes no other jobs, because the others would not know of the change.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sensebatch.errors import ConfigError, RunFolderError
from sensebatch.jobs import folded_id
from sensebatch.store import chains, tables
from sensebatch.store.attempts import ELSEWHERE

MAX_SHARDS = 100_000

SHARD = "shard"
"""Name in `meta`, and in run.yaml: which shard the folder is."""
_CLAIMED = "shard_claimed"
"""Name in `meta`: what the shard was planned with, as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One of several parts of a manifest's batches, each of which runs in a folder of its own."""

    number: int
    """From 1."""
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def words(self) -> str:
        """The shard in words: `shard 2 of 8`."""
        return f"shard {self.number} of {self.count}"

    @property
    def suffix(self) -> str:
        """What the name of its folder ends with by default."""
        return f"-{self.number}-of-{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Returns the shard that `2/8` names.

        Raises:
            ConfigError: It names none.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]) <= MAX_SHARDS:
            raise ConfigError(
                f"--shard: expected I/N, the number of a shard from 1 and how many there are, such "
                f"as 2/8, found {text!r}"
            )
        return cls(number=int(match[1]), count=int(match[2]))


def without_suffix(name: str) -> str | None:
    """Returns what the folders of all shards are called after; None for a name of another form."""
    match = re.fullmatch(r"(.+)-\d+-of-\d+", name)
    return None if match is None else match[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """What a shard was planned with; equal in all shards that belong together."""

    jobs: str
    """Hash of the ids and keys of the manifest's jobs."""
    batches: str
    """Hash of the members of all batches, and of which shard runs each."""
    cut: str
    """How many jobs are in a batch of each group, in words."""
    output: str
    """How images are written, in words."""


def shard_of(db: sqlite3.Connection) -> Shard | None:
    """Returns which shard a folder is; None if it is none."""
    text = tables.get_meta(db, SHARD)
    return None if text is None else Shard.parse(text)


def claimed(db: sqlite3.Connection) -> Claimed | None:
    """Returns what a shard was planned with; None until it has been."""
    text = tables.get_meta(db, _CLAIMED)
    return None if text is None else Claimed(**json.loads(text))


def require_shard(db: sqlite3.Connection, shard: Shard | None, root: Path) -> None:
    """Makes a new folder the one of a shard, and refuses another one's.

    Args:
        db: Inside a transaction.
        shard: The one that is to run; None for a run that is none.
        root: The folder.

    Raises:
        RunFolderError: The folder is that of another shard, or of a run that is none.
    """
    found = shard_of(db)
    if found == shard:
        return
    if found is not None and shard is None:
        raise RunFolderError(
            f"{root}: expected a run without --shard, found the folder of {found.words}; say "
            f"--shard {found}, or give another --output-dir"
        )
    assert shard is not None
    if found is not None:
        raise RunFolderError(
            f"{root}: expected {shard.words}, found {found.words}; say --shard {found}, or give "
            "another --output-dir"
        )
    if db.execute("SELECT 1 FROM attempts UNION SELECT 1 FROM batches LIMIT 1").fetchone():
        raise RunFolderError(
            f"{root}: expected a new folder for {shard.words}, found one of a run without --shard; "
            "give another --output-dir"
        )
    tables.set_meta(db, SHARD, str(shard))


def require_same_jobs(db: sqlite3.Connection, root: Path) -> None:
    """Refuses other jobs than those that a shard was planned with, and jobs that need others.

    Raises:
        RunFolderError: A job was added, removed or changed, or the order is another.
    """
    shard, found = shard_of(db), claimed(db)
    if shard is not None and chains.has_any(db):
        raise RunFolderError(
            f"{root}: expected jobs that start from files alone, found some that start from images "
            "of other jobs, as the questions of accept do. These may be in another shard; run them "
            "without --shard"
        )
    if shard is None or found is None or found.jobs == _jobs_digest(db):
        return
    raise RunFolderError(
        f"{root}: expected the jobs that {shard.words} was planned with, found others: the "
        "manifest, the settings or the model changed. All shards must have the same jobs; put back "
        "what was there, or give each shard a new --output-dir"
    )


def claim(
    db: sqlite3.Connection,
    batches: Sequence[Sequence[str]],
    owners: Iterable[int],
    *,
    cut: str,
    output: str,
) -> int:
    """Records which batches are a shard's own; returns how many.

    Args:
        db: Inside a transaction.
        batches: The ids of each batch of the whole manifest.
        owners: The number of the shard that runs each, from 1.
        cut: How many jobs are in a batch of each group, in words.
        output: How images are written, in words.
    """
    shard = shard_of(db)
    assert shard is not None
    own = 0
    digest = hashlib.sha256(str(shard.count).encode())
    for ids, owner in zip(batches, owners, strict=True):
        digest.update(json.dumps([owner, *ids]).encode())
        if owner == shard.number:
            own += 1
        else:
            db.executemany(
                "UPDATE jobs SET status = ? WHERE folded = ?",
                ((ELSEWHERE, folded_id(job_id)) for job_id in ids),
            )
    planned = Claimed(jobs=_jobs_digest(db), batches=digest.hexdigest(), cut=cut, output=output)
    tables.set_meta(db, _CLAIMED, json.dumps(asdict(planned)))
    return own


def _jobs_digest(db: sqlite3.Connection) -> str:
    digest = hashlib.sha256()
    rows = db.execute(
        "SELECT id, key FROM jobs WHERE wanted = 1 AND seen = ? ORDER BY position",
        (tables.latest_reading(db),),
    )
    for job_id, key in rows:
        digest.update(json.dumps([job_id, key]).encode())
    return digest.hexdigest()
