"""Host memory in which the images of a pass lie while they are kept, pinned for a GPU's copies.

Ordinary memory takes a GPU's copy twenty times as long, and the GPU has nothing to do meanwhile.
Knows bytes, not images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sensebatch.engine.memory.blocks import new_buffer
from sensebatch.engine.memory.host import CPU, PinnedMemory
from sensebatch.errors import OutOfMemoryError


class Shelf:
    """Two places that are used in turn: one is written to a disk while the other is filled.

    Args:
        pin: Whether they are pinned.
    """

    def __init__(self, *, pin: bool) -> None:
        self._pin = pin
        self._places = [torch.empty(0, dtype=torch.uint8)] * 2
        self._pins: list[PinnedMemory | None] = [None, None]
        self._next = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """Begins to copy a tensor to the host, and returns where it will be.

        It is there once the device is through with what was asked of it, and stays until the next
        copy but one.
        """
        number, self._next = self._next, 1 - self._next
        if self._places[number].nbytes < tensor.nbytes:
            self._make(number, tensor.nbytes)
        if not self._places[self._next].nbytes:
            # Now, so that the second batch does not wait for it.
            self._make(self._next, tensor.nbytes)
        place = self._places[number][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor, non_blocking=True)

    def _make(self, number: int, num_bytes: int) -> None:
        # Unpinned before it is freed, or whatever is allocated there next could not be copied.
        self._pins[number] = None
        self._places[number] = place = new_buffer(num_bytes, CPU)
        if self._pin:
            try:
                self._pins[number] = PinnedMemory(place)
            except OutOfMemoryError:
                # Memory that the system does not allow to be pinned is copied to, but more slowly.
                self._pin = False
