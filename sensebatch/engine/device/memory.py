"""What the device and the host have free, what a batch took, and what running out means."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from sensebatch.config import MemoryConfig
from sensebatch.errors import DeviceError, OutOfMemoryError
from sensebatch.plan.computation import Computation
from sensebatch.plan.device import place
from sensebatch.plan.load import Load
from sensebatch.plan.placement import Placements
from sensebatch.process import free_memory_bytes

_OUT_OF_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""What is said where torch's own error type is not used: by its allocator for the host, on Windows
and elsewhere, by the driver, to torch or to Triton while it loads a kernel, and by cuBLAS."""


class DevicePeak:
    """Peak device memory since its making; zeros on a CPU.

    Args:
        device: Whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> tuple[int, int]:
        """Returns peak allocated and reserved bytes."""
        if self._device.type != "cuda":
            return 0, 0
        return (
            torch.cuda.max_memory_allocated(self._device),
            torch.cuda.max_memory_reserved(self._device),
        )


def empty_cache(device: torch.device) -> None:
    """Gives back what torch holds of the device without use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Returns whether torch says that the device or the host has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in _OUT_OF_MEMORY
    )


def check_device(device: torch.device, error: RuntimeError) -> None:
    """Makes sure after an error that the device still computes.

    Some errors of a kernel leave a process nothing but errors; others, such as a launch that was
    refused, concern the batch alone. A small computation shows which it was.

    Raises:
        DeviceError: It does not; names the error that came before.
    """
    try:
        works = torch.ones(2, device=device).sum().item() == 2
    except RuntimeError as failure:
        # A device that is full, by the batch's tensors that the error keeps alive, is not broken.
        works = is_out_of_memory(failure)
    if not works:
        raise DeviceError(
            f"{device} failed and this process can no longer use it; what is done is kept, the "
            f"same command resumes the run: {str(error).splitlines()[0]}"
        ) from error


@contextmanager
def translated_out_of_memory(what: str) -> Iterator[None]:
    """Turns torch's out-of-memory error of a block into ours.

    Raises:
        OutOfMemoryError: Begins with `what`.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"{what}: {str(error).splitlines()[0]}") from None


def cap_device_memory(device: torch.device, budget_bytes: int | None) -> None:
    """Makes a budget a cap: torch reserves no more than that, it runs out of memory first.

    Before it does, its allocator gives back what it holds without use, so the cap costs nothing
    as long as the budget is enough. None takes away the cap of an earlier run of the process.
    """
    if device.type == "cuda":
        # Unlike the rest of torch, this call does not know a device without its number.
        index = torch.cuda.current_device() if device.index is None else device.index
        total = torch.cuda.get_device_properties(index).total_memory
        share = 1.0 if budget_bytes is None else min(budget_bytes / total, 1.0)
        torch.cuda.set_per_process_memory_fraction(share, index)


def plan_placements(
    computation: Computation,
    *,
    memory: MemoryConfig,
    device: torch.device,
    loads: Sequence[Load],
    num_workers: int = 1,
    held_host_bytes: int = 0,
) -> Placements:
    """Returns where the weights go for each group, given what is free now; see `plan.device.place`.

    Args:
        computation: The network, and how it is computed.
        memory: Mode and budgets. That of the host is for what lies beside a device's own memory, so
            it does not count on a CPU.
        device: Where the network computes. What torch holds of its memory counts as free.
        loads: One for every group of the run.
        num_workers: Processes that share the host and its copy of the weights.
        held_host_bytes: Host memory of weights that are loaded already; counts as free.
    """
    device_free = None
    if device.type == "cuda":
        device_free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    else:
        memory = replace(memory, host_budget_bytes=None)
    return place(
        computation,
        memory=memory,
        loads=loads,
        device_free=device_free,
        host_free=free_memory_bytes() + held_host_bytes,
        num_workers=num_workers,
    )
