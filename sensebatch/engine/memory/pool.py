"""Device memory for blocks: which block is where in it, and when.

A pass goes through its blocks in a known order. The memory is cut into buffers: a ring of some as
large as the largest block, the others as large as most blocks are. Some blocks are kept: they have
a buffer to themselves. The others share the ring, and are copied ahead of use while earlier blocks
are computed with. Nothing is allocated after the memory is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import accumulate, chain

from torch import Tensor, nn

from sensebatch.engine.memory.blocks import Block, Layout, bind
from sensebatch.engine.memory.host import HostStore
from sensebatch.engine.memory.lanes import Lane
from sensebatch.plan.passes import RING


class _State(Enum):
    """The state of a buffer's content."""

    EMPTY = auto()
    """No block."""
    AHEAD = auto()
    """A block that was copied ahead for its next use; it must not be overwritten."""
    LEFT = auto()
    """A block that an earlier order had copied ahead but did not use; it may be overwritten."""
    READY = auto()
    """A block whose copy the computation has already waited for."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Buffer:
    """Room for one block on the device."""

    flat: Tensor
    start: int
    """Its first byte in the memory."""
    loaded: object
    """Mark: the copy into it is done."""
    used: object
    """Mark: the computation with its content is done."""
    state: _State = _State.EMPTY
    block: Block | None = None
    """None if the buffer is empty."""
    copying: Future[None] | None = None
    """The host's part of a copy that has not been issued yet."""
    shells: dict[Layout, nn.Module] = field(default_factory=dict)

    def shell(self, block: Block) -> nn.Module:
        """Returns a module of the block's kind whose parameters are this buffer."""
        if block.layout not in self.shells:
            self.shells[block.layout] = bind(block.module, block.layout, self.flat)
        return self.shells[block.layout]

    def overlaps(self, other: _Buffer) -> bool:
        """Returns whether two buffers share memory."""
        return (
            self.start < other.start + other.flat.nbytes
            and other.start < self.start + self.flat.nbytes
        )


