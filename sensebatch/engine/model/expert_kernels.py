"""Triton kernels for sparse blocks: each token goes through a few of many small SwiGLU experts.

Tokens are sorted by expert, and a program multiplies some of the rows of one expert with some of
its weights; weights of experts that no token chose are not read. How many rows an expert gets is
known on the device alone, so nothing waits for the host: there are as many programs as the worst
case needs, and those without rows end at once. The tiles follow from the numbers of tokens and
experts, and every row is summed in the same order whatever its neighbours are; a token's experts
are summed in the order of their weights. So the same input gives the same bytes. All sums are in
float32.

Needs Triton, as `kernels` does. Shape suffixes: T tokens, D hidden, I intermediate, X experts, C
choices of a token, P pairs of a token and an expert that it chose.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sensebatch.checkpoint.architecture import Architecture, Moe
from sensebatch.engine.model.decode_kernels import LEAST_ROWS, SHARED_REST, divisor, shared_bytes

BLOCK_TOKENS = 32
"""Tokens that one program routes."""
BLOCKS = 32
"""Counts of so many programs are added up at a time."""
COMBINED = 2048
"""Most numbers of a row that a program adds up."""
LEAST_EXPERTS = 128
"""Experts of the smallest vector in which a tile is found, so that most networks share kernels."""


class Tile(NamedTuple):
    """What a program multiplies at a time."""

    rows: int
    columns: int
    block: int
    """Numbers of a row that are multiplied at a time."""
    warps: int
    stages: int


class Routes(NamedTuple):
    """Which experts tokens go to."""

    weights_TC: Tensor
    """float32."""
    order_P: Tensor
    """int32 pairs in the order of their experts; pair `t * C + c` is choice `c` of token `t`."""
    ends_X: Tensor
    """int32 place in that order after each expert's last pair."""


