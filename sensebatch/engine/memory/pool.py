"""Device buffers of one block each, and which block is in which of them when.

A pass goes through its blocks in a known order, again and again. Some of them are kept: they have
a buffer for themselves. The others share what is left, the ring, and are copied ahead of use
while earlier blocks are computed with. Nothing is allocated after the buffers are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from sensebatch.engine.memory.blocks import Block, Layout, bind
from sensebatch.engine.memory.host import HostStore
from sensebatch.engine.memory.lanes import Lane
from sensebatch.vram import RING


@dataclass(slots=True, eq=False, kw_only=True)
class _Buffer:
    """Room for one block on the device."""

    flat: Tensor
    loaded: object
    """Mark: the copy into it is done."""
    used: object
    """Mark: the computation with it is done."""
    block: Block | None = None
    waiting: bool = False
    """Whether its block was copied ahead and has not been used yet."""
    copying: Future[None] | None = None
    """The host side of a copy that is not issued yet."""
    shells: dict[Layout, nn.Module] = field(default_factory=dict)

    def shell(self, block: Block) -> nn.Module:
        """Returns a module of the block's kind on this buffer."""
        if block.layout not in self.shells:
            self.shells[block.layout] = bind(block.module, block.layout, self.flat)
        return self.shells[block.layout]


class Pool:
    """Lends blocks as modules on the device.

    Args:
        buffers: Flat device memory, at least `RING`, each large enough for any block that may
            come to it.
        host: Gives what a buffer is filled with.
        lane: Copies beside the computation.
    """

    def __init__(self, buffers: Sequence[Tensor], host: HostStore, lane: Lane) -> None:
        self._host = host
        self._lane = lane
        self._buffers = [
            _Buffer(flat=flat, loaded=lane.new_mark(), used=lane.new_mark()) for flat in buffers
        ]
        self._where: dict[Block, _Buffer] = {}
        self._order: list[Block] = []
        self._place: dict[Block, int] = {}
        self._kept: dict[Block, _Buffer] = {}
        self._ring: list[_Buffer] = list(self._buffers)
        self._in_use: _Buffer | None = None

    def shrink(self, num_buffers: int) -> None:
        """Lets go of all buffers but some; what was in them is copied again when it is needed."""
        for buffer in self._buffers:
            self._forget(buffer)
            # Memory that is still copied to must not be given away.
            self._lane.finish(buffer.loaded)
        del self._buffers[num_buffers:]
        self._order, self._kept, self._ring = [], {}, list(self._buffers)

    def schedule(self, order: Sequence[Block], *, keep: bool) -> None:
        """Says which blocks the coming passes go through.

        Args:
            order: The blocks of a pass.
            keep: Whether there will be many passes, so that as many blocks as fit get a buffer
                for themselves. Otherwise what other passes keep stays where it is, and only
                the ring is used.
        """
        self._drop_failed()
        if list(order) == self._order and (not keep or len(self._kept) == self._keepable(order)):
            return
        self._order = list(order)
        self._place = {block: place for place, block in enumerate(order)}
        for buffer in self._buffers:
            buffer.waiting = False
        whole = keep and len(order) <= len(self._buffers)
        room = self._buffers if whole else self._buffers[:-RING]
        self._ring = [] if whole else self._buffers[-RING:]
        self._kept = {b.block: b for b in room if b.block in self._place}
        if keep:
            self._assign_kept(room)

    def _keepable(self, order: Sequence[Block]) -> int:
        whole = len(order) <= len(self._buffers)
        return len(order) if whole else len(self._buffers) - RING

    def _assign_kept(self, room: Sequence[_Buffer]) -> None:
        """Gives as many blocks as there is room for their own buffer, spread over the pass.

        Blocks are assigned in the order of the pass and of the buffers, so where every block has
        a buffer of its own size, it gets that one.
        """
        order, count = self._order, self._keepable(self._order)
        chosen = {order[i * len(order) // count] for i in range(count)} if count else set()
        self._kept = {block: buffer for block, buffer in self._kept.items() if block in chosen}
        taken = set(map(id, self._kept.values()))
        free = iter([buffer for buffer in room if id(buffer) not in taken])
        for block in order:
            if block in chosen and block not in self._kept:
                self._kept[block] = next(free)

    @contextmanager
    def lend(self, block: Block) -> Iterator[nn.Module]:
        """Gives a module of the block's weights, to be computed with inside the context.

        Raises:
            CheckpointError: The weights could not be read again.
        """
        buffer = self._where.get(block) or self._load(block)
        self._in_use = buffer
        try:
            self._look_ahead(block)
            if buffer.copying is not None:
                try:
                    buffer.copying.result()
                except BaseException:
                    self._forget(buffer)
                    raise
                buffer.copying = None
            self._lane.wait(buffer.loaded)
            buffer.waiting = False
            yield buffer.shell(block)
        finally:
            self._lane.computed(buffer.used)
            self._in_use = None
        self._look_ahead(block)

    def _look_ahead(self, block: Block) -> None:
        """Starts copying the blocks behind one, as far as there are buffers for them."""
        place = self._place.get(block)
        if place is None or len(self._kept) == len(self._order) <= len(self._where):
            return
        for distance in range(1, len(self._order)):
            following = self._order[(place + distance) % len(self._order)]
            if following in self._where:
                continue
            buffer = self._kept.get(following) or self._free_ring_buffer()
            if buffer is None:
                return
            self._fill(buffer, following)

    def _free_ring_buffer(self) -> _Buffer | None:
        for buffer in self._ring:
            if buffer is not self._in_use and not buffer.waiting:
                return buffer
        return None

    def _load(self, block: Block) -> _Buffer:
        """Copies a block that is needed now."""
        buffer = self._kept.get(block) or self._free_ring_buffer()
        if buffer is None:
            # Every ring buffer waits for a block that was expected and did not come.
            buffer = next(buffer for buffer in self._ring if buffer is not self._in_use)
        self._fill(buffer, block)
        return buffer

    def _fill(self, buffer: _Buffer, block: Block) -> None:
        self._forget(buffer)
        buffer.block = block
        buffer.waiting = True
        self._where[block] = buffer
        target = buffer.flat[: block.layout.num_bytes]
        buffer.copying = self._host.copy(block, target, self._lane, buffer.used, buffer.loaded)

    def _drop_failed(self) -> None:
        """Forgets copies ahead that failed, so that they are an error of no later batch."""
        for buffer in self._buffers:
            if buffer.copying is not None and buffer.copying.exception() is not None:
                self._forget(buffer)

    def _forget(self, buffer: _Buffer) -> None:
        if buffer.copying is not None:
            # A copy that is still to be issued would overwrite what comes next.
            buffer.copying.exception()
            buffer.copying = None
        if buffer.block is not None:
            self._where.pop(buffer.block, None)
        buffer.block = None
        buffer.waiting = False
