"""Triton kernels for what a layer computes between its matrix products.

There are ten or more elementwise operations between two products. One kernel for each chain of
them reads and writes every number once, computes in float32 and rounds once at the end. Every
launch allows a product and its sum to be one operation: Triton's default, which is to change.

Needs Triton, which PyTorch for CUDA brings. Only `triton_operations` imports this module.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.engine.model import quantized
from sensebatch.engine.model.quantized import Numbers, Quantised
from sensebatch.engine.model.rope import Rotary

SWIGLU_BLOCK = 2048
LEAST = tl.constexpr(quantized.LEAST)
NEAREST = tl.constexpr(1.5 * 2**23)
"""The sum with it of a float32 below 2^22 has no room for anything after the point."""


@triton.jit
def _rms_norm(x, weight, out, eps, width, x_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x_row = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(x_row * x_row, 0) / width + eps)
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    normed = x_row * scale * weights
    tl.store(out + row * width + columns, normed.to(out.dtype.element_ty), mask=inside)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Returns the rows of `[T, D]` normed; see `operations.rms_norm`."""
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    width = x_TD.shape[1]
    block = triton.next_power_of_2(width)
    _rms_norm[(x_TD.shape[0],)](
        x_TD,
        weight_D,
        out_TD,
        eps,
        width,
        x_TD.stride(0),
        BLOCK=block,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return out_TD


@triton.jit
def _store_quantised(x_row, out, scales, row, columns, inside, width, LARGEST: tl.constexpr):
    """Stores a quantised row with its scale; see `quantized.quantise_rows`."""
    scale = tl.maximum(tl.max(tl.abs(x_row), 0), LEAST) / LARGEST
    tl.store(scales + row, scale)
    x_row = x_row / scale
    if out.dtype.element_ty == tl.int8:
        # To the nearest integer, which the cast does not do, and ties to even.
        x_row = (x_row + NEAREST) - NEAREST
    tl.store(out + row * width + columns, x_row.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_quantised(
    x,
    weight,
    out,
    scales,
    eps,
    width,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    LARGEST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x_row = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = 1 / tl.sqrt(tl.sum(x_row * x_row, 0) / width + eps)
        x_row *= scale * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    _store_quantised(x_row, out, scales, row, columns, inside, width, LARGEST)


@triton.jit
def _swiglu_quantised(gate_up, out, scales, width, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    source = gate_up + row * 2 * width + columns
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1 + tl.exp(-gate)) * up
    _store_quantised(value, out, scales, row, columns, inside, width, LARGEST)


def quantise_rows(
    x_TI: Tensor, numbers: Numbers, norm_I: Tensor | None = None, eps: float = 0.0
) -> Quantised:
    """Returns contiguous rows quantised, normed first if there is a norm.

    See `quantized.quantise_rows` for what is returned.
    """
    num_tokens, width = x_TI.shape
    out_TI = x_TI.new_empty(num_tokens, width, dtype=numbers.dtype)
    scales_T1 = x_TI.new_empty(num_tokens, 1, dtype=torch.float32)
    _rms_norm_quantised[(num_tokens,)](
        x_TI,
        x_TI if norm_I is None else norm_I,
        out_TI,
        scales_T1,
        eps,
        width,
        BLOCK=triton.next_power_of_2(width),
        NORM=norm_I is not None,
        LARGEST=numbers.largest,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return out_TI, scales_T1


def swiglu_quantised(gate_up_TI: Tensor, numbers: Numbers) -> Quantised:
    """Returns the result of `swiglu` quantised; see `quantized.quantise_rows`."""
    num_tokens, width = gate_up_TI.shape[0], gate_up_TI.shape[1] // 2
    out_TI = gate_up_TI.new_empty(num_tokens, width, dtype=numbers.dtype)
    scales_T1 = gate_up_TI.new_empty(num_tokens, 1, dtype=torch.float32)
    _swiglu_quantised[(num_tokens,)](
        gate_up_TI,
        out_TI,
        scales_T1,
        width,
        BLOCK=triton.next_power_of_2(width),
        LARGEST=numbers.largest,
        num_warps=16,
        enable_fp_fusion=True,
    )
    return out_TI, scales_T1


@triton.jit
def _swiglu(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    source = gate_up + row * 2 * width + columns
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * width + columns, value.to(out.dtype.element_ty), mask=inside)


def swiglu(gate_up_TI: Tensor) -> Tensor:
    """Returns `silu(gate) * up`, `[T, I]`, from contiguous `[T, 2 * I]`."""
    num_tokens, width = gate_up_TI.shape[0], gate_up_TI.shape[1] // 2
    out_TI = gate_up_TI.new_empty(num_tokens, width)
    grid = (num_tokens, triton.cdiv(width, SWIGLU_BLOCK))
    _swiglu[grid](gate_up_TI, out_TI, width, BLOCK=SWIGLU_BLOCK, num_warps=4, enable_fp_fusion=True)
    return out_TI


@triton.jit
def _rotate_heads(source, norm, cos, sin, target, eps, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Norms the halves of some heads and rotates their channels in pairs."""
    QUARTER: tl.constexpr = DIM // 4
    EIGHTH: tl.constexpr = DIM // 8
    heads = tl.arange(0, HEADS)[:, None] * DIM
    pair = tl.arange(0, QUARTER)[None, :]
    # The two channels of a pair are a quarter of the head apart in the half that follows t, and an
    # eighth in the half that follows h and w.
    _rotate_half(source, norm, cos, sin, target, heads, pair, QUARTER, eps, DIM)
    turn = DIM // 2 + (pair // EIGHTH) * QUARTER + pair % EIGHTH
    _rotate_half(source, norm, cos, sin, target, heads, turn, EIGHTH, eps, DIM)


@triton.jit
def _rotate_half(
    source, norm, cos, sin, target, heads, first, DISTANCE: tl.constexpr, eps, DIM: tl.constexpr
):
    second = first + DISTANCE
    x = tl.load(source + heads + first).to(tl.float32)
    y = tl.load(source + heads + second).to(tl.float32)
    squares = tl.sum(x * x, 1) + tl.sum(y * y, 1)
    scale = 1 / tl.sqrt(squares / (DIM // 2) + eps)[:, None]
    x = x * scale * tl.load(norm + first).to(tl.float32)
    y = y * scale * tl.load(norm + second).to(tl.float32)
    dtype = target.dtype.element_ty
    turned_x = x * tl.load(cos + first).to(tl.float32) - y * tl.load(sin + first).to(tl.float32)
    turned_y = y * tl.load(cos + second).to(tl.float32) + x * tl.load(sin + second).to(tl.float32)
    tl.store(target + heads + first, turned_x.to(dtype))
    tl.store(target + heads + second, turned_y.to(dtype))


@triton.jit
def _norm_rotate(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    q_out,
    k_out,
    v_out,
    rotary_rows,
    places,
    eps,
    INDEXED: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    angle_row = token
    place = token * KV_HEADS * DIM
    if INDEXED:
        angle_row = tl.load(rotary_rows + token)
        place = tl.load(places + token)
    cos += angle_row * DIM
    sin += angle_row * DIM
    source = qkv + token * (HEADS + 2 * KV_HEADS) * DIM
    if tl.program_id(1) == 0:
        q_target = q_out + token * HEADS * DIM
        _rotate_heads(source, q_norm, cos, sin, q_target, eps, HEADS, DIM)
    else:
        k_source = source + HEADS * DIM
        _rotate_heads(k_source, k_norm, cos, sin, k_out + place, eps, KV_HEADS, DIM)
        values = tl.arange(0, KV_HEADS * DIM)
        v = tl.load(source + (HEADS + KV_HEADS) * DIM + values)
        tl.store(v_out + place + values, v)


def norm_rotate(
    qkv_Tx: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    rotary: Rotary,
    *,
    eps: float,
    k_TKE: Tensor,
    v_TKE: Tensor,
    rotary_rows_T: Tensor | None = None,
    places_T: Tensor | None = None,
) -> Tensor:
    """Norms and rotates queries and keys, and writes keys and values to their places.

    Args:
        qkv_Tx: Contiguous rows of query, key and value heads.
        q_norm: `[2, head_dim / 2]`, as in `transformer.DecoderLayer`.
        k_norm: The same for keys.
        rotary: What `rope.token_rotary` returns, contiguous.
        eps: Added to the mean square in the norms.
        k_TKE: Receives the keys; contiguous `[T, K, E]`, or any buffer if `places_T` is given.
        v_TKE: Receives the values, in the same way.
        rotary_rows_T: int64 row of each token in the rotary table; None if rows are tokens.
        places_T: int64 element of `k_TKE` and `v_TKE` where each token's heads begin; given
            together with `rotary_rows_T`.

    Returns:
        The queries, `[T, H, E]`.
    """
    dim = 2 * q_norm.shape[1]
    kv_heads = k_TKE.shape[-2]
    heads = qkv_Tx.shape[1] // dim - 2 * kv_heads
    num_tokens = qkv_Tx.shape[0]
    q_THE = qkv_Tx.new_empty(num_tokens, heads, dim)
    _norm_rotate[(num_tokens, 2)](
        qkv_Tx,
        q_norm,
        k_norm,
        rotary[0],
        rotary[1],
        q_THE,
        k_TKE,
        v_TKE,
        rotary_rows_T,
        places_T,
        eps,
        INDEXED=places_T is not None,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return q_THE


def warm_up(
    arch: Architecture, dtype: torch.dtype, device: torch.device, numbers: Numbers | None = None
) -> None:
    """Compiles every kernel for a network, or fetches it from Triton's cache on disk.

    Args:
        arch: The network's shape.
        dtype: Of its activations.
        device: Where it computes.
        numbers: What its layers are quantised to, if they are.
    """
    half, kv_heads = arch.head_dim // 2, arch.num_kv_heads
    row = torch.zeros(1, arch.hidden_size, dtype=dtype, device=device)
    rms_norm(row, row[0], arch.rms_norm_eps)
    gate_up = row.new_zeros(1, 2 * arch.intermediate_size)
    swiglu(gate_up)
    if numbers is not None:
        swiglu_quantised(gate_up, numbers)
        quantise_rows(row, numbers, row[0], arch.rms_norm_eps)
        quantise_rows(row, numbers)
    norm = row.new_zeros(2, half)
    table = row.new_zeros(1, 1, arch.head_dim)
    room = row.new_zeros(1, kv_heads, arch.head_dim)
    qkv = row.new_zeros(1, (arch.num_heads + 2 * kv_heads) * arch.head_dim)
    eps = arch.rms_norm_eps
    norm_rotate(qkv, norm, norm, (table, table), eps=eps, k_TKE=room, v_TKE=room.clone())