@triton.jit(do_not_specialize=["num_tokens"])
def _route(
    logits,
    weights,
    chosen,
    counts,
    num_tokens,
    num_experts,
    NORMALISE: tl.constexpr,
    CHOICES: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    experts = tl.arange(0, EXPERTS)
    there = (tokens < num_tokens)[:, None]
    inside = (experts < num_experts)[None, :]
    places = tl.minimum(tokens, num_tokens - 1)[:, None] * num_experts + experts[None, :]
    scores = tl.load(logits + places, mask=inside, other=float("-inf")).to(tl.float32)
    scores = tl.exp(scores - tl.max(scores, 1)[:, None])
    scores /= tl.sum(scores, 1)[:, None]
    # Not a number counts as 0, so that a token always chooses experts that there are.
    scores = tl.where(inside, tl.where(scores >= 0, scores, 0.0), -1.0)
    slots = tl.arange(0, SLOTS)[None, :]
    best_weights = tl.zeros((TOKENS, SLOTS), dtype=tl.float32)
    best_experts = tl.zeros((TOKENS, SLOTS), dtype=tl.int32)
    hits = tl.zeros((TOKENS, EXPERTS), dtype=tl.int32)
    for slot in tl.static_range(CHOICES):
        best = tl.argmax(scores, 1)
        is_best = experts[None, :] == best[:, None]
        best_weights = tl.where(slots == slot, tl.max(scores, 1)[:, None], best_weights)
        best_experts = tl.where(slots == slot, best[:, None], best_experts)
        hits += is_best.to(tl.int32)
        scores = tl.where(is_best, -1.0, scores)
    if NORMALISE:
        best_weights /= tl.sum(best_weights, 1)[:, None]
    pairs = tokens[:, None] * CHOICES + slots
    stored = there & (slots < CHOICES)
    tl.store(weights + pairs, best_weights, mask=stored)
    tl.store(chosen + pairs, best_experts, mask=stored)
    count = tl.sum(tl.where(there, hits, 0), 0)
    tl.store(counts + tl.program_id(0) * EXPERTS + experts, count)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _place(
    chosen,
    counts,
    order,
    ends,
    num_tokens,
    num_experts,
    num_blocks,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    experts = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), dtype=tl.int32)
    before = tl.zeros((EXPERTS,), dtype=tl.int32)
    for start in range(0, num_blocks, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        places = blocks[:, None] * EXPERTS + experts[None, :]
        count = tl.load(counts + places, mask=(blocks < num_blocks)[:, None], other=0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where((blocks < tl.program_id(0))[:, None], count, 0), 0)
    end = tl.cumsum(total, 0)
    if tl.program_id(0) == 0:
        tl.store(ends + experts, end, mask=experts < num_experts)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = tokens < num_tokens
    hits = tl.zeros((TOKENS, EXPERTS), dtype=tl.int32)
    for slot in tl.static_range(CHOICES):
        expert = tl.load(chosen + tokens * CHOICES + slot, mask=there, other=EXPERTS)
        hits += (experts[None, :] == expert[:, None]).to(tl.int32)
    place = (end - total + before)[None, :] + tl.cumsum(hits, 0) - hits
    for slot in tl.static_range(CHOICES):
        pair = tokens * CHOICES + slot
        expert = tl.load(chosen + pair, mask=there, other=EXPERTS)
        own = tl.sum(tl.where(experts[None, :] == expert[:, None], place, 0), 1)
        tl.store(order + own, pair, mask=there)


def route(logits_TX: Tensor, *, choices: int, normalise: bool) -> Routes:
    """Returns which experts tokens go to.

    Args:
        logits_TX: Contiguous.
        choices: Experts that each token goes to; of equal ones it takes the first.
        normalise: Whether a token's weights are scaled so that their sum is 1.
    """
    num_tokens, num_experts = logits_TX.shape
    blocks, experts = triton.cdiv(num_tokens, BLOCK_TOKENS), triton.next_power_of_2(num_experts)
    weights_TC = logits_TX.new_empty(num_tokens, choices, dtype=torch.float32)
    chosen_TC = torch.empty_like(weights_TC, dtype=torch.int32)
    counts = chosen_TC.new_empty(blocks, experts)
    order_P = chosen_TC.new_empty(num_tokens * choices)
    ends_X = chosen_TC.new_empty(num_experts)
    sizes = {"CHOICES": choices, "EXPERTS": experts, "TOKENS": BLOCK_TOKENS, "num_warps": 4}
    sizes["enable_fp_fusion"] = True
    _route[(blocks,)](
        logits_TX,
        weights_TC,
        chosen_TC,
        counts,
        num_tokens,
        num_experts,
        NORMALISE=normalise,
        SLOTS=triton.next_power_of_2(choices),
        **sizes,
    )
    _place[(blocks,)](
        chosen_TC, counts, order_P, ends_X, num_tokens, num_experts, blocks, **sizes, BLOCKS=BLOCKS
    )
    return Routes(weights_TC, order_P, ends_X)


@triton.jit
def _rows_of_tile(ends, tile, num_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Returns a tile's expert, its first row and the end of the expert's rows.

    The first row is not before that end where there are fewer tiles.
    """
    experts = tl.arange(0, EXPERTS)
    inside = experts < num_experts
    end = tl.load(ends + experts, mask=inside, other=0)
    begin = tl.load(ends + experts - 1, mask=inside & (experts > 0), other=0)
    tiles = tl.cdiv(end - begin, ROWS)
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    is_own = experts == expert
    first = tl.sum(tl.where(is_own, begin + (tile - last + tiles) * ROWS, 0), 0)
    return expert, first, tl.sum(tl.where(is_own, end, 0), 0)


@triton.jit
def _gate_up(
    x,
    weight,
    out,
    order,
    ends,
    num_experts,
    inner,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_columns = inner // COLUMNS
    tile = tl.program_id(0) // num_columns
    expert, first, end = _rows_of_tile(ends, tile, num_experts, EXPERTS, ROWS)
    if first >= end:
        return
    rows = first + tl.arange(0, ROWS)
    there = rows < end
    # Rows after the expert's last are computed from its last one, and not stored.
    pairs = tl.load(order + tl.minimum(rows, end - 1))
    columns = (tl.program_id(0) % num_columns) * COLUMNS + tl.arange(0, COLUMNS)
    channels = tl.arange(0, BLOCK)
    source = x + (pairs // CHOICES).to(tl.int64)[:, None] * WIDTH + channels[None, :]
    gates = weight + expert.to(tl.int64) * 2 * inner * WIDTH
    gates += columns[None, :] * WIDTH + channels[:, None]
    ups = gates + inner * WIDTH
    gate = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    up = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, WIDTH, BLOCK):
        values = tl.load(source + start)
        gate = tl.dot(values, tl.load(gates + start), gate, input_precision="ieee")
        up = tl.dot(values, tl.load(ups + start), up, input_precision="ieee")
    result = gate / (1 + tl.exp(-gate)) * up
    target = out + rows.to(tl.int64)[:, None] * inner + columns[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=there[:, None])


@triton.jit
def _down(
    hidden,
    weight,
    out,
    order,
    ends,
    pair_weights,
    num_experts,
    width,
    EXPERTS: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_columns = width // COLUMNS
    tile = tl.program_id(0) // num_columns
    expert, first, end = _rows_of_tile(ends, tile, num_experts, EXPERTS, ROWS)
    if first >= end:
        return
    rows = first + tl.arange(0, ROWS)
    there = rows < end
    rows = tl.minimum(rows, end - 1)
    columns = (tl.program_id(0) % num_columns) * COLUMNS + tl.arange(0, COLUMNS)
    channels = tl.arange(0, BLOCK)
    source = hidden + rows.to(tl.int64)[:, None] * INNER + channels[None, :]
    weights = weight + expert.to(tl.int64) * width * INNER
    weights += columns[None, :] * INNER + channels[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, INNER, BLOCK):
        values = tl.load(source + start)
        total = tl.dot(values, tl.load(weights + start), total, input_precision="ieee")
    pairs = tl.load(order + rows)
    total *= tl.load(pair_weights + pairs)[:, None]
    target = out + pairs.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=there[:, None])


@triton.jit
def _add_parts(parts, residual, out, width, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(CHOICES):
        source = parts + (token * CHOICES + choice) * width + columns
        total += tl.load(source, mask=inside, other=0.0).to(tl.float32)
    place = token * width + columns
    total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


class Tiles(NamedTuple):
    """How the products of a sparse block are cut."""

    gate_up: Tile
    down: Tile


TILES = {
    64: Tiles(Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 3)),
    16: Tiles(Tile(64, 128, 64, 4, 4), Tile(64, 128, 64, 4, 4)),
    0: Tiles(Tile(LEAST_ROWS, 32, 256, 4, 3), Tile(LEAST_ROWS, 32, 256, 4, 4)),
}
"""The tiles by the least pairs that an expert has on average."""


def tiles_for(num_pairs: int, num_experts: int) -> Tiles:
    """Returns the tiles for so many pairs of tokens and experts."""
    mean = num_pairs // num_experts
    return next(tiles for least, tiles in TILES.items() if mean >= least)


def fitting(tile: Tile, *, matrices: int, item_bytes: int, shared_bytes: int | None) -> Tile:
    """Returns a tile that fits what a program may have, narrower than is best if need be.

    Args:
        tile: The best one.
        matrices: How many tiles of weights are multiplied with one of tokens.
        item_bytes: Bytes of a number.
        shared_bytes: What `decode_kernels.shared_bytes` returns.
    """
    column_bytes = tile.stages * (tile.rows + matrices * tile.columns) * item_bytes
    block = tile.block
    while shared_bytes is not None and column_bytes * block > shared_bytes - SHARED_REST:
        block //= 2
    return tile._replace(block=block)


def _grid(num_pairs: int, num_experts: int, tile: Tile, width: int) -> tuple[int]:
    """Returns how many programs a product takes at most."""
    return ((num_pairs // tile.rows + min(num_pairs, num_experts)) * (width // tile.columns),)


def _fitted(x: Tensor, tile: Tile, *, matrices: int, height: int, width: int) -> Tile:
    """Returns a tile that divides weight matrices and fits the device; see `fitting`."""
    tile = tile._replace(columns=divisor(height, tile.columns), block=divisor(width, tile.block))
    shared = shared_bytes(x.device)
    return fitting(tile, matrices=matrices, item_bytes=x.itemsize, shared_bytes=shared)


def gate_up(x_TD: Tensor, weight: Tensor, routes: Routes, tile: Tile) -> Tensor:
    """Returns `silu(gate) * up` of every pair, `[P, I]` in the order of the routes.

    Args:
        x_TD: Contiguous.
        weight: Contiguous `[X, 2 * I, D]`, gates first.
        routes: Where tokens go.
        tile: Is narrowed to what fits.
    """
    num_experts, double, width = weight.shape
    inner, num_pairs = double // 2, routes.order_P.shape[0]
    hidden_PI = x_TD.new_empty(num_pairs, inner)
    tile = _fitted(x_TD, tile, matrices=2, height=inner, width=width)
    _gate_up[_grid(num_pairs, num_experts, tile, inner)](
        x_TD,
        weight,
        hidden_PI,
        routes.order_P,
        routes.ends_X,
        num_experts,
        inner,
        CHOICES=routes.weights_TC.shape[1],
        EXPERTS=max(triton.next_power_of_2(num_experts), LEAST_EXPERTS),
        WIDTH=width,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        BLOCK=tile.block,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return hidden_PI


def down(hidden_PI: Tensor, weight: Tensor, routes: Routes, tile: Tile) -> Tensor:
    """Returns the weighted outputs of every pair, `[P, D]`, those of a token together.

    Args:
        hidden_PI: What `gate_up` returns.
        weight: Contiguous `[X, D, I]`.
        routes: Where tokens go.
        tile: Is narrowed to what fits.
    """
    num_experts, width, inner = weight.shape
    num_pairs = hidden_PI.shape[0]
    out_PD = hidden_PI.new_empty(num_pairs, width)
    tile = _fitted(hidden_PI, tile, matrices=1, height=width, width=inner)
    _down[_grid(num_pairs, num_experts, tile, width)](
        hidden_PI,
        weight,
        out_PD,
        routes.order_P,
        routes.ends_X,
        routes.weights_TC,
        num_experts,
        width,
        EXPERTS=max(triton.next_power_of_2(num_experts), LEAST_EXPERTS),
        INNER=inner,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        BLOCK=tile.block,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return out_PD


def add_parts(parts_PD: Tensor, residual_TD: Tensor, out_TD: Tensor) -> None:
    """Writes the residual plus the sum of each token's parts; all are contiguous.

    The output may be the residual itself.
    """
    num_tokens, width = residual_TD.shape
    block = min(triton.next_power_of_2(width), COMBINED)
    _add_parts[(num_tokens, triton.cdiv(width, block))](
        parts_PD,
        residual_TD,
        out_TD,
        width,
        CHOICES=parts_PD.shape[0] // num_tokens,
        BLOCK=block,
        num_warps=8,
        enable_fp_fusion=True,
    )


def add_experts(
    residual_TD: Tensor,
    x_TD: Tensor,
    logits_TX: Tensor,
    matrices: tuple[Tensor, Tensor],
    moe: Moe,
    out_TD: Tensor,
) -> None:
    """Writes what `operations.Operations.add_experts` returns, perhaps over the residual."""
    choices = moe.num_experts_per_tok
    routes = route(logits_TX, choices=choices, normalise=moe.norm_topk_prob)
    tiles = tiles_for(x_TD.shape[0] * choices, moe.num_experts)
    hidden_PI = gate_up(x_TD, matrices[0], routes, tiles.gate_up)
    add_parts(down(hidden_PI, matrices[1], routes, tiles.down), residual_TD, out_TD)


def warm_up(arch: Architecture, dtype: torch.dtype, device: torch.device) -> None:
    """Compiles every kernel for a network, if it has sparse blocks; see `kernels.warm_up`."""
    row = torch.zeros(1, arch.hidden_size, dtype=dtype, device=device)
    for moe in filter(None, dict.fromkeys((arch.understanding_moe, arch.generation_moe))):
        routes = route(
            row.new_zeros(1, moe.num_experts),
            choices=moe.num_experts_per_tok,
            normalise=moe.norm_topk_prob,
        )
        # No expert has a row, so that no weights are read.
        routes.ends_X.zero_()
        inner, width = moe.intermediate_size, arch.hidden_size
        weight = row.new_zeros(1, 1, 1)
        gates_ups = weight.expand(moe.num_experts, 2 * inner, width)
        downs = weight.expand(moe.num_experts, width, inner)
        for tiles in TILES.values():
            hidden_PI = gate_up(row, gates_ups, routes, tiles.gate_up)
            add_parts(down(hidden_PI, downs, routes, tiles.down), row, row)
