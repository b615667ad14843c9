"""Memory in disorder, on purpose: a check that a result does not depend on where tensors lie."""

from __future__ import annotations

import random

import torch
from torch import Tensor

PIECES = 200
LARGEST_PIECE = 64 << 20
SHARE = 0.02
"""Largest share of the free memory that stays held; the run reuses what is freed."""
CPU_BYTES = 256 << 20
"""What counts as free where the host is the device."""


def fragment(seed: int, device: torch.device | None = None) -> list[Tensor]:
    """Allocates pieces of random sizes full of garbage and frees most of them, here and there.

    Args:
        seed: Decides sizes and order; 0 does nothing.
        device: None takes the GPU if there is one.

    Returns:
        What stays allocated for as long as it is held.
    """
    if seed == 0:
        return []
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else CPU_BYTES
    numbers = random.Random(seed)
    limit = int(free * SHARE)
    pieces = [_piece(numbers, device, limit) for _ in range(PIECES)]
    numbers.shuffle(pieces)
    held: list[Tensor] = []
    for piece in pieces:
        if numbers.random() < 0.5 and sum(map(_size, held)) + _size(piece) <= limit:
            held.append(piece)
    return held


def _piece(numbers: random.Random, device: torch.device, limit: int) -> Tensor:
    largest = min(LARGEST_PIECE, max(limit // 8, 1024))
    count = round(largest ** numbers.uniform(0.4, 1) / 4)
    garbage = numbers.choice((float("nan"), float("inf"), -1e30, 0.0))
    return torch.full((max(count, 1),), garbage, device=device)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
