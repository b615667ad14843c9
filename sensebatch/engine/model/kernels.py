"""The chains of small operations of a layer as one Triton kernel each.

Between two matrix products of a layer there are ten or more elementwise operations. One kernel for
each chain reads and writes every number once. All compute in float32 and round once at the end.

Needs Triton, which PyTorch for CUDA brings; import this module only where it is to be used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.engine.model.rope import Rotary

SWIGLU_BLOCK = 2048


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
    """Returns the rows of `[T, D]` normalised; see `transformer.rms_norm`."""
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    width = x_TD.shape[1]
    block = triton.next_power_of_2(width)
    _rms_norm[(x_TD.shape[0],)](
        x_TD, weight_D, out_TD, eps, width, x_TD.stride(0), BLOCK=block, num_warps=8
    )
    return out_TD


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
    _swiglu[grid](gate_up_TI, out_TI, width, BLOCK=SWIGLU_BLOCK, num_warps=4)
    return out_TI


@triton.jit
def _rotated(source, norm, cos, sin, eps, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Norms the halves of some heads and rotates their parts; float32 [heads, half, channel]."""
    HALF: tl.constexpr = DIM // 2
    heads = tl.arange(0, HEADS)[:, None, None] * DIM
    part = tl.arange(0, 2)[None, :, None]
    channel = tl.arange(0, HALF)[None, None, :]
    # Channels turn in pairs: a quarter of the head apart for t, an eighth for h and for w.
    distance = tl.where(part == 0, DIM // 4, DIM // 8)
    own = part * HALF + channel
    partner = part * HALF + (channel ^ distance)
    sign = tl.where((channel & distance) == 0, -1.0, 1.0)
    x = tl.load(source + heads + own).to(tl.float32)
    turned = tl.load(source + heads + partner).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(x * x, 2) / HALF + eps)[:, :, None]
    x = x * scale * tl.load(norm + own).to(tl.float32)
    turned = turned * scale * tl.load(norm + partner).to(tl.float32)
    cosines = tl.load(cos + own).to(tl.float32)
    sines = tl.load(sin + own).to(tl.float32)
    return x * cosines + sign * turned * sines, heads + own


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
    q, q_at = _rotated(source, q_norm, cos, sin, eps, HEADS, DIM)
    tl.store(q_out + token * HEADS * DIM + q_at, q.to(q_out.dtype.element_ty))
    k, k_at = _rotated(source + HEADS * DIM, k_norm, cos, sin, eps, KV_HEADS, DIM)
    tl.store(k_out + place + k_at, k.to(k_out.dtype.element_ty))
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
    """Norms and rotates queries and keys, and puts keys and values where they belong.

    Args:
        qkv_Tx: Contiguous rows of query, key and value heads.
        q_norm: `[2, head_dim / 2]`, as in `transformer.DecoderLayer`.
        k_norm: Likewise.
        rotary: Of `rope.token_rotary`, contiguous.
        eps: Of the norms.
        k_TKE: Receives the keys; contiguous `[T, K, E]`, or any buffer if `places_T` is given.
        v_TKE: Receives the values, likewise.
        rotary_rows_T: int64 row of the rotary table of each token; None for its own.
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
    _norm_rotate[(num_tokens,)](
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
    )
    return q_THE


def warm_up(arch: Architecture, dtype: torch.dtype, device: torch.device) -> None:
    """Compiles every kernel for a network, or fetches it from Triton's cache on disk."""
    half, kv_heads = arch.head_dim // 2, arch.num_kv_heads
    row = torch.zeros(1, arch.hidden_size, dtype=dtype, device=device)
    rms_norm(row, row[0], arch.rms_norm_eps)
    swiglu(row.new_zeros(1, 2 * arch.intermediate_size))
    norm = row.new_zeros(2, half)
    table = row.new_zeros(1, 1, arch.head_dim)
    room = row.new_zeros(1, kv_heads, arch.head_dim)
    qkv = row.new_zeros(1, (arch.num_heads + 2 * kv_heads) * arch.head_dim)
    eps = arch.rms_norm_eps
    norm_rotate(qkv, norm, norm, (table, table), eps=eps, k_TKE=room, v_TKE=room.clone())
