"""Keeps as many blocks in host memory as its budget allows, and reads the others when needed.

Kept blocks are pinned if the device is a GPU, so that copies overlap with the computation, and may
be packed, so that they take less of the host and of the way. The
others are read ahead of use, into a few pinned staging buffers. Several threads read a block, and
begin the next one before the last is done. Processes that compute with the same weights may share
the kept blocks; each pins them for itself.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

import torch
from torch import Tensor

from sensebatch.engine.memory.blocks import Block, new_buffer
from sensebatch.engine.memory.lanes import Lane
from sensebatch.engine.memory.packing import Packed, pack
from sensebatch.engine.memory.readers import Readers
from sensebatch.engine.memory.shared import SharedBuffers
from sensebatch.errors import DeviceError, OutOfMemoryError
from sensebatch.plan.passes import NUM_PACKED, NUM_STAGING, PACKED_SHARE

NUM_KEEPERS = 4
"""How many kept blocks are read and pinned at the same time."""
CPU = torch.device("cpu")
BLOCKS = "blocks"
"""What kept blocks are called where they are shared."""


@dataclass(frozen=True, slots=True, eq=False)
class _Staging:
    """A buffer that blocks pass through on their way to the device."""

    flat: Tensor
    copied: object
    """Mark: its last content is on the device."""


class HostStore:
    """Supplies blocks that are copied to the device.

    Args:
        readers: Threads that read parts of blocks; the caller closes them.
        pin: Whether host memory is pinned for copies to a GPU.
        shared: What kept blocks lie in if other processes use them too; None for memory of this
            process.
        pack_on: The device that packs blocks, and unpacks them on their way to it; None keeps
            blocks as they are.
    """

    def __init__(
        self,
        readers: Readers,
        *,
        pin: bool,
        shared: SharedBuffers | None = None,
        pack_on: torch.device | None = None,
    ) -> None:
        self._readers = readers
        self._pin = pin
        self._shared = shared
        self._pins: dict[Block | None, list[PinnedMemory]] = defaultdict(list)
        """What keeps the memory of each kept block pinned, and under None that of the others."""
        self._pack_on = pack_on
        self._packed: set[Block] = set()
        self._reading = threading.Semaphore(NUM_PACKED)
        self._packing = threading.Lock()
        self._raw: list[tuple[Tensor, list[PinnedMemory]]] = []
        """Memory that blocks are read into before they are packed."""
        self._largest = 0
        self._spare: int | None = None
        """Bytes that kept blocks may take beyond what was expected of them; None for no limit."""
        self._kept: dict[Block, Tensor | Packed] = {}
        self._staging: list[_Staging] = []
        self._free: SimpleQueue[_Staging] = SimpleQueue()
        self._copiers: ThreadPoolExecutor | None = None
        self._last_copy: Future[None] | None = None

    @property
    def kept_bytes(self) -> int:
        """Bytes of host memory in blocks and staging buffers."""
        staging = (one.flat for one in self._staging)
        return sum(one.nbytes for one in (*self._kept.values(), *staging))

    def keep(
        self,
        blocks: Sequence[Block],
        room_bytes: int | None,
        lane: Lane,
        packed: Collection[Block] = (),
    ) -> None:
        """Reads as many blocks into host memory as there is room for, in order.

        Where blocks are shared, those are kept that the first process had room for.

        Args:
            blocks: All blocks that may be needed more than once.
            room_bytes: Most bytes taken, staging buffers included; None for no limit.
            lane: The device's; staging buffers need its marks.
            packed: Those that are packed if their numbers are bfloat16.

        Raises:
            CheckpointError: A file cannot be read.
            DeviceError: The device unpacks other numbers than were packed.
            OutOfMemoryError: The host has less memory than that.
        """
        if self._pack_on is not None and self._shared is None:
            self._packed = {block for block in packed if _is_bfloat16(block)}
        self._largest = largest = max((block.layout.num_bytes for block in blocks), default=0)
        kept = self._that_fit(blocks, room_bytes)
        with ThreadPoolExecutor(NUM_KEEPERS) as keepers:
            if self._shared is None:
                read = zip(kept, keepers.map(self._read, kept), strict=True)
                self._kept = {block: one for block, one in read if one is not None}
            else:
                self._kept = {**self._share(self._shared, kept, blocks, keepers)}
        self._check_packed(lane)
        self._raw.clear()
        if len(self._kept) < len(blocks):
            if room_bytes is not None:
                self._make_room(room_bytes - NUM_STAGING * largest)
            for _ in range(NUM_STAGING):
                staging = _Staging(self._pinned(new_buffer(largest, CPU)), lane.new_mark())
                self._staging.append(staging)
                self._free.put(staging)
            self._copiers = ThreadPoolExecutor(NUM_STAGING, thread_name_prefix="sensebatch-copier")

    def _that_fit(self, blocks: Sequence[Block], room_bytes: int | None) -> list[Block]:
        """Returns the blocks to be kept, and notes what they may take beyond what is expected."""
        if room_bytes is None:
            return [*blocks]
        left = room_bytes - sum(map(self._kept_size, blocks))
        kept = [*blocks]
        if left < 0:
            left, kept = room_bytes - NUM_STAGING * self._largest, []
            for block in blocks:
                size = self._kept_size(block)
                if size <= left:
                    kept.append(block)
                    left -= size
        self._spare = left
        return kept

    def close(self, lane: Lane) -> None:
        """Waits for the last copies, then frees what only copies need."""
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
        """Copies a block to the device once `after` is reached, and sets `done` after the copy.

        Returns:
            None if the copy has been issued. Otherwise a future to wait for before waiting for
            `done`; it carries the error of a failed read.
        """
        kept = self._kept.get(block)
        if isinstance(kept, Packed):
            lane.unpack(target, kept, after, done)
            return None
        if kept is not None:
            lane.copy(target, kept, after, done)
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
        # There is one for each thread that gets here.
        staging = self._free.get()
        try:
            lane.finish(staging.copied)
            part = staging.flat[: block.layout.num_bytes]
            self._fill(block, part)
            if previous is not None:
                # Copies are issued in the order they were requested, whichever was read first.
                # Raises if that copy was cancelled, which `wait` would not notice.
                previous.exception()
            lane.copy(target, part, after, staging.copied)
            lane.copy(target[:0], part[:0], staging.copied, done)
        finally:
            self._free.put(staging)

    def _make_room(self, room_bytes: int) -> None:
        """Gives up kept blocks, the last ones first, until they take no more than that."""
        for block in reversed([*self._kept]):
            if self.kept_bytes <= room_bytes:
                return
            del self._kept[block]
            self._pins.pop(block, None)

    def _read(self, block: Block) -> Tensor | Packed | None:
        """Returns a block to be kept; None if it does not pack into the room that is left."""
        size = block.layout.num_bytes
        if self._pack_on is None or block not in self._packed:
            buffer = new_buffer(size, CPU)
            self._fill(block, buffer)
            return self._pinned(buffer, block)
        with self._reading:
            return self._read_packed(block, self._pack_on)

    def _read_packed(self, block: Block, device: torch.device) -> Tensor | Packed | None:
        # Memory that was touched and pinned before is filled, and copied from, much faster.
        size = block.layout.num_bytes
        try:
            raw, pins = self._raw.pop()
        except IndexError:
            raw, pins = self._new_pinned(self._largest)
        self._fill(block, raw[:size])
        of_packed: list[PinnedMemory] = []

        def new(num_bytes: int) -> Tensor:
            buffer, of_buffer = self._new_pinned(num_bytes)
            of_packed.extend(of_buffer)
            return buffer

        with self._packing:
            packed = pack(raw[:size], device, new)
            fits = self._fits(block, size if packed is None else packed.nbytes)
        kept: Tensor | Packed | None = packed if fits else None
        if packed is None:
            of_packed.clear()
            if fits:
                # Not what it was read into, which is as large as the largest block.
                kept = new(size).copy_(raw[:size])
        self._raw.append((raw, pins))
        if kept is not None:
            self._pins[block] = of_packed
        return kept

    def _fits(self, block: Block, num_bytes: int) -> bool:
        """Returns whether there is room for a block that takes so many bytes."""
        if self._spare is None:
            return True
        expected = self._kept_size(block)
        fits = num_bytes - expected <= self._spare
        self._spare += expected - (num_bytes if fits else 0)
        return fits

    def _check_packed(self, lane: Lane) -> None:
        """Unpacks one block as a run does, and raises if it is not what was read.

        A kernel that a device or a compiler gets wrong would write wrong texts, without an error.
        """
        block = next((one for one, kept in self._kept.items() if isinstance(kept, Packed)), None)
        if block is None:
            return
        kept = self._kept[block]
        assert isinstance(kept, Packed)
        size = block.layout.num_bytes
        expected = self._raw[-1][0][:size]
        self._fill(block, expected)
        found = new_buffer(size, self._pack_on or CPU)
        begin, done = lane.new_mark(), lane.new_mark()
        lane.computed(begin)
        lane.unpack(found, kept, begin, done)
        lane.finish(done)
        # Between its tensors, a block holds whatever was there before.
        unpacked = block.layout.views(found)
        for name, view in block.layout.views(expected).items():
            if not torch.equal(unpacked[name].cpu().view(torch.int16), view.view(torch.int16)):
                raise DeviceError(
                    f"{self._pack_on} unpacks other weights than were packed; "
                    "--no-compile keeps them as they are"
                )

    def _new_pinned(self, num_bytes: int) -> tuple[Tensor, list[PinnedMemory]]:
        """Returns host memory, and what keeps it pinned."""
        buffer = new_buffer(num_bytes, CPU)
        return buffer, [PinnedMemory(buffer)] if self._pin else []

    def _kept_size(self, block: Block) -> int:
        """Returns about how many bytes a block takes if it is kept."""
        size = block.layout.num_bytes
        return int(size * PACKED_SHARE) if block in self._packed else size

    def _share(
        self,
        shared: SharedBuffers,
        kept: Sequence[Block],
        blocks: Sequence[Block],
        keepers: ThreadPoolExecutor,
    ) -> dict[Block, Tensor]:
        """Returns the shared blocks, pinned; they are `kept` if this process is the first."""

        pinned: set[str] = set()

        def fill(buffers: Mapping[str, Tensor]) -> None:
            def read(block: Block) -> None:
                self._fill(block, buffers[block.name])
                self._pinned(buffers[block.name])

            list(keepers.map(read, kept))
            pinned.update(buffers)

        sizes = {block.name: block.layout.num_bytes for block in kept}
        buffers = shared.get(BLOCKS, sizes, fill)
        list(keepers.map(self._pinned, (buffers[name] for name in buffers if name not in pinned)))
        return {block: buffers[block.name] for block in blocks if block.name in buffers}

    def _fill(self, block: Block, flat: Tensor) -> None:
        self._readers.run(partial(part, flat) for part in block.parts)

    def _pinned(self, buffer: Tensor, block: Block | None = None) -> Tensor:
        if self._pin:
            self._pins[block].append(PinnedMemory(buffer))
        return buffer


def _is_bfloat16(block: Block) -> bool:
    return all(entry.dtype == torch.bfloat16 for entry in block.layout.entries)


class PinnedMemory:
    """Host memory that is pinned for copies to a GPU as long as this object lives.

    It is pinned in place, because torch's pinned allocator rounds up to powers of two. It must be
    unpinned before it is freed, or whatever is allocated there next could not be copied.

    Args:
        buffer: What is pinned, and kept alive that long.

    Raises:
        OutOfMemoryError: The system does not allow so much memory to be pinned.
    """

    def __init__(self, buffer: Tensor) -> None:
        size = buffer.nbytes
        code = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)
        if int(code) != 0:
            # The runtime remembers the error and would report it at the next kernel's launch.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device="cuda")
            raise OutOfMemoryError(
                f"pinning {size} bytes of host memory failed with CUDA error {int(code)}; "
                "give the host a smaller budget (max_memory cpu=...)"
            )
        # When a process ends, the system unpins everything anyway, and faster.
        weakref.finalize(self, _unpin, buffer).atexit = False


def _unpin(buffer: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
