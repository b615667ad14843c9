"""Places in pinned host memory that are used again, so that a GPU's copies are not waited for.

Touching and pinning new memory takes many times as long as the copies. Knows bytes only.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sensebatch.engine.memory.blocks import new_buffer
from sensebatch.engine.memory.host import CPU, PinnedMemory
from sensebatch.engine.memory.lanes import Lane
from sensebatch.errors import OutOfMemoryError

MAX_TIMES = 2
"""How many times what is asked for a place may have at most."""


@dataclass(frozen=True, slots=True, eq=False)
class _Buffer:
    """Pinned memory, taken or free."""

    flat: Tensor
    pin: PinnedMemory
    copied: object
    """Mark: the last copy from or to it is done."""


class Places:
    """Makes places, and keeps free ones as long as they suit what is asked for.

    Args:
        lane: The device's.
        most_bytes: Most bytes of all places; None for no limit.
    """

    def __init__(self, lane: Lane, most_bytes: int | None = None) -> None:
        self._lane = lane
        self._most_bytes = most_bytes
        self._held_bytes = 0
        # Places are given back at any moment and in any thread.
        self._free: deque[_Buffer] = deque()
        self._is_off = False

    def take(self, num_bytes: int) -> Place | None:
        """Returns a place of so many bytes; called by one thread at a time.

        It waits for copies from the place that it returns, and of those that it frees.

        Returns:
            None where the system does not allow so much memory to be pinned, or `most_bytes` does
            not. The system is not asked again.
        """
        buffer = self._buffer(num_bytes)
        if buffer is None:
            return None
        place = Place(buffer.flat[:num_bytes], self._lane, buffer.copied)
        self._give_back_with(place, buffer)
        return place

    def bring(self, tensor: Tensor) -> np.ndarray:
        """Begins to copy a tensor to the host, and returns the array that it will be.

        It is there once the device is through with what was asked of it. Its place is free again
        once neither the array nor a view of it is left. Where there is no place, the copy is to
        ordinary memory, which takes longer. Called by one thread at a time.
        """
        buffer = self._buffer(tensor.nbytes)
        if buffer is None:
            copied: np.ndarray = tensor.cpu().numpy()
            return copied
        target = buffer.flat[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        array: np.ndarray = target.numpy()
        self._give_back_with(array, buffer)
        target.copy_(tensor, non_blocking=True)
        self._lane.computed(buffer.copied)
        return array

    def _give_back_with(self, owner: object, buffer: _Buffer) -> None:
        weakref.finalize(owner, self._free.append, buffer).atexit = False

    def _buffer(self, num_bytes: int) -> _Buffer | None:
        """Returns a free buffer or a new one; frees those that do not suit if none does."""
        others: list[_Buffer] = []
        while self._free:
            buffer = self._free.popleft()
            if num_bytes <= buffer.flat.nbytes <= MAX_TIMES * num_bytes:
                self._free.extend(others)
                self._lane.finish(buffer.copied)
                return buffer
            others.append(buffer)
        while others:
            buffer = others.pop()
            self._lane.finish(buffer.copied)
            self._held_bytes -= buffer.flat.nbytes
            del buffer
        return self._new(num_bytes)

    def _new(self, num_bytes: int) -> _Buffer | None:
        is_over = self._most_bytes is not None and self._held_bytes + num_bytes > self._most_bytes
        if self._is_off or is_over:
            return None
        try:
            flat = new_buffer(num_bytes, CPU)
            buffer = _Buffer(flat, PinnedMemory(flat), self._lane.new_mark())
        except OutOfMemoryError:
            self._is_off = True
            return None
        self._held_bytes += num_bytes
        return buffer


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
