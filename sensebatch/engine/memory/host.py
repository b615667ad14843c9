"""Blocks in host memory: as many as its budget allows are kept, the others read again and again.

Kept blocks are pinned where the device is a GPU, so that they are copied beside the computation.
The others are read into a few pinned staging buffers by a thread, ahead of use.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from sensebatch.engine.memory.blocks import Block, new_buffer
from sensebatch.engine.memory.lanes import Lane
from sensebatch.errors import OutOfMemoryError
from sensebatch.vram import NUM_STAGING

NUM_READERS = 4
"""Threads that fill kept blocks at load."""


class HostStore:
    """Where blocks come from when they are copied to the device.

    Args:
        dtype: Of the weights.
        pin: Whether host memory is pinned for copies to a GPU.
    """

    def __init__(self, dtype: torch.dtype, *, pin: bool) -> None:
        self._dtype = dtype
        self._pin = pin
        self._pins: list[PinnedMemory] = []
        self._kept: dict[Block, Tensor] = {}
        self._staging: list[tuple[Tensor, object]] = []
        self._next_staging = 0
        self._reader: ThreadPoolExecutor | None = None

    @property
    def kept_bytes(self) -> int:
        """Host memory that blocks and staging buffers take."""
        tensors = [*self._kept.values(), *(tensor for tensor, _ in self._staging)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def keep(self, blocks: Sequence[Block], budget_bytes: int | None, lane: Lane) -> None:
        """Reads blocks into host memory, in order, as far as the budget goes.

        Args:
            blocks: Those that may be needed more than once.
            budget_bytes: Most bytes taken, staging buffers counted; None for no limit.
            lane: Of the device; staging buffers need its marks.

        Raises:
            CheckpointError: A file cannot be read.
        """
        sizes = [block.layout.num_elements * self._dtype.itemsize for block in blocks]
        staging_bytes = NUM_STAGING * max(sizes, default=0)
        kept = list(blocks)
        if budget_bytes is not None and sum(sizes) > budget_bytes:
            left = budget_bytes - staging_bytes
            kept = []
            for block, size in zip(blocks, sizes, strict=True):
                if size <= left:
                    kept.append(block)
                    left -= size
        with ThreadPoolExecutor(NUM_READERS) as readers:
            self._kept = dict(zip(kept, readers.map(self._read, kept), strict=True))
        if len(kept) < len(blocks):
            elements = max(block.layout.num_elements for block in blocks)
            for _ in range(NUM_STAGING):
                staging = new_buffer(elements, self._dtype, torch.device("cpu"))
                self._staging.append((self._pinned(staging), lane.new_mark()))
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="sensebatch-reader")

    def close(self, lane: Lane) -> None:
        """Lets go of what is needed only while blocks are copied, once the copies are done."""
        if self._reader is not None:
            self._reader.shutdown()
            self._reader = None
        for _, copied in self._staging:
            lane.finish(copied)
        self._staging.clear()
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
        assert self._reader is not None, f"{block.name} was never kept"
        return self._reader.submit(self._read_and_copy, block, target, lane, after, done)

    def _read_and_copy(
        self, block: Block, target: Tensor, lane: Lane, after: object, done: object
    ) -> None:
        staging, copied = self._staging[self._next_staging]
        self._next_staging = (self._next_staging + 1) % NUM_STAGING
        lane.finish(copied)
        part = staging[: block.layout.num_elements]
        block.fill(part)
        lane.copy(target, part, after, copied)
        lane.copy(target[:0], part[:0], copied, done)

    def _read(self, block: Block) -> Tensor:
        buffer = new_buffer(block.layout.num_elements, self._dtype, torch.device("cpu"))
        block.fill(buffer)
        return self._pinned(buffer)

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
        size = buffer.numel() * buffer.element_size()
        code = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)
        if int(code) != 0:
            raise OutOfMemoryError(
                f"pinning {size} bytes of host memory failed with CUDA error {int(code)}; "
                "give the host a smaller budget (max_memory cpu=...)"
            )
        # A process that ends lets everything go by itself, and sooner.
        weakref.finalize(self, _unpin, buffer).atexit = False


def _unpin(buffer: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
