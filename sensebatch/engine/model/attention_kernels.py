"""Attention as Triton kernels: one new token of several sequences, a run, or many runs at once.

Which kernel computes, in which tiles and in how many splits, follows from the numbers of queries,
keys and heads alone; so the same numbers give the same bytes wherever they lie, whatever memory is
free and whatever else the device does. Torch's own attention does not promise that. A split is a
share of the keys: a few queries would otherwise occupy a few processors only. All sums are in
float32.

Needs Triton, as `kernels` does. Shape suffixes: Q queries, S sequences, L keys, H query heads, K
key/value heads, E head_dim, T tokens of a pass, R runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.engine.model.operations import Room
from sensebatch.engine.model.runs import COLUMNS
from sensebatch.plan.passes import ATTENTION_SPLITS, SPLIT_QUERIES

LEAST_ROWS = 16
"""Rows of the smallest tile that can be multiplied."""
TILE_ROWS = 64
"""Rows of a tile of a run: its queries, each with all query heads of one key/value head."""
TILE_KEYS = 64
"""Keys that a program attends to at a time; half as many in float32, for shared memory."""


@triton.jit
def _nothing(ROWS: tl.constexpr, DIM: tl.constexpr):
    """Returns what `_scan` returns of rows that have seen no key."""
    top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    out = tl.zeros((ROWS, DIM), dtype=tl.float32)
    return top, total, out


@triton.jit
def _scan(
    q_tile,
    keys,
    values,
    begin,
    end,
    last,
    scale,
    top,
    total,
    out,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attends from some rows to the keys in [begin, end), each row up to its last key.

    Returns each row's highest score, the sum of its weights relative to that score, and its
    weighted values, not yet divided by the sum: of these keys and of those before, whose `top`,
    `total` and `out` it is given.
    """
    channels = tl.arange(0, DIM)
    for start in range(begin, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        inside = tokens < end
        place = tokens[:, None] * (KV_HEADS * DIM) + channels[None, :]
        k_tile = tl.load(keys + place, mask=inside[:, None], other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        seen = inside[None, :] & (tokens[None, :] <= last[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # Infinity minus infinity would be NaN in a row that has seen no key yet.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(scores - shift[:, None])
        rescale = tl.exp(top - shift)
        v_tile = tl.load(values + place, mask=inside[:, None], other=0.0)
        total = total * rescale + tl.sum(weights, 1)
        out = out * rescale[:, None] + tl.dot(
            weights.to(v_tile.dtype), v_tile, input_precision="ieee"
        )
        top = new_top
    return top, total, out


@triton.jit
def _attend_token(
    q,
    keys,
    values,
    lengths,
    parts,
    highest,
    sums,
    stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence) + 1
    span = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    begin, end = split * span, tl.minimum(split * span + span, length)
    queries, channels = tl.arange(0, ROWS), tl.arange(0, DIM)
    row = (sequence * KV_HEADS + head) * GROUP + queries
    there = queries < GROUP
    q_tile = tl.load(q + row[:, None] * DIM + channels[None, :], mask=there[:, None], other=0.0)
    base = sequence.to(tl.int64) * stride + head * DIM
    keys, values = keys + base, values + base
    last = length + tl.zeros((ROWS,), dtype=tl.int32)
    top, total, out = _nothing(ROWS, DIM)
    top, total, out = _scan(
        q_tile, keys, values, begin, end, last, scale, top, total, out, KV_HEADS, DIM, BLOCK
    )
    place = row * SPLITS + split
    tl.store(highest + place, top, mask=there)
    tl.store(sums + place, total, mask=there)
    tl.store(parts + place[:, None] * DIM + channels[None, :], out, mask=there[:, None])


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_earlier"])
def _attend_run(
    q,
    keys,
    values,
    result,
    parts,
    highest,
    sums,
    num_queries,
    num_keys,
    num_earlier,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    head, split = tl.program_id(1), tl.program_id(2)
    first = tl.program_id(0) * ROWS
    rows, channels = first + tl.arange(0, ROWS), tl.arange(0, DIM)
    query = rows // GROUP
    there = query < num_queries
    row = (query * KV_HEADS + head) * GROUP + rows % GROUP
    q_tile = tl.load(q + row[:, None] * DIM + channels[None, :], mask=there[:, None], other=0.0)
    span = tl.cdiv(tl.cdiv(num_keys, SPLITS), BLOCK) * BLOCK
    begin = split * span
    # No row of the tile sees more than its last one.
    seen = tl.minimum(num_earlier + (first + ROWS - 1) // GROUP + 1, num_keys)
    end = tl.minimum(begin + span, seen)
    keys, values, last = keys + head * DIM, values + head * DIM, num_earlier + query
    top, total, out = _nothing(ROWS, DIM)
    top, total, out = _scan(
        q_tile, keys, values, begin, end, last, scale, top, total, out, KV_HEADS, DIM, BLOCK
    )
    if SPLITS == 1:
        out = (out / total[:, None]).to(result.dtype.element_ty)
        tl.store(result + row[:, None] * DIM + channels[None, :], out, mask=there[:, None])
    else:
        place = row * SPLITS + split
        tl.store(highest + place, top, mask=there)
        tl.store(sums + place, total, mask=there)
        tl.store(parts + place[:, None] * DIM + channels[None, :], out, mask=there[:, None])


@triton.jit
def _places(
    first,
    start,
    head,
    num_queries,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Returns the query of each row of a tile, where its numbers are, and whether it is there."""
    rows = first + tl.arange(0, ROWS)
    query = rows // GROUP
    row = ((start + query) * KV_HEADS + head) * GROUP + rows % GROUP
    return query, row[:, None] * DIM + tl.arange(0, DIM)[None, :], query < num_queries


@triton.jit(do_not_specialize=["num_tokens"])
def _attend_runs(
    q,
    own_k,
    own_v,
    table,
    result,
    num_tokens,
    scale,
    OWN: tl.constexpr,
    COLUMNS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head, run = tl.program_id(1), tl.program_id(2)
    first = tl.program_id(0) * ROWS
    entry = table + run * COLUMNS
    # Heads are aligned, which an address from a table does not say.
    keys = tl.multiple_of(tl.load(entry).to(q.dtype), 16)
    values = tl.multiple_of(tl.load(entry + 1).to(q.dtype), 16)
    num_keys = tl.load(entry + 2).to(tl.int32)
    if OWN:
        start, num_queries, num_earlier = run * num_tokens, num_tokens, num_keys
    else:
        start = tl.load(entry + 3).to(tl.int32)
        num_queries = tl.load(entry + 4).to(tl.int32)
        num_earlier = tl.load(entry + 5).to(tl.int32)
    if first >= num_queries * GROUP:
        return
    query, place, there = _places(first, start, head, num_queries, KV_HEADS, GROUP, ROWS, DIM)
    q_tile = tl.load(q + place, mask=there[:, None], other=0.0)
    top, total, out = _nothing(ROWS, DIM)
    if OWN:
        base = (start * KV_HEADS + head) * DIM
        own_k, own_v = own_k + base, own_v + base
        last = num_queries + tl.zeros((ROWS,), dtype=tl.int32)
        top, total, out = _scan(
            q_tile, own_k, own_v, 0, num_queries, last, scale, top, total, out, KV_HEADS, DIM, BLOCK
        )
    # No row of the tile sees more than its last one.
    end = tl.minimum(num_earlier + (first + ROWS - 1) // GROUP + 1, num_keys)
    keys, values, last = keys + head * DIM, values + head * DIM, num_earlier + query
    top, total, out = _scan(
        q_tile, keys, values, 0, end, last, scale, top, total, out, KV_HEADS, DIM, BLOCK
    )
    out = (out / total[:, None]).to(result.dtype.element_ty)
    tl.store(result + place, out, mask=there[:, None])


@triton.jit
def _combine(parts, highest, sums, out, DIM: tl.constexpr, SPLITS: tl.constexpr):
    row = tl.program_id(0)
    splits = row * SPLITS + tl.arange(0, SPLITS)
    channels = tl.arange(0, DIM)
    tops = tl.load(highest + splits)
    weights = tl.exp(tops - tl.max(tops, 0))
    total = tl.sum(tl.load(sums + splits) * weights, 0)
    tiles = tl.load(parts + splits[:, None] * DIM + channels[None, :])
    result = tl.sum(tiles * weights[:, None], 0) / total
    tl.store(out + row * DIM + channels, result.to(out.dtype.element_ty))


def _partial(q: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns memory for what the splits of so many rows found: values, tops and sums."""
    parts = q.new_empty(rows, ATTENTION_SPLITS, q.shape[-1], dtype=torch.float32)
    highest = parts.new_empty(rows, ATTENTION_SPLITS)
    return parts, highest, torch.empty_like(highest)


def _join(partial: tuple[Tensor, Tensor, Tensor], out: Tensor) -> None:
    rows, splits, dim = partial[0].shape
    _combine[(rows,)](*partial, out, DIM=dim, SPLITS=splits, num_warps=4, enable_fp_fusion=True)


def attend_token(q_SHE: Tensor, k_SLKE: Tensor, v_SLKE: Tensor, lengths_S: Tensor) -> Tensor:
    """Returns `[S, H * E]`, the attention of one new token of each sequence.

    Args:
        q_SHE: Contiguous queries.
        k_SLKE: Keys, room for L tokens a sequence; contiguous but for the first axis.
        v_SLKE: Values with the strides of the keys.
        lengths_S: int64, the cached tokens of each sequence before the new one, which is cached
            after them already.
    """
    num_sequences, heads, dim = q_SHE.shape
    kv_heads = k_SLKE.shape[2]
    partial = _partial(q_SHE, num_sequences * heads)
    group = heads // kv_heads
    _attend_token[(num_sequences, kv_heads, ATTENTION_SPLITS)](
        q_SHE,
        k_SLKE,
        v_SLKE,
        lengths_S,
        *partial,
        k_SLKE.stride(0),
        dim**-0.5,
        KV_HEADS=kv_heads,
        GROUP=group,
        ROWS=max(triton.next_power_of_2(group), LEAST_ROWS),
        DIM=dim,
        BLOCK=TILE_KEYS,
        SPLITS=ATTENTION_SPLITS,
        num_warps=4,
        enable_fp_fusion=True,
        # Three of float32 are more than the shared memory of most GPUs.
        num_stages=3 if q_SHE.itemsize == 2 else 2,
    )
    out = q_SHE.new_empty(num_sequences, heads * dim)
    _join(partial, out)
    return out


def attend_run(q_QHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, causal: bool) -> Tensor:
    """Attends from a run of one sequence; see `attention.Attention`.

    Args:
        q_QHE: Contiguous.
        k_LKE: Contiguous.
        v_LKE: Contiguous.
        causal: Whether a query sees no later key; the last one is aligned with the last key.
    """
    num_queries, heads, dim = q_QHE.shape
    num_keys, kv_heads = k_LKE.shape[:2]
    group = heads // kv_heads
    rows = max(TILE_ROWS, triton.next_power_of_2(group))
    splits = ATTENTION_SPLITS if num_queries <= SPLIT_QUERIES else 1
    out = torch.empty_like(q_QHE)
    partial = _partial(q_QHE, num_queries * heads) if splits > 1 else (out, out, out)
    _attend_run[(triton.cdiv(num_queries * group, rows), kv_heads, splits)](
        q_QHE,
        k_LKE,
        v_LKE,
        out,
        *partial,
        num_queries,
        num_keys,
        num_keys - num_queries if causal else num_keys,
        dim**-0.5,
        KV_HEADS=kv_heads,
        GROUP=group,
        ROWS=rows,
        DIM=dim,
        BLOCK=TILE_KEYS if q_QHE.itemsize == 2 else TILE_KEYS // 2,
        SPLITS=splits,
        num_warps=4,
        enable_fp_fusion=True,
        num_stages=2 if q_QHE.itemsize == 2 else 1,
    )
    if splits > 1:
        _join(partial, out)
    return out


def attend_runs(
    q_THE: Tensor,
    own: Room | None,
    table_Rx: Tensor,
    *,
    num_tokens: int,
    num_kv_heads: int,
    out_THE: Tensor,
) -> None:
    """Attends from runs of several sequences, each row as `attend_run` does without splits.

    Args:
        q_THE: Contiguous queries of a pass.
        own: Contiguous keys and values of the same tokens, if runs are images: each has
            `num_tokens` of them, one image after the other, and sees these before those of the
            table. None if the table has all that runs see.
        table_Rx: int64 `[R, COLUMNS]`, contiguous; see `runs`.
        num_tokens: The most queries of a run.
        num_kv_heads: Key/value heads.
        out_THE: Contiguous; the rows of the runs are written.
    """
    heads, dim = q_THE.shape[1:]
    group = heads // num_kv_heads
    rows = max(TILE_ROWS, triton.next_power_of_2(group))
    own_keys, own_values = (q_THE, q_THE) if own is None else own
    _attend_runs[(triton.cdiv(num_tokens * group, rows), num_kv_heads, len(table_Rx))](
        q_THE,
        own_keys,
        own_values,
        table_Rx,
        out_THE,
        num_tokens,
        dim**-0.5,
        OWN=own is not None,
        COLUMNS=COLUMNS,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        ROWS=rows,
        DIM=dim,
        BLOCK=TILE_KEYS if q_THE.itemsize == 2 else TILE_KEYS // 2,
        num_warps=4,
        enable_fp_fusion=True,
        num_stages=2 if q_THE.itemsize == 2 else 1,
    )


def warm_up_runs(arch: Architecture, dtype: torch.dtype, device: torch.device) -> None:
    """Compiles what attends from runs; see `kernels.warm_up`."""
    for num_queries in (SPLIT_QUERIES, SPLIT_QUERIES + 1):
        q_QHE = torch.zeros(num_queries, arch.num_heads, arch.head_dim, dtype=dtype, device=device)
        k_LKE = q_QHE[:, : arch.num_kv_heads].contiguous()
        attend_run(q_QHE, k_LKE, k_LKE, True)
    places = (k_LKE.data_ptr(), k_LKE.data_ptr(), 1, 0, 1, 0)
    table_Rx = torch.tensor([places], dtype=torch.int64, device=device)
    for own in (None, (k_LKE, k_LKE)):
        attend_runs(
            q_QHE, own, table_Rx, num_tokens=1, num_kv_heads=arch.num_kv_heads, out_THE=q_QHE
        )
