"""Runs copies beside the computation: on a GPU in a stream of their own, on a CPU at once."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

from sensebatch.engine.memory.packing import Packed, unpack
from sensebatch.plan import passes
from sensebatch.plan.passes import packed_chunk_bytes


class Lane(Protocol):
    """Copies from host to device, ordered with the computation.

    A mark is a point that the computation or a copy reaches. It is made once and set many times.
    """

    def new_mark(self) -> object:
        """Returns a mark that has been reached."""

    def computed(self, mark: object) -> None:
        """Sets a mark after everything that has been computed so far."""

    def copy(self, target: Tensor, source: Tensor, after: object, done: object) -> None:
        """Starts a copy for when `after` is reached, and sets `done` after it.

        It comes after all copies that were started before, and after what these unpack.
        """

    def unpack(self, target: Tensor, source: Packed, after: object, done: object) -> None:
        """Does what `copy` does, with a packed source."""

    def wait(self, mark: object) -> None:
        """Makes the computation wait until a mark is reached."""

    def finish(self, mark: object) -> None:
        """Blocks the caller until a mark is reached."""


class CpuLane:
    """Copies on a CPU, which is its own device: they are done when the call returns."""

    def new_mark(self) -> object:
        """See `Lane`."""
        return None

    def computed(self, mark: object) -> None:
        """See `Lane`."""

    def copy(self, target: Tensor, source: Tensor, after: object, done: object) -> None:  # noqa: ARG002
        """See `Lane`."""
        target.copy_(source)

    def unpack(self, target: Tensor, source: Packed, after: object, done: object) -> None:  # noqa: ARG002
        """See `Lane`."""
        unpack(source, target)

    def wait(self, mark: object) -> None:
        """See `Lane`."""

    def finish(self, mark: object) -> None:
        """See `Lane`."""


class CudaLane:
    """Copies from pinned memory in a stream of their own, and unpacks in another one.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream, self._unpacking = _streams(device)
        self._device = device
        self._unpacker: _Unpacker | None = None

    def new_mark(self) -> object:
        """See `Lane`. Whoever waits for it sleeps; a processor is not kept busy with asking."""
        return torch.cuda.Event(blocking=True)

    def computed(self, mark: object) -> None:
        """See `Lane`."""
        assert isinstance(mark, torch.cuda.Event)
        mark.record(torch.cuda.current_stream(self._device))

    def copy(self, target: Tensor, source: Tensor, after: object, done: object) -> None:
        """See `Lane`."""
        assert isinstance(after, torch.cuda.Event)
        assert isinstance(done, torch.cuda.Event)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            if self._unpacker is not None:
                # The target may be memory that a block was brought to, which nobody waits for now.
                self._stream.wait_event(self._unpacker.unpacked)
            target.copy_(source, non_blocking=True)
            done.record(self._stream)

    def unpack(self, target: Tensor, source: Packed, after: object, done: object) -> None:
        """See `Lane`."""
        assert isinstance(after, torch.cuda.Event)
        assert isinstance(done, torch.cuda.Event)
        if self._unpacker is None:
            self._unpacker = _Unpacker(self._device, self._stream, self._unpacking)
        self._unpacker.unpack(target, source, after, done)

    def wait(self, mark: object) -> None:
        """See `Lane`."""
        assert isinstance(mark, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(mark)

    def finish(self, mark: object) -> None:
        """See `Lane`."""
        assert isinstance(mark, torch.cuda.Event)
        mark.synchronize()


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Returns the streams of copies and of unpacking, the same ones for all lanes.

    Torch has 32 and hands them out in turn. In time, a lane would get the one that graphs are
    recorded in, and what another thread copies there meanwhile would be recorded and not copied.
    """
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class Leash:
    """Keeps the host at most so many layers ahead of the device.

    A driver takes about a thousand launches that are yet to be run. Further ones make the host wait
    in a loop, for most of every step of large images. Held back before that, it sleeps.

    Args:
        lane: The device's.
        length: How many layers.
    """

    def __init__(self, lane: Lane, length: int) -> None:
        self._lane = lane
        self._marks = [lane.new_mark() for _ in range(length)]
        self._next = 0

    def hold(self) -> None:
        """Waits until the device has begun the layer that was launched `length` layers ago."""
        mark = self._marks[self._next]
        self._next = (self._next + 1) % len(self._marks)
        self._lane.finish(mark)
        self._lane.computed(mark)


class _Slot:
    """Device memory that a packed chunk arrives in."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.flat = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.arrived = torch.cuda.Event()
        self.free = torch.cuda.Event()


class _Unpacker:
    """Unpacks one chunk while the next one arrives.

    Args:
        device: A CUDA device.
        copies: The stream of the copies.
        stream: Where it unpacks.
    """

    def __init__(
        self, device: torch.device, copies: torch.cuda.Stream, stream: torch.cuda.Stream
    ) -> None:
        # Needs Triton.
        from sensebatch.engine.memory import packing_kernels

        self._kernels = packing_kernels
        self._copies = copies
        self._stream = stream
        size = packed_chunk_bytes(passes.PACKING_CHUNK)
        self._slots = [_Slot(size, device), _Slot(size, device)]
        self._exceptions = _Slot(passes.MAX_EXCEPTION_BYTES, device)
        self.unpacked = torch.cuda.Event()
        """Mark: the last block is unpacked."""

    def unpack(
        self, target: Tensor, source: Packed, after: torch.cuda.Event, done: torch.cuda.Event
    ) -> None:
        """See `Lane`."""
        numbers = target.view(torch.int16)
        # Chunks may arrive while the target is still computed with.
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            for first, chunk in source.chunks():
                slot = self._slots[0]
                self._slots.reverse()
                flat = self._bring(slot, chunk)
                count = flat.numel() // 3 * 2
                self._kernels.unpack_chunk(flat, numbers[first : first + count], source.base)
                slot.free.record(self._stream)
            flat = self._bring(self._exceptions, source.exceptions)
            self._kernels.restore_exceptions(flat, numbers)
            self._exceptions.free.record(self._stream)
            self.unpacked.record(self._stream)
            done.record(self._stream)

    def _bring(self, slot: _Slot, source: Tensor) -> Tensor:
        """Returns device memory that holds a part of a block once the stream comes to it."""
        flat = slot.flat[: source.numel()]
        self._copies.wait_event(slot.free)
        with torch.cuda.stream(self._copies):
            flat.copy_(source, non_blocking=True)
            slot.arrived.record(self._copies)
        self._stream.wait_event(slot.arrived)
        return flat


def lane_for(device: torch.device) -> Lane:
    """Returns the lane of a device."""
    return CudaLane(device) if device.type == "cuda" else CpuLane()