class Pool:
    """Lends blocks as modules on the device.

    Args:
        memory: Flat device memory, at least `RING` times the largest block.
        host: Supplies the blocks.
        lane: Copies beside the computation.
        sizes: Bytes of the buffers that the memory is cut into for good, if all blocks are kept;
            None cuts it for each order of blocks.
    """

    def __init__(
        self, memory: Tensor, host: HostStore, lane: Lane, sizes: Sequence[int] | None = None
    ) -> None:
        self._host = host
        self._lane = lane
        self._memory: Tensor | None = memory
        self._fixed = None if sizes is None else self._cut(sizes)
        self._cuts: dict[tuple[int, int], list[_Buffer]] = {}
        self._active: list[_Buffer] = []
        self._where: dict[Block, _Buffer] = {}
        self._order: list[Block] = []
        self._place: dict[Block, int] = {}
        self._kept: dict[Block, _Buffer] = {}
        self._ring: list[_Buffer] = []
        self._in_use: _Buffer | None = None
        self._settled = False
        """Whether every block of the order is in the buffer that it keeps."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the memory."""
        return 0 if self._memory is None else self._memory.nbytes

    @property
    def keeps_all(self) -> bool:
        """Whether every block of the order has a buffer to itself until the next order."""
        return len(self._kept) == len(self._order)

    def release(self) -> None:
        """Frees the memory, and forgets what was in it; `give` must follow."""
        for buffer in self._active:
            self._forget(buffer)
        # Memory must not be freed while copies to it are pending, even in buffers of earlier cuts.
        for buffer in chain.from_iterable(self._cuts.values()):
            self._lane.finish(buffer.loaded)
        self._order, self._kept, self._ring, self._active = [], {}, [], []
        self._cuts.clear()
        self._settled = False
        self._memory = None

    def give(self, memory: Tensor) -> None:
        """Takes new memory after `release`."""
        self._memory = memory

    def schedule(self, order: Sequence[Block], *, keep: bool) -> None:
        """Prepares for passes through blocks in this order.

        Args:
            order: The blocks of a pass.
            keep: Whether many passes follow, so that as many blocks as fit get a buffer to
                themselves. Otherwise blocks that other passes keep stay where they are, and only
                the ring is used.
        """
        self._drop_failed()
        buffers = self._buffers_for(order)
        is_even = self._fixed is not None or buffers[0].flat.nbytes == buffers[-1].flat.nbytes
        whole = is_even and len(order) <= len(buffers)
        kept = order if whole else _may_be_kept(buffers, order)
        num_kept = len(order) if whole else min(len(buffers) - RING, len(kept))
        if list(order) == self._order and (not keep or len(self._kept) == num_kept):
            return
        self._order = list(order)
        self._place = {block: place for place, block in enumerate(order)}
        self._settled = False
        for buffer in self._active:
            if buffer.state is _State.AHEAD:
                buffer.state = _State.LEFT
            # Blocks that stay are lent without setting their mark.
            self._lane.computed(buffer.used)
        whole = keep and whole
        room = buffers if whole else buffers[:-RING]
        self._ring = [] if whole else buffers[-RING:]
        self._kept = {b.block: b for b in room if b.block in self._place}
        if keep:
            self._assign_kept(room, kept, num_kept)
        self._claim([*self._kept.values(), *self._ring])

    def _buffers_for(self, order: Sequence[Block]) -> list[_Buffer]:
        """Returns the memory cut into buffers for an order of blocks, aligned with its end.

        The last ones are for any block. The others are as large as most blocks, unless there is a
        buffer for each block anyway.
        """
        if self._fixed is not None:
            return self._fixed
        assert self._memory is not None
        sizes = Counter(block.layout.num_bytes for block in order)
        largest, total = max(sizes), self._memory.nbytes
        usual = largest if len(order) * largest <= total else max(sizes, key=sizes.__getitem__)
        if (usual, largest) not in self._cuts:
            room = total - RING * largest
            of_cut = [usual] * (room // usual) + [largest] * RING
            self._cuts[usual, largest] = self._cut(of_cut)
        return self._cuts[usual, largest]

    def _cut(self, sizes: Sequence[int]) -> list[_Buffer]:
        assert self._memory is not None
        first = self._memory.nbytes - sum(sizes)
        starts = accumulate(sizes[:-1], initial=first)
        return [
            _Buffer(
                flat=self._memory[start : start + size],
                start=start,
                loaded=self._lane.new_mark(),
                used=self._lane.new_mark(),
            )
            for start, size in zip(starts, sizes, strict=True)
        ]

    def _claim(self, buffers: Sequence[_Buffer]) -> None:
        """Makes buffers active, and forgets those of other cuts that overlap them."""
        taken = [buffer for buffer in buffers if buffer not in self._active]
        for buffer in self._active:
            if any(buffer.overlaps(other) for other in taken):
                self._forget(buffer)
        self._active = [
            buffer for buffer in self._active if not any(buffer.overlaps(other) for other in taken)
        ] + taken
        for buffer in taken:
            # Copies are made in order, but must also wait for what was computed with the memory.
            self._lane.computed(buffer.used)

    def _assign_kept(self, room: Sequence[_Buffer], order: Sequence[Block], count: int) -> None:
        """Gives so many blocks of an order, spread over the pass, a buffer to themselves.

        Blocks that are in a buffer of this cut stay there. The others get buffers in order, empty
        ones before those that other orders have filled. So if there is a buffer of each block's
        own size, every block gets its own.
        """
        chosen = {order[i * len(order) // count] for i in range(count)} if count else set()
        self._kept = {block: buffer for block, buffer in self._kept.items() if block in chosen}
        taken = set(map(id, self._kept.values()))
        filled = [buffer for buffer in self._active if buffer.block is not None]

        def costs(buffer: _Buffer) -> bool:
            return any(buffer.overlaps(other) for other in filled)

        free = iter(sorted((b for b in room if id(b) not in taken), key=costs))
        for block in order:
            if block in chosen and block not in self._kept:
                self._kept[block] = next(free)

    @contextmanager
    def lend(self, block: Block) -> Iterator[nn.Module]:
        """Lends a module with the block's weights for as long as the context is open.

        Raises:
            CheckpointError: The weights could not be read.
        """
        buffer = self._where.get(block) or self._load(block)
        if self._settled and buffer.state is _State.READY:
            yield buffer.shell(block)
            return
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
            buffer.state = _State.READY
            yield buffer.shell(block)
        finally:
            self._lane.computed(buffer.used)
            self._in_use = None
        self._look_ahead(block)

    def _look_ahead(self, block: Block) -> None:
        """Starts to copy the blocks that follow one, as far as there are buffers for them."""
        place = self._place.get(block)
        if place is None or self._settled:
            return
        for distance in range(1, len(self._order)):
            following = self._order[(place + distance) % len(self._order)]
            if following in self._where:
                continue
            buffer = self._kept.get(following) or self._free_ring_buffer()
            # The buffer that is to keep the block may still be lent with one of an earlier order.
            if buffer is None or buffer is self._in_use:
                return
            self._fill(buffer, following)
        self._settled = self.keeps_all and block in self._where

    def _free_ring_buffer(self) -> _Buffer | None:
        for buffer in self._ring:
            if buffer is not self._in_use and buffer.state is not _State.AHEAD:
                return buffer
        return None

    def _load(self, block: Block) -> _Buffer:
        """Copies a block that is needed now."""
        buffer = self._kept.get(block) or self._free_ring_buffer()
        if buffer is None:
            # Every ring buffer holds a block that was expected but not asked for.
            buffer = next(buffer for buffer in self._ring if buffer is not self._in_use)
        self._fill(buffer, block)
        return buffer

    def _fill(self, buffer: _Buffer, block: Block) -> None:
        self._forget(buffer)
        buffer.block, buffer.state = block, _State.AHEAD
        self._where[block] = buffer
        target = buffer.flat[: block.layout.num_bytes]
        buffer.copying = self._host.copy(block, target, self._lane, buffer.used, buffer.loaded)

    def _drop_failed(self) -> None:
        """Forgets copies ahead that failed, so that no later batch fails because of them."""
        for buffer in self._active:
            if buffer.copying is not None and buffer.copying.exception() is not None:
                self._forget(buffer)

    def _forget(self, buffer: _Buffer) -> None:
        if buffer.copying is not None:
            # A copy that has yet to be issued would overwrite the buffer's next content.
            buffer.copying.exception()
            buffer.copying = None
        if buffer.block is not None:
            self._where.pop(buffer.block, None)
        buffer.block, buffer.state = None, _State.EMPTY
        self._settled = False


def _may_be_kept(buffers: Sequence[_Buffer], order: Sequence[Block]) -> list[Block]:
    """Returns the blocks that fit a buffer which is not of the ring."""
    size = buffers[0].flat.nbytes
    return [block for block in order if block.layout.num_bytes <= size]
