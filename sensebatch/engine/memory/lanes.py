"""Runs copies beside the computation: on a GPU in a stream of their own, on a CPU at once."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Lane(Protocol):
    """Copies from host to device, ordered with the computation.

    A mark is a point that the computation or a copy reaches. It is made once and set many times.
    """

    def new_mark(self) -> object:
        """Returns a mark that has been reached."""

    def computed(self, mark: object) -> None:
        """Sets a mark after everything that has been computed so far."""

    def copy(self, target: Tensor, source: Tensor, after: object, done: object) -> None:
        """Starts a copy for when `after` is reached, and sets `done` after it."""

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

    def wait(self, mark: object) -> None:
        """See `Lane`."""

    def finish(self, mark: object) -> None:
        """See `Lane`."""


class CudaLane:
    """Copies from pinned memory in a stream of their own.

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
