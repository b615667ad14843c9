"""Which jobs made images that look alike, by their perceptual hashes.

The first job of a group stands for it: every other one is near the first, not merely near another
one that is near it, so that no chain of small differences joins images that look different.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sensebatch.dataset.choices import DISTANCE
from sensebatch.store.acceptance import Verdict

if TYPE_CHECKING:
    from sensebatch.dataset.records import Record


class _Candidate(NamedTuple):
    is_left: bool
    """Whether it is a try that is not taken."""
    job_id: str
    hashes: Sequence[str]


def near_duplicates(records: Iterable[Record], distance: int = DISTANCE) -> dict[str, str]:
    """Returns the first job of each job's group, by their ids; the first one's is its own.

    Jobs are near duplicates if they have the same task, the same input images and the same number
    of images, of which each is near its counterpart. Jobs without hashes are left out. A try that
    is not taken stands for no other job.

    Args:
        records: Jobs, the preferred ones first.
        distance: Most bits in which two hashes differ.
    """
    alike: dict[tuple[object, ...], list[_Candidate]] = {}
    for record in records:
        if record.phashes:
            inputs = tuple(image.sha256 for image in record.job.images)
            kind = alike.setdefault((record.job.task, inputs, len(record.phashes)), [])
            is_left = record.verdict in (Verdict.REJECTED, Verdict.SPARE)
            kind.append(_Candidate(is_left, record.id, record.phashes))
    found = {}
    for kind in alike.values():
        kind.sort(key=attrgetter("is_left"))
        firsts = group_hashes([one.hashes for one in kind], distance)
        for one, first in zip(kind, firsts, strict=True):
            found[one.job_id] = kind[first].job_id
    return found


def group_hashes(hashes: Sequence[Sequence[str]], distance: int) -> list[int]:
    """Returns, for each row of hashes, the index of the first row of its group.

    Args:
        hashes: Rows of 16 hex digits each, all of the same length.
        distance: Most bits in which each hash differs from that in its place of the first row.
    """
    values = np.array([[int(digits, 16) for digits in row] for row in hashes], dtype=np.uint64)
    first = np.full(len(values), -1, dtype=np.int64)
    for index in range(len(values)):
        if first[index] >= 0:
            continue
        near = (_bits(values[index:] ^ values[index]) <= distance).all(axis=1)
        near &= first[index:] < 0
        first[index:][near] = index
    return first.tolist()


def _bits(values: np.ndarray) -> np.ndarray:
    """Returns how many bits are set in each uint64."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(values)
    # numpy 1: the sums of pairs, of fours, and of bytes.
    pairs = values - ((values >> np.uint64(1)) & np.uint64(0x5555555555555555))
    mask = np.uint64(0x3333333333333333)
    fours = (pairs & mask) + ((pairs >> np.uint64(2)) & mask)
    octets = (fours + (fours >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (octets * np.uint64(0x0101010101010101)) >> np.uint64(56)
