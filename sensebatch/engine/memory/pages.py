"""Host memory in which prefixes wait for their pass, pinned if a GPU copies from it.

Pages are reused, and made only when there are too few, because touching and pinning new memory
takes many times as long as the copies. Knows bytes, not caches.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from sensebatch.engine.memory.blocks import new_buffer
from sensebatch.engine.memory.host import CPU, PinnedMemory
from sensebatch.errors import OutOfMemoryError
from sensebatch.plan.passes import PAGE_BYTES


class Pages:
    """Makes pages and keeps the free ones.

    Args:
        pin: Whether pages are pinned for copies to a GPU.
        page_bytes: Bytes of a page.
    """

    def __init__(self, *, pin: bool, page_bytes: int = PAGE_BYTES) -> None:
        self._pin = pin
        self._page_bytes = page_bytes
        self._free: list[Tensor] = []
        self._pins: list[PinnedMemory] = []
        self.num_made = 0
        """All pages, taken or free."""

    def take(self, num_bytes: int) -> Parcel:
        """Returns pages for so many bytes; they are free again once the parcel is deleted.

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
                # Memory that the system does not allow to be pinned is copied too, but more slowly.
                self._pin = False
        self.num_made += 1
        return page


class Parcel:
    """Bytes in some pages.

    Copies to and from a GPU are issued but not awaited. Within a stream they stay in order, even
    with copies of whoever takes the pages next.

    Args:
        pages: Pages of one size.
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
        """Yields the bytes of each page that a tensor touches, with the tensor's bytes for them."""
        flat = tensor.view(-1).view(torch.uint8)
        place = 0
        while place < flat.numel():
            number, offset = divmod(start + place, self._page_bytes)
            size = min(self._page_bytes - offset, flat.numel() - place)
            yield self._pages[number][offset : offset + size], flat[place : place + size]
            place += size
