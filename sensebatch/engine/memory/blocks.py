"""A block: weights that are moved as one, because they lie in one flat buffer.

Knows modules and memory, neither what a module computes nor when.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGNMENT = 128
"""Every tensor of a block starts at a multiple of this many elements."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each parameter of a module lies in its flat buffer."""

    entries: tuple[tuple[str, tuple[int, ...], int], ...]
    """(parameter, shape, first element)"""
    num_elements: int

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Returns each parameter as a view of a buffer."""
        return {
            name: flat[start : start + math.prod(shape)].view(shape)
            for name, shape, start in self.entries
        }


def layout_of(module: nn.Module) -> Layout:
    """Returns the layout of a module's parameters in their own order."""
    entries = []
    end = 0
    for name, parameter in module.named_parameters():
        entries.append((name, tuple(parameter.shape), end))
        end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
    return Layout(tuple(entries), end)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Block:
    """Weights of one module, wherever they are at the moment."""

    name: str
    module: nn.Module
    """Its parameters are on the meta device; it is the pattern for what is computed with."""
    layout: Layout
    fill: Callable[[Tensor], None]
    """Writes the weights into a flat host buffer of the layout; may be called from a thread."""


def bind(pattern: nn.Module, layout: Layout, flat: Tensor) -> nn.Module:
    """Returns a copy of a module whose parameters are views of a flat buffer."""
    shell = copy.deepcopy(pattern)
    for name, view in layout.views(flat).items():
        owner, _, attribute = name.rpartition(".")
        parameter = nn.Parameter(view, requires_grad=False)
        setattr(shell.get_submodule(owner), attribute, parameter)
    return shell


def new_buffer(num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns an uninitialised flat buffer."""
    return torch.empty(num_elements, dtype=dtype, device=device)
