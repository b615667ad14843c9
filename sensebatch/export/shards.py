"""Which shards an export keeps, writes and removes. Pure.

A row stays in the shard that has it. What is new goes into new shards, so that a set that grew
writes little more than what it grew by, wherever in the manifests the new jobs are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sensebatch.export.ledger import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a plan knows of a row."""

    task: str
    split: str
    digest: str
    num_bytes: int
    """The size of its images and its values."""
    num_images: int
    place: int
    """Where the row itself is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much goes into one shard; a row on its own always fits."""

    num_bytes: int
    num_images: int | None = None
    num_rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """What becomes of an export's shards."""

    kept: tuple[Shard, ...]
    removed: tuple[Shard, ...]
    """Those whose files are in the way of nothing that is written."""
    written: tuple[tuple[Shard, tuple[Row, ...]], ...]
    """Shards to write, with their rows; one of the same name that is there is replaced."""


def plan_shards(old: Iterable[Shard], rows: Iterable[Row], limits: Limits) -> ShardPlan:
    """Returns what to do so that the shards hold these rows and no others.

    Args:
        old: The shards that are there, whole.
        rows: In the order in which new ones are written.
        limits: Of a shard.
    """
    wanted: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        wanted.setdefault((row.task, row.split), {})[row.digest] = row
    there: dict[tuple[str, str], list[Shard]] = {}
    for shard in old:
        there.setdefault((shard.task, shard.split), []).append(shard)
    kept: list[Shard] = []
    removed: list[Shard] = []
    written: list[tuple[Shard, tuple[Row, ...]]] = []
    for place in sorted(wanted.keys() | there.keys()):
        plan = _plan(there.get(place, []), wanted.get(place, {}), limits)
        kept += plan.kept
        removed += plan.removed
        written += plan.written
    return ShardPlan(kept=tuple(kept), removed=tuple(removed), written=tuple(written))


def _plan(old: Sequence[Shard], wanted: Mapping[str, Row], limits: Limits) -> ShardPlan:
    """Returns the plan of one task and split."""
    new = dict(wanted)
    kept: list[Shard] = []
    removed: list[Shard] = []
    written: list[tuple[Shard, tuple[Row, ...]]] = []
    for shard in sorted(old, key=lambda shard: shard.number):
        rows = tuple(new.pop(digest) for digest in shard.rows if digest in new)
        if len(rows) == len(shard.rows):
            kept.append(shard)
        elif rows:
            written.append((_filled(shard, rows), rows))
        else:
            removed.append(shard)
    rest, absorbed = _with_last_shards(kept, list(new.values()), wanted, limits)
    free = _numbers({shard.number for shard in kept} | {shard.number for shard, _ in written})
    for rows in _cut(rest, limits):
        first = rows[0]
        shard = Shard(task=first.task, split=first.split, number=next(free), rows=(), num_bytes=0)
        written.append((_filled(shard, rows), rows))
    taken = {shard.number for shard, _ in written}
    removed = [shard for shard in (*removed, *absorbed) if shard.number not in taken]
    return ShardPlan(kept=tuple(kept), removed=tuple(removed), written=tuple(written))


def _with_last_shards(
    kept: list[Shard], new: list[Row], wanted: Mapping[str, Row], limits: Limits
) -> tuple[list[Row], list[Shard]]:
    """Returns new rows after those of the last small shards, and these shards.

    `kept` loses them. Together they are no larger than what is new, so that there are few small
    shards however often a set grows, and never more than twice its growth is written.
    """
    absorbed: list[Shard] = []
    room = min(sum(row.num_bytes for row in new), limits.num_bytes // 2)
    while kept and new and kept[-1].num_bytes <= room:
        shard = kept.pop()
        room -= shard.num_bytes
        absorbed.append(shard)
        new = [*(wanted[digest] for digest in shard.rows), *new]
    return new, absorbed


def _cut(rows: Sequence[Row], limits: Limits) -> Iterator[tuple[Row, ...]]:
    """Yields rows in runs that fit a shard each."""
    run: list[Row] = []
    num_bytes = num_images = 0
    for row in rows:
        num_bytes += row.num_bytes
        num_images += row.num_images
        is_full = (
            num_bytes > limits.num_bytes
            or (limits.num_images is not None and num_images > limits.num_images)
            or (limits.num_rows is not None and len(run) == limits.num_rows)
        )
        if run and is_full:
            yield tuple(run)
            run, num_bytes, num_images = [], row.num_bytes, row.num_images
        run.append(row)
    if run:
        yield tuple(run)


def _filled(shard: Shard, rows: Sequence[Row]) -> Shard:
    return replace(
        shard,
        rows=tuple(row.digest for row in rows),
        num_bytes=sum(row.num_bytes for row in rows),
        files={},
    )


def _numbers(taken: set[int]) -> Iterator[int]:
    """Yields the numbers from 0 that are free."""
    number = 0
    while True:
        if number not in taken:
            yield number
        number += 1
