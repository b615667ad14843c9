"""What torch's allocator would reserve on a GPU for the tensors of a run on the meta device."""

from __future__ import annotations

import bisect

import torch

from tests.engine.memory.tracker import LiveBytes

ROUNDING = 512
LARGE = 1 << 20


class Segment:
    """Memory that grows at its end; a tensor takes the smallest hole it fits."""

    def __init__(self) -> None:
        self._holes: list[tuple[int, int]] = []
        """(start, size), in order of their places."""
        self.num_bytes = 0

    def take(self, num_bytes: int) -> tuple[int, int]:
        """Returns the (start, size) of a new tensor."""
        size = -(-num_bytes // ROUNDING) * ROUNDING
        fitting = [hole for hole in self._holes if hole[1] >= size]
        if fitting:
            start, found = min(fitting, key=lambda hole: hole[1])
            self._holes.remove((start, found))
            if found > size:
                bisect.insort(self._holes, (start + size, found - size))
            return start, size
        start = self.num_bytes
        if self._holes and sum(self._holes[-1]) == self.num_bytes:
            start, _ = self._holes.pop()
        self.num_bytes = start + size
        return start, size

    def give_back(self, start: int, size: int) -> None:
        """Makes the place of a tensor a hole, joined with those beside it."""
        place = bisect.bisect(self._holes, (start, size))
        if place < len(self._holes) and self._holes[place][0] == start + size:
            size += self._holes.pop(place)[1]
        if place and sum(self._holes[place - 1]) == start:
            before = self._holes.pop(place - 1)
            start, size = before[0], before[1] + size
        bisect.insort(self._holes, (start, size))


class ReservedBytes(LiveBytes):
    """Counts what would be reserved with expandable segments, one for small and one for large.

    Source: torch's `CUDACachingAllocator`, best fit with blocks that are split and merged; freed
    memory stays reserved.
    """

    def __init__(self) -> None:
        super().__init__()
        self._segments = {False: Segment(), True: Segment()}
        self._places: dict[int, tuple[bool, tuple[int, int]]] = {}

    @property
    def reserved(self) -> int:
        """Bytes reserved so far."""
        return sum(segment.num_bytes for segment in self._segments.values())

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        if storage.device.type != "meta":
            return
        before = self.now
        super()._count(storage, given)
        if self.now > before:
            large = storage.nbytes() >= LARGE
            self._places[storage._cdata] = large, self._segments[large].take(storage.nbytes())

    def _free(self, place: int) -> None:
        super()._free(place)
        if place in self._places:
            large, taken = self._places.pop(place)
            self._segments[large].give_back(*taken)
