"""One token a sequence through a layer: kernels that read every weight once and little else.

A decoding step is bound by reading weights, and its launches are so short that each counts. So
the activation after a matrix product and the sum with the residual are part of the product's
kernel. The norm before it is not: repeated in every program, it would cost more than a launch. All
sums are in float32, and so are products of float32. The tiles were the fastest on an H200 for the
matrices of the 8B model.

Needs Triton, as `kernels` does.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.engine.model import attention_kernels, kernels
from sensebatch.engine.model.quantized import Numbers

MAX_SEQUENCES = 64
"""Most sequences that share a step."""
LEAST_ROWS = 16
"""Rows of the smallest tile that can be multiplied."""
WIDE_ROWS = 4096
"""Rows of a weight matrix up to which its tiles are wide, so that there are enough of them."""
SHARED_REST = 1024
"""Bytes of shared memory that are kept for what is not a tile of a product."""


@triton.jit
def _vector_product(
    x,
    weight,
    scale,
    residual,
    out,
    width,
    height,
    SCALED: tl.constexpr,
    SWIGLU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    places = weight + rows[:, None].to(tl.int64) * width + columns[None, :]
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    up_total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        values = tl.load(x + start + columns).to(tl.float32)
        total += tl.load(places + start).to(tl.float32) * values[None, :]
        if SWIGLU:
            up = tl.load(places + start + height.to(tl.int64) * width)
            up_total += up.to(tl.float32) * values[None, :]
    result = tl.sum(total, 1)
    up_result = tl.sum(up_total, 1)
    if SCALED:
        result *= tl.load(scale + rows)
        if SWIGLU:
            up_result *= tl.load(scale + height + rows)
    if SWIGLU:
        result = result / (1 + tl.exp(-result)) * up_result
    if RESIDUAL:
        result += tl.load(residual + rows).to(tl.float32)
    tl.store(out + rows, result.to(out.dtype.element_ty))


@triton.jit
def _matrix_product(
    x,
    weight,
    scale,
    residual,
    out,
    num_sequences,
    width,
    height,
    SCALED: tl.constexpr,
    SWIGLU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SEQUENCES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sequences = tl.arange(0, SEQUENCES)
    columns = tl.arange(0, BLOCK)
    there = (sequences < num_sequences)[None, :]
    places = weight + rows[:, None].to(tl.int64) * width + columns[None, :]
    total = tl.zeros((ROWS, SEQUENCES), dtype=tl.float32)
    up_total = tl.zeros((ROWS, SEQUENCES), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        source = x + sequences[None, :] * width + start + columns[:, None]
        values = tl.load(source, mask=there, other=0.0)
        # A number of 8 bits is the same in any dtype of activations.
        weights = tl.load(places + start).to(values.dtype)
        total = tl.dot(weights, values, total, input_precision="ieee")
        if SWIGLU:
            up = tl.load(places + start + height.to(tl.int64) * width).to(values.dtype)
            up_total = tl.dot(up, values, up_total, input_precision="ieee")
    if SCALED:
        total *= tl.load(scale + rows)[:, None]
        if SWIGLU:
            up_total *= tl.load(scale + height + rows)[:, None]
    if SWIGLU:
        total = total / (1 + tl.exp(-total)) * up_total
    target = sequences[None, :] * height + rows[:, None]
    if RESIDUAL:
        total += tl.load(residual + target, mask=there, other=0.0).to(tl.float32)
    tl.store(out + target, total.to(out.dtype.element_ty), mask=there)


def divisor(number: int, most: int) -> int:
    """Returns the largest power of two up to `most` that divides a number."""
    return min(number & -number, most)


@functools.cache
def shared_bytes(device: torch.device) -> int | None:
    """Returns the shared memory that a program may have; None where it is interpreted."""
    if device.type != "cuda":
        return None
    # As Triton asks before it launches a kernel.
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(properties["max_shared_mem"])


def tile(
    height: int, sequences: int, *, swiglu: bool, item_bytes: int, shared_bytes: int | None
) -> tuple[int, int, int]:
    """Returns rows, columns and stages of a product's tiles of weights.

    Args:
        height: Rows of the product.
        sequences: Sequences of a tile.
        swiglu: See `product`.
        item_bytes: Bytes of a number.
        shared_bytes: Tiles are narrower than is best where all stages would take more.
    """
    if swiglu:
        rows, block, stages = 64, 128, 3
    else:
        rows, block, stages = (32, 256, 4) if height <= WIDE_ROWS else (32, 128, 6)
    column_bytes = stages * (rows * (2 if swiglu else 1) + sequences) * item_bytes
    while shared_bytes is not None and column_bytes * block > shared_bytes - SHARED_REST:
        block //= 2
    return rows, block, stages


def product(
    x_SD: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    swiglu: bool = False,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Returns `[S, rows]`, the product of a few rows with a weight matrix.

    Args:
        x_SD: Contiguous, at most `MAX_SEQUENCES` rows.
        weight: Contiguous `[rows, D]`; with `swiglu` `[2 * rows, D]`, gates first.
        scale: Float32 of each of its rows, if they are 8-bit numbers.
        swiglu: Whether the result is `silu(gate) * up`.
        residual: Contiguous `[S, rows]` that is added.
        out: Contiguous `[S, rows]` that is returned, perhaps the residual; None for new memory.
    """
    num_sequences, width = x_SD.shape
    height = weight.shape[0] // (2 if swiglu else 1)
    out = x_SD.new_empty(num_sequences, height) if out is None else out
    pointers = (
        x_SD,
        weight,
        x_SD if scale is None else scale,
        x_SD if residual is None else residual,
        out,
    )
    flags: dict[str, int] = {"SWIGLU": swiglu, "RESIDUAL": residual is not None}
    flags |= {"SCALED": scale is not None, "num_warps": 4, "enable_fp_fusion": True}
    if num_sequences == 1:
        wide = 1024 if swiglu and scale is not None else 2048
        rows, block = divisor(height, 2 if swiglu else 4), divisor(width, wide)
        _vector_product[(height // rows,)](
            *pointers, width, height, **flags, ROWS=rows, BLOCK=block
        )
        return out
    sequences = max(triton.next_power_of_2(num_sequences), LEAST_ROWS)
    shared = shared_bytes(x_SD.device)
    rows, block, stages = tile(
        height, sequences, swiglu=swiglu, item_bytes=x_SD.itemsize, shared_bytes=shared
    )
    rows = divisor(height, rows)
    _matrix_product[(height // rows,)](
        *pointers,
        num_sequences,
        width,
        height,
        **flags,
        SEQUENCES=sequences,
        ROWS=rows,
        BLOCK=divisor(width, block),
        num_stages=stages,
    )
    return out


def warm_up(
    arch: Architecture,
    dtype: torch.dtype,
    device: torch.device,
    num_sequences: int,
    numbers: Numbers | None = None,
) -> None:
    """Compiles every kernel for so many sequences; see `kernels.warm_up`."""
    hidden, inner, dim = arch.hidden_size, arch.intermediate_size, arch.head_dim
    heads, kv_heads = arch.num_heads, arch.num_kv_heads

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def weights(rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
        if numbers is None:
            return zeros(rows, columns), None
        scale = torch.zeros(rows, device=device)
        return torch.zeros(rows, columns, device=device).to(numbers.dtype), scale

    x_SD = zeros(num_sequences, hidden)
    product(x_SD, *weights((heads + 2 * kv_heads) * dim, hidden))
    product(zeros(num_sequences, heads * dim), *weights(hidden, heads * dim), residual=x_SD)
    moe = arch.understanding_moe
    if moe is None or not all(moe.sparse_layers):
        hidden_SI = product(x_SD, *weights(2 * inner, hidden), swiglu=True)
        product(hidden_SI, *weights(hidden, inner), residual=x_SD)
    cache = zeros(2, num_sequences, 1, kv_heads, dim)
    rows_S = torch.zeros(num_sequences, dtype=torch.int64, device=device)
    norm, table = zeros(2, dim // 2), zeros(1, 1, dim)
    q_SHE = kernels.norm_rotate(
        zeros(num_sequences, (heads + 2 * kv_heads) * dim),
        norm,
        norm,
        (table, table),
        eps=arch.rms_norm_eps,
        k_TKE=cache[0],
        v_TKE=cache[1],
        rotary_rows_T=rows_S,
        places_T=rows_S,
    )
    attention_kernels.attend_token(q_SHE, cache[0], cache[1], rows_S)
