"""The product of int8 tokens and int8 weights, scaled and added to a residual by one kernel.

The sums are int32, so they are exact: tiles change how fast a product is and never what it is, and
a token's result does not depend on the tokens beside it.

Needs Triton, as `kernels` does. Shape suffixes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.engine.model.decode_kernels import SHARED_REST, shared_bytes
from sensebatch.engine.model.descriptors import TensorDescriptor
from sensebatch.engine.model.quantized import Quantised

GROUP = 8
"""Rows of tiles that are computed together, so that what they read is still in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How much one program computes, and how far it reads ahead."""

    tokens: int
    outputs: int
    inputs: int
    """Numbers of a row that are multiplied at a time."""
    stages: int
    warps: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory that its stages take."""
        return self.stages * (self.tokens + self.outputs) * self.inputs


TILES = (
    Tile(tokens=128, outputs=256, inputs=128, stages=4, warps=8),
    Tile(tokens=128, outputs=256, inputs=128, stages=3, warps=8),
    Tile(tokens=128, outputs=128, inputs=128, stages=2, warps=8),
)
"""The fastest first; the first that fits the GPU is taken."""
FEW_TOKENS = 512
"""Up to which there are too few large tiles to occupy a GPU."""
FEW_TILES = (
    Tile(tokens=64, outputs=128, inputs=128, stages=4, warps=4),
    Tile(tokens=64, outputs=64, inputs=128, stages=4, warps=4),
)
DESCRIBED_FROM = 90
"""The first GPUs that copy a tile with one instruction, from the description of a matrix."""
DESCRIBED_BYTES = 16
"""What the bytes of a row must be a multiple of for that."""


