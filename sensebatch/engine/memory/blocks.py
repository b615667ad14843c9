"""Blocks: weights that are moved as one, because they lie in one flat buffer of bytes.

Knows modules and memory, but not what a module computes or when.
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
from sensebatch.units import GIB

ALIGNMENT = 256
"""Every tensor of a block starts at a multiple of this many bytes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one parameter lies."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Its first byte in the buffer."""

    def view(self, flat: Tensor) -> Tensor:
        """Returns the parameter as a view of a buffer."""
        num_bytes = math.prod(self.shape) * self.dtype.itemsize
        return flat[self.start : self.start + num_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each parameter of a module lies in its flat buffer. Dtypes may differ."""

    entries: tuple[Entry, ...]
    num_bytes: int

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Returns each parameter as a view of a buffer."""
        return {entry.name: entry.view(flat) for entry in self.entries}


def layout_of(module: nn.Module) -> Layout:
    """Returns the layout of a module's parameters, in their own order and dtypes."""
    entries = []
    end = 0
    for name, parameter in module.named_parameters():
        entries.append(Entry(name, parameter.dtype, tuple(parameter.shape), end))
        end += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
    return Layout(tuple(entries), end)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Block:
    """The weights of one module, wherever they are at the moment."""

    name: str
    module: nn.Module
    """A module with its parameters on the meta device; copies of it compute on buffers."""
    layout: Layout
    parts: tuple[Callable[[Tensor], None], ...]
    """Write the weights into a flat host buffer of the layout. Each writes bytes of its own, so
    they may be called in any order and from several threads."""


def bind(pattern: nn.Module, layout: Layout, flat: Tensor) -> nn.Module:
    """Returns a copy of a module whose parameters are views of a flat buffer."""
    shell = copy.deepcopy(pattern)
    for name, view in layout.views(flat).items():
        owner, _, attribute = name.rpartition(".")
        parameter = nn.Parameter(view, requires_grad=False)
        setattr(shell.get_submodule(owner), attribute, parameter)
    return shell


def new_buffer(num_bytes: int, device: torch.device) -> Tensor:
    """Returns a flat uint8 buffer with undefined content.

    Host memory comes in huge pages where the system has them, because touching it for the first
    time and pinning it then take a fraction of the time.

    Raises:
        OutOfMemoryError: The host does not have so much memory.
    """
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise OutOfMemoryError(
            f"the host has no {num_bytes / GIB:.2f} GiB for weights: {error.strerror}"
        ) from error
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
