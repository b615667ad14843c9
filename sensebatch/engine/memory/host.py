"""Blocks in host memory: as many as its budget allows are kept, the others read again and again.

Kept blocks are pinned where the device is a GPU, so that they are copied beside the computation.
The others are read into a few pinned staging buffers, ahead of use. A block is read by several
threads at a time, and the next one begun before the last is done.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

import torch
from torch import Tensor

from sensebatch.engine.memory.blocks import Block, new_buffer
from sensebatch.engine.memory.lanes import Lane
from sensebatch.engine.memory.readers import Readers
from sensebatch.errors import OutOfMemoryError
from sensebatch.plan.passes import NUM_STAGING

NUM_KEEPERS = 4
"""Kept blocks that are read and pinned at the same time."""
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class _Staging:
    """A buffer that blocks are read through."""

    flat: Tensor
    copied: object
    """Mark: what was in it is on the device."""


class HostStore:
    """Where blocks come from when they are copied to the device.

    Args:
        readers: Threads that read parts of blocks; they stay the caller's.
        pin: Whether host memory is pinned for copies to a GPU.
    """

    def __init__(self, readers: Readers, *, pin: bool) -> None:
        self._readers = readers
        self._pin = pin
        self._pins: list[PinnedMemory] = []
        self._kept: dict[Block, Tensor] = {}
        self._staging: list[_Staging] = []
        self._free: SimpleQueue[_Staging] = SimpleQueue()
        self._copiers: ThreadPoolExecutor | None = None
        self._last_copy: Future[None] | None = None

    @property
    def kept_bytes(self) -> int:
        """Host memory that blocks and staging buffers take."""
        tensors = [*self._kept.values(), *(staging.flat for staging in self._staging)]
        return sum(tensor.nbytes for tensor in tensors)

    def keep(self, blocks: Sequence[Block], room_bytes: int | None, lane: Lane) -> None:
        """Reads blocks into host memory, in order, as many as there is room for.

        Args:
            blocks: Those that may be needed more than once.
            room_bytes: Most bytes taken, staging buffers counted; None for no limit.
            lane: Of the device; staging buffers need its marks.

        Raises:
            CheckpointError: A file cannot be read.
            OutOfMemoryError: The host has less memory.
        """
        sizes = [block.layout.num_bytes for block in blocks]
        largest = max(sizes, default=0)
        kept = list(blocks)
        if room_bytes is not None and sum(sizes) > room_bytes:
            left = room_bytes - NUM_STAGING * largest
            kept = []
            for block, size in zip(blocks, sizes, strict=True):
                if size <= left:
                    kept.append(block)
                    left -= size
        with ThreadPoolExecutor(NUM_KEEPERS) as keepers:
            self._kept = dict(zip(kept, keepers.map(self._read, kept), strict=True))
        if len(kept) < len(blocks):
            for _ in range(NUM_STAGING):
                staging = _Staging(self._pinned(new_buffer(largest, CPU)), lane.new_mark())
                self._staging.append(staging)
                self._free.put(staging)
            self._copiers = ThreadPoolExecutor(NUM_STAGING, thread_name_prefix="sensebatch-copier")

    def close(self, lane: Lane) -> None:
        """Lets go of what is needed only while blocks are copied, once the copies are done."""
        if self._copiers is not None:
            self._copiers.shutdown(cancel_futures=True)
            self._copiers = None
        for staging in self._staging:
            lane.finish(staging.copied)
        self._staging.clear()
        self._free = SimpleQueue()
        if not self._kept:
            self._pins.clear()

    def copy(
        self, block: Block, target: Tensor, lane: Lane, after: object, done: object
    ) -> Future[None] | None:
        """Copies a block to the device once `after` is reached; `done` is set behind the copy.

        Returns:
            None where the copy has been issued; else what to wait for before `done` may be
            waited for, which carries the error of a failed read.
        """
        if block in self._kept:
            lane.copy(target, self._kept[block], after, done)
            return None
        assert self._copiers is not None, f"{block.name} was never kept"
        self._last_copy = self._copiers.submit(
            self._read_and_copy, block, target, lane, after, done, self._last_copy
        )
        return self._last_copy

    def _read_and_copy(
        self,
        block: Block,
        target: Tensor,
        lane: Lane,
        after: object,
        done: object,
        previous: Future[None] | None,
    ) -> None:
        # There is one for each thread that comes here.
        staging = self._free.get()
        try:
            lane.finish(staging.copied)
            part = staging.flat[: block.layout.num_bytes]
            self._fill(block, part)
            if previous is not None:
                # Copies are issued in the order they were asked for, whatever was read first.
                # Raises where that copy was cancelled, of which `wait` would never hear.
                previous.exception()
            lane.copy(target, part, after, staging.copied)
            lane.copy(target[:0], part[:0], staging.copied, done)
        finally:
            self._free.put(staging)

    def _read(self, block: Block) -> Tensor:
        buffer = new_buffer(block.layout.num_bytes, CPU)
        self._fill(block, buffer)
        return self._pinned(buffer)

    def _fill(self, block: Block, flat: Tensor) -> None:
        self._readers.run(partial(part, flat) for part in block.parts)

    def _pinned(self, buffer: Tensor) -> Tensor:
        if self._pin:
            self._pins.append(PinnedMemory(buffer))
        return buffer


class PinnedMemory:
    """Host memory that a GPU may copy from by itself, for as long as this object lives.

    Pinned in place: torch's own pinned allocator rounds up to powers of two. It must be let go
    before its memory is, or whatever comes to lie there next cannot be copied any more.

    Args:
        buffer: Is kept alive as long as it is pinned.

    Raises:
        OutOfMemoryError: The system does not let so much memory be pinned.
    """

    def __init__(self, buffer: Tensor) -> None:
        size = buffer.nbytes
        code = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)
        if int(code) != 0:
            # The runtime remembers the error, and the next kernel's launch would be blamed for it.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device="cuda")
            raise OutOfMemoryError(
                f"pinning {size} bytes of host memory failed with CUDA error {int(code)}; "
                "give the host a smaller budget (max_memory cpu=...)"
            )
        # A process that ends lets everything go by itself, and sooner.
        weakref.finalize(self, _unpin, buffer).atexit = False


def _unpin(buffer: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
