"""Places in pinned host memory that are used again, so that a GPU's copies are not waited for.

Touching and pinning new memory takes many times as long as the copies. Knows bytes only.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from sensebatch.engine.memory.blocks import new_buffer
from sensebatch.engine.memory.host import CPU, PinnedMemory
from sensebatch.engine.memory.lanes import Lane
from sensebatch.errors import OutOfMemoryError

MAX_TIMES = 2
"""A place is used for this much less than it has at most; a larger one is freed."""


@dataclass(frozen=True, slots=True, eq=False)
class _Buffer:
    """Pinned memory, taken or free."""

    flat: Tensor
    pin: PinnedMemory
    copied: object
    """Mark: the last copy from it is done."""


class Places:
    """Makes places and keeps the free ones, which are all about as large as the last one taken.

    Args:
        lane: The device's.
    """

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        # Places are deleted at any moment and in any thread.
        self._free: deque[_Buffer] = deque()
        self._is_off = False

    def take(self, num_bytes: int) -> Place | None:
        """Returns a place of so many bytes; called by one thread at a time.

        It waits for copies from the place that it returns, and from those that it frees.

        Returns:
            None where the system does not allow so much memory to be pinned. Then it is not asked
            again.
        """
        while self._free:
            buffer = self._free.popleft()
            self._lane.finish(buffer.copied)
            if num_bytes <= buffer.flat.nbytes <= MAX_TIMES * num_bytes:
                return self._taken(buffer, num_bytes)
        if self._is_off:
            return None
        try:
            flat = new_buffer(num_bytes, CPU)
            buffer = _Buffer(flat, PinnedMemory(flat), self._lane.new_mark())
        except OutOfMemoryError:
            self._is_off = True
            return None
        return self._taken(buffer, num_bytes)

    def _taken(self, buffer: _Buffer, num_bytes: int) -> Place:
        place = Place(buffer.flat[:num_bytes], self._lane, buffer.copied)
        weakref.finalize(place, self._free.append, buffer).atexit = False
        return place


class Place:
    """Pinned memory that is free for others once this object is deleted.

    Args:
        flat: The memory, uint8.
        lane: The device's.
        copied: Mark for copies from it.
    """

    def __init__(self, flat: Tensor, lane: Lane, copied: object) -> None:
        self.flat = flat
        self._lane = lane
        self._copied = copied

    def send(self, tensor: Tensor, device: torch.device | str) -> Tensor:
        """Returns a copy on the device of a tensor that lies here; it is there in its turn.

        The memory stays as it is until then, even if this object is deleted.
        """
        sent = torch.empty_like(tensor, device=device).copy_(tensor, non_blocking=True)
        self._lane.computed(self._copied)
        return sent