@triton.jit
def _described_sums(
    x,
    weight,
    first_token,
    first_row,
    width,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Returns a tile of sums of products of two described matrices."""
    total = tl.zeros((TOKENS, OUTPUTS), dtype=tl.int32)
    for start in range(0, width, INPUTS):
        left = x.load([first_token, start])
        right = weight.load([first_row, start])
        total = tl.dot(left, right.T, total, out_dtype=tl.int32)
    return total


@triton.jit
def _sums(
    x,
    weight,
    tokens,
    rows,
    width,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Returns the same of two matrices by their pointers."""
    columns = tl.arange(0, INPUTS)
    x += tokens.to(tl.int64)[:, None] * width + columns[None, :]
    weight += rows.to(tl.int64)[None, :] * width + columns[:, None]
    total = tl.zeros((TOKENS, OUTPUTS), dtype=tl.int32)
    for start in range(0, width, INPUTS):
        if WHOLE:
            left, right = tl.load(x + start), tl.load(weight + start)
        else:
            inside = start + columns < width
            left = tl.load(x + start, mask=inside[None, :], other=0)
            right = tl.load(weight + start, mask=inside[:, None], other=0)
        total = tl.dot(left, right, total, out_dtype=tl.int32)
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def _int8_product(
    x,
    weight,
    x_scales,
    weight_scales,
    residual,
    out,
    num_tokens,
    height,
    width,
    RESIDUAL: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    tiles_down = tl.cdiv(num_tokens, TOKENS)
    of_group = GROUP * tl.cdiv(height, OUTPUTS)
    first = tl.program_id(0) // of_group * GROUP
    down = min(tiles_down - first, GROUP)
    place = tl.program_id(0) % of_group
    first_token, first_row = (first + place % down) * TOKENS, place // down * OUTPUTS
    tokens = first_token + tl.arange(0, TOKENS)
    rows = first_row + tl.arange(0, OUTPUTS)
    # What lies past the ends is computed with zeros or with others' numbers, and not stored.
    if DESCRIBED:
        sums = _described_sums(x, weight, first_token, first_row, width, TOKENS, OUTPUTS, INPUTS)
    else:
        near, real = tokens % num_tokens, rows % height
        sums = _sums(x, weight, near, real, width, TOKENS, OUTPUTS, INPUTS, WHOLE)
    there = tokens < num_tokens
    exists = rows < height
    result = sums.to(tl.float32) * tl.load(x_scales + tokens, mask=there, other=0.0)[:, None]
    result *= tl.load(weight_scales + rows, mask=exists, other=0.0)[None, :]
    target = tokens.to(tl.int64)[:, None] * height + rows[None, :]
    stored = there[:, None] & exists[None, :]
    if RESIDUAL:
        result += tl.load(residual + target, mask=stored, other=0.0).to(tl.float32)
    tl.store(out + target, result.to(out.dtype.element_ty), mask=stored)


def choose_tile(num_tokens: int, shared: int | None) -> Tile:
    """Returns the tile of a product.

    Args:
        num_tokens: Its tokens.
        shared: Bytes that a program may have; None for any number.
    """
    tiles = FEW_TILES if num_tokens <= FEW_TOKENS else TILES
    fitting = (t for t in tiles if shared is None or t.shared_bytes <= shared - SHARED_REST)
    return next(fitting, tiles[-1])


def product(
    tokens: Quantised,
    weight_OI: Tensor,
    scale_O: Tensor,
    dtype: torch.dtype,
    residual_TO: Tensor | None = None,
    tile: Tile | None = None,
    described: bool | None = None,
) -> Tensor:
    """Returns a product; see `operations.Operations.scaled_product`.

    Args:
        tokens: Contiguous rows.
        weight_OI: Contiguous.
        scale_O: See there.
        dtype: See there.
        residual_TO: Contiguous rows.
        tile: None takes the one that was the fastest.
        described: Whether tiles are copied from the descriptions of matrices; None where that is
            faster.
    """
    x8_TI, scale_T1 = tokens
    num_tokens, width = x8_TI.shape
    height = weight_OI.shape[0]
    out_TO = residual_TO
    if out_TO is None:
        out_TO = torch.empty(num_tokens, height, dtype=dtype, device=x8_TI.device)
    tile = tile or choose_tile(num_tokens, shared_bytes(x8_TI.device))
    if described is None:
        described = num_tokens > FEW_TOKENS and _describes(x8_TI)
    flags: dict[str, int] = {"RESIDUAL": residual_TO is not None, "DESCRIBED": described}
    flags |= {"WHOLE": width % tile.inputs == 0, "enable_fp_fusion": True}
    _int8_product[(triton.cdiv(num_tokens, tile.tokens) * triton.cdiv(height, tile.outputs),)](
        _described(x8_TI, tile.tokens, tile) if described else x8_TI,
        _described(weight_OI, tile.outputs, tile) if described else weight_OI,
        scale_T1,
        scale_O,
        out_TO,
        out_TO,
        num_tokens,
        height,
        width,
        TOKENS=tile.tokens,
        OUTPUTS=tile.outputs,
        INPUTS=tile.inputs,
        GROUP=GROUP,
        **flags,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out_TO


def _described(matrix: Tensor, rows: int, tile: Tile) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, tile.inputs])


def _describes(x8_TI: Tensor) -> bool:
    """Returns whether a GPU copies tiles of rows from their description."""
    if TensorDescriptor is None or x8_TI.device.type == "cpu":
        return False
    if x8_TI.shape[1] % DESCRIBED_BYTES:
        return False
    return bool(triton.runtime.driver.active.get_current_target().arch >= DESCRIBED_FROM)


def warm_up(arch: Architecture, dtype: torch.dtype, device: torch.device) -> None:
    """Compiles every kernel for a network; see `kernels.warm_up`."""
    hidden, inner, dim = arch.hidden_size, arch.intermediate_size, arch.head_dim
    queries = arch.num_heads * dim
    for num_tokens in (1, FEW_TOKENS + 1):
        for outputs, inputs, adds in (
            (queries + 2 * arch.num_kv_heads * dim, hidden, False),
            (hidden, queries, True),
            (2 * inner, hidden, False),
            (hidden, inner, True),
        ):
            x8_TI = torch.zeros(num_tokens, inputs, dtype=torch.int8, device=device)
            scale_T1 = torch.zeros(num_tokens, 1, device=device)
            weight_OI = torch.zeros(outputs, inputs, dtype=torch.int8, device=device)
            scale_O = torch.zeros(outputs, device=device)
            residual_TO = torch.zeros(num_tokens, outputs, dtype=dtype, device=device)
            product((x8_TI, scale_T1), weight_OI, scale_O, dtype, residual_TO if adds else None)
