"""Rotary position embeddings of text and image tokens, and of image patches.

Knows positions and angles only. Shape suffixes: T tokens, A the axes t, h, w, E head_dim,
P patches, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, in the shape of the tensor that they rotate."""


def _angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """Returns the angles of `dim` rotated channels, float32 `[len(positions), dim / 2]`."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    return positions.float()[:, None] * (1.0 / theta**exponents)[None, :]


def token_rotary(
    positions_AT: Tensor, *, head_dim: int, theta: float, theta_hw: float, dtype: torch.dtype
) -> Rotary:
    """Returns cosines and sines `[tokens, 1, head_dim]` for tokens at (t, h, w).

    The first half of a head follows t, the last two quarters follow h and w. Each part is rotated
    on its own (rotate-half), so the table repeats each part's angles.

    Args:
        positions_AT: int64 `[3, tokens]`, rows t, h, w.
        head_dim: Channels of a head, a multiple of 8.
        theta: Base of the t angles.
        theta_hw: Base of the h and w angles.
        dtype: Dtype of the activations; angles are float32.

    Source: SenseNova-U1 technical report (arXiv 2605.12500), decoupled 3-D RoPE.
    """
    t, h, w = positions_AT.unbind(0)
    parts = (
        _angles(t, head_dim // 2, theta),
        _angles(h, head_dim // 4, theta_hw),
        _angles(w, head_dim // 4, theta_hw),
    )
    angles_TE = torch.cat([part for angles in parts for part in (angles, angles)], dim=-1)
    return angles_TE.cos().to(dtype)[:, None, :], angles_TE.sin().to(dtype)[:, None, :]


def rotate_token_heads(x_THE: Tensor, rotary: Rotary) -> Tensor:
    """Rotates queries or keys `[tokens, heads, head_dim]` with a table of `token_rotary`."""
    cos, sin = rotary
    head_dim = x_THE.shape[-1]
    t1, t2, h1, h2, w1, w2 = x_THE.split(
        [head_dim // 4, head_dim // 4, *([head_dim // 8] * 4)], dim=-1
    )
    turned_THE = torch.cat((-t2, t1, -h2, h1, -w2, w1), dim=-1)
    return x_THE * cos + turned_THE * sin


def patch_rotary(
    grid: tuple[int, int], *, channels: int, theta: float, device: torch.device
) -> Rotary:
    """Returns float32 cosines and sines `[patches, channels / 2]` for the patches of an image.

    The first half of the channels is rotated by the column, the second half by the row, both in
    adjacent pairs.

    Args:
        grid: (rows, columns) of the image; patches are row-major.
        channels: Channels of a patch embedding, a multiple of 4.
        theta: Base of the angles.
        device: Device of the table.
    """
    rows, columns = grid
    by_row = _angles(torch.arange(rows, device=device), channels // 2, theta)
    by_column = _angles(torch.arange(columns, device=device), channels // 2, theta)
    column_part = by_column[None, :, :].expand(rows, -1, -1)
    row_part = by_row[:, None, :].expand(-1, columns, -1)
    angles = torch.cat((column_part, row_part), dim=-1).flatten(0, 1)
    return angles.cos(), angles.sin()


def rotate_patches(x_PC: Tensor, rotary: Rotary) -> Tensor:
    """Rotates patch embeddings `[patches, channels]` in float32 and returns them in their dtype.

    The table of one image serves any number of images of its size.
    """
    cos, sin = rotary
    even, odd = x_PC.float().unflatten(-1, (-1, 2)).unflatten(0, (-1, cos.shape[0])).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).flatten(0, 1).to(x_PC.dtype)
