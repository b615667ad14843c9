"""Records what is computed with a lent module, so that the host launches it as one.

A layer of text is nine launches, and for each of them the host takes longer than the device. A CUDA
graph is one launch, of the same kernels with the same arguments: so whatever a recording reads and
writes has to stay where it is for as long as it is replayed.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn

Compute = Callable[[], None]


class Recorder(Protocol):
    """Records computations that are replayed one after the other, never side by side."""

    def record(self, compute: Compute) -> Compute:
        """Returns what computes again what a function would, which has been computed before.

        Nothing is computed yet. Memory that the function takes and leaves belongs to the recorder.
        """


class CudaRecorder:
    """Records CUDA graphs, all with the same memory for what lies between their kernels.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _recording_stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        # Torch gives up memory that no graph uses, and then takes its handle no more.
        self._last: torch.cuda.CUDAGraph | None = None

    def record(self, compute: Compute) -> Compute:
        """See `Recorder`."""
        if self._last is None:
            # While it records, torch fails sooner than it gives up what it caches.
            torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`, which waits for the device each time.
        with uncollected(), torch.cuda.stream(self._stream):
            # Other threads may use the device meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                compute()
            except BaseException:
                # Says what is wrong, which the end of a recording that is broken off does not.
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        self._last = graph
        return graph.replay


@contextmanager
def uncollected() -> Iterator[None]:
    """Holds back the garbage collector while a graph is recorded.

    It may come upon graphs, kernels or pinned memory, and what frees these breaks the recording
    off. Source: pytorch/pytorch pull request 161037.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns one stream for good: cuBLAS keeps memory for every stream that it was used in."""
    return torch.cuda.Stream(device)


def new_recorder(device: torch.device) -> Recorder | None:
    """Returns what records on a device, or None if nothing does."""
    return CudaRecorder(device) if device.type == "cuda" else None


class Recordings:
    """What is computed with each lent module, recorded when it is first asked for.

    They hold no module and are gone with it. A module stays for as long as its memory is lent, so
    none is replayed on memory that has been given back, nor keeps it from being given back.

    Args:
        recorder: Records them.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._found: WeakKeyDictionary[nn.Module, dict[int, Compute]] = WeakKeyDictionary()

    def clear(self) -> None:
        """Forgets all, because something else that they use is about to move."""
        self._found.clear()

    def run(self, module: nn.Module, index: int, compute: Compute) -> None:
        """Computes what a function does with a module.

        Args:
            module: Has its weights on the device.
            index: Which of the computations with this module it is: one that is lent for several
                layers is computed with in a different way for each.
            compute: Does the same each time.
        """
        of_module = self._found.setdefault(module, {})
        if index not in of_module:
            of_module[index] = self._recorder.record(compute)
        of_module[index]()
