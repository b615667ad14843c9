"""How a copy runs beside the computation: a stream with events on a GPU, in place on a CPU."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Lane(Protocol):
    """Copies from host to device, and the order between them and the computation.

    A mark is a point that a computation or a copy has reached; made once, set again and again.
    """

    def new_mark(self) -> object:
        """Returns a mark that counts as reached."""

    def computed(self, mark: object) -> None:
        """Sets a mark behind what has been computed so far."""

    def copy(self, target: Tensor, source: Tensor, after: object, done: object) -> None:
        """Copies once `after` is reached, and sets `done` behind it; returns before it is done."""

    def wait(self, mark: object) -> None:
        """Makes the computation wait for a mark."""

    def finish(self, mark: object) -> None:
        """Waits here until a mark is reached."""


class CpuLane:
    """The CPU as its own device: a copy is done when the call returns."""

    def new_mark(self) -> object:
        """See `Lane`."""
        return None

    def computed(self, mark: object) -> None:
        """See `Lane`."""

    def copy(self, target: Tensor, source: Tensor, after: object, done: object) -> None:  # noqa: ARG002
        """See `Lane`."""
        target.copy_(source)

    def wait(self, mark: object) -> None:
        """See `Lane`."""

    def finish(self, mark: object) -> None:
        """See `Lane`."""


class CudaLane:
    """A stream of its own for copies from pinned memory.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._device = device

    def new_mark(self) -> object:
        """See `Lane`."""
        return torch.cuda.Event()

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
            target.copy_(source, non_blocking=True)
            done.record(self._stream)

    def wait(self, mark: object) -> None:
        """See `Lane`."""
        assert isinstance(mark, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(mark)

    def finish(self, mark: object) -> None:
        """See `Lane`."""
        assert isinstance(mark, torch.cuda.Event)
        mark.synchronize()


def lane_for(device: torch.device) -> Lane:
    """Returns the lane of a device."""
    return CudaLane(device) if device.type == "cuda" else CpuLane()
