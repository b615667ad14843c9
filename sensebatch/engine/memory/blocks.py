"""A block: weights that are moved as one, because they lie in one flat buffer of bytes.

Knows modules and memory, neither what a module computes nor when.
"""

from __future__ import annotations

import contextlib
import copy
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sensebatch.errors import OutOfMemoryError

ALIGNMENT = 256
"""Every tensor of a block starts at a multiple of this many bytes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one parameter lies."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Its first byte."""

    def view(self, flat: Tensor) -> Tensor:
        """Returns the parameter as a view of a buffer."""
        num_bytes = math.prod(self.shape) * self.dtype.itemsize
        return flat[self.start : self.start + num_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each parameter of a module lies in its flat buffer; they may differ in dtype."""

    entries: tuple[Entry, ...]
    num_bytes: int

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Returns each parameter as a view of a buffer."""
        return {entry.name: entry.view(flat) for entry in self.entries}


def layout_of(module: nn.Module) -> Layout:
    """Returns the layout of a module's parameters in their own order and dtypes."""
    entries = []
    end = 0
    for name, parameter in module.named_parameters():
        entries.append(Entry(name, parameter.dtype, tuple(parameter.shape), end))
        end += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
    return Layout(tuple(entries), end)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Block:
    """Weights of one module, wherever they are at the moment."""

    name: str
    module: nn.Module
    """Its parameters are on the meta device; it is the pattern for what is computed with."""
    layout: Layout
    parts: tuple[Callable[[Tensor], None], ...]
    """Together they write the weights into a flat host buffer of the layout; each writes other
    bytes than the others, so that they may be called from several threads, in any order."""


def bind(pattern: nn.Module, layout: Layout, flat: Tensor) -> nn.Module:
    """Returns a copy of a module whose parameters are views of a flat buffer."""
    shell = copy.deepcopy(pattern)
    for name, view in layout.views(flat).items():
        owner, _, attribute = name.rpartition(".")
        parameter = nn.Parameter(view, requires_grad=False)
        setattr(shell.get_submodule(owner), attribute, parameter)
    return shell


def new_buffer(num_bytes: int, device: torch.device) -> Tensor:
    """Returns a flat uint8 buffer whose content is not to be relied on.

    Host memory is asked for in huge pages where the system has them: to touch it for the first
    time, and to pin it, then takes a fraction of the time.

    Raises:
        OutOfMemoryError: The host has no such room.
    """
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise OutOfMemoryError(
            f"the host gave no {num_bytes} bytes for weights: {error.strerror}"
        ) from error
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
