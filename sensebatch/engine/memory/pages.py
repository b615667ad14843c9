"""Host memory in which prefixes wait for the pass that reads them, pinned where a GPU copies it.

Pages are taken again and again, and made only when there are too few: to touch and to pin fresh
memory takes many times as long as the copies. Knows bytes, not caches.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from sensebatch.engine.memory.blocks import new_buffer
from sensebatch.engine.memory.host import CPU, PinnedMemory
from sensebatch.errors import OutOfMemoryError

PAGE_BYTES = 16 << 20


class Pages:
    """Makes pages and keeps those that are free.

    Args:
        pin: Whether they are pinned for copies to a GPU.
        page_bytes: Of one page.
    """

    def __init__(self, *, pin: bool, page_bytes: int = PAGE_BYTES) -> None:
        self._pin = pin
        self._page_bytes = page_bytes
        self._free: list[Tensor] = []
        self._pins: list[PinnedMemory] = []
        self.num_made = 0
        """Pages there are, taken or free."""

    def take(self, num_bytes: int) -> Parcel:
        """Returns room for so many bytes, which is free again when the parcel is gone.

        Raises:
            OutOfMemoryError: The host has no memory left.
        """
        count = -(-num_bytes // self._page_bytes)
        while len(self._free) < count:
            self._free.append(self._new())
        pages = [self._free.pop() for _ in range(count)]
        parcel = Parcel(pages, self._page_bytes)
        weakref.finalize(parcel, self._free.extend, pages).atexit = False
        return parcel

    def _new(self) -> Tensor:
        page = new_buffer(self._page_bytes, CPU)
        if self._pin:
            try:
                self._pins.append(PinnedMemory(page))
            except OutOfMemoryError:
                # What the system does not let be pinned is copied all the same, more slowly.
                self._pin = False
        self.num_made += 1
        return page


class Parcel:
    """Some pages, written and read by their bytes.

    Copies to and from a GPU are issued and not waited for; those of one stream are in order, also
    with those of whoever takes the pages next.

    Args:
        pages: Of one size.
        page_bytes: That size.
    """

    def __init__(self, pages: list[Tensor], page_bytes: int) -> None:
        self._pages = pages
        self._page_bytes = page_bytes

    def write(self, start: int, source: Tensor) -> None:
        """Copies a contiguous tensor's bytes to `[start, start + source.nbytes)`."""
        for page, part in self._parts(start, source):
            page.copy_(part, non_blocking=True)

    def read(self, start: int, target: Tensor) -> None:
        """Copies `[start, start + target.nbytes)` into a contiguous tensor."""
        for page, part in self._parts(start, target):
            part.copy_(page, non_blocking=True)

    def _parts(self, start: int, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields, for each page it touches, the bytes there and those of the tensor."""
        flat = tensor.view(-1).view(torch.uint8)
        place = 0
        while place < flat.numel():
            number, offset = divmod(start + place, self._page_bytes)
            size = min(self._page_bytes - offset, flat.numel() - place)
            yield self._pages[number][offset : offset + size], flat[place : place + size]
            place += size
