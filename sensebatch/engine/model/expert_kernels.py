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

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sensebatch.checkpoint.architecture import Architecture, Moe
from sensebatch.engine.model.decode_kernels import (
    LEAST_ROWS,
    MAX_SEQUENCES,
    SHARED_REST,
    divisor,
    shared_bytes,
)
from sensebatch.engine.model.descriptors import TensorDescriptor

HOPPER = 9
"""Compute capability, in whole numbers, of devices that copy tiles by themselves and on which that
was measured to be faster."""
DESCRIBED_ROWS = 64
"""Rows of the smallest tile that is copied like that."""
PROGRAMS_A_PROCESSOR = 2
"""Programs of `_down_described` that fit a multiprocessor at a time."""
BLOCK_TOKENS = 32
"""Tokens that one of many programs routes."""
ALONE_TOKENS = (1, 16, MAX_SEQUENCES)
"""Tokens that a single program routes and sorts."""
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


@triton.jit
def _sort(order, chosen, hits, first, tokens, there, CHOICES: tl.constexpr, EXPERTS: tl.constexpr):
    """Stores the pairs of some tokens at their places.

    Args:
        order: Where.
        chosen: Experts of each token and choice.
        hits: 1 where a token goes to an expert, else 0.
        first: Each expert's first place.
        tokens: Their numbers.
        there: Which of them there are.
    """
    experts, slots = tl.arange(0, EXPERTS)[None, :], tl.arange(0, chosen.shape[1])[None, :]
    places = first[None, :] + tl.cumsum(hits, 0) - hits
    for slot in tl.static_range(CHOICES):
        expert = tl.sum(tl.where(slots == slot, chosen, 0), 1)
        place = tl.sum(tl.where(experts == expert[:, None], places, 0), 1)
        tl.store(order + place, tokens * CHOICES + slot, mask=there)


@triton.jit
def _ranks(logits, tokens, num_tokens, num_experts, EXPERTS: tl.constexpr):
    """Returns an int64 for each token and expert, the larger the more probable the expert is.

    The upper half is the probability, whose bits have the order of the numbers as none is negative.
    The lower half puts the first of equal experts before the others. It is -1 where there is no
    expert. What is not a number counts as 0, so that a token always chooses experts that there are.
    """
    experts = tl.arange(0, EXPERTS)[None, :]
    inside = experts < num_experts
    source = logits + tl.minimum(tokens, num_tokens - 1)[:, None] * num_experts + experts
    scores = tl.load(source, mask=inside, other=float("-inf")).to(tl.float32)
    scores = tl.exp(scores - tl.max(scores, 1)[:, None])
    scores /= tl.sum(scores, 1)[:, None]
    scores = tl.where(scores >= 0, scores, 0.0)
    ranks = (scores.to(tl.int32, bitcast=True).to(tl.int64) << 32) + (EXPERTS - 1 - experts)
    return tl.where(inside, ranks, -1)


@triton.jit(do_not_specialize=["num_tokens"])
def _route(
    logits,
    weights,
    chosen,
    counts,
    order,
    ends,
    num_tokens,
    num_experts,
    NORMALISE: tl.constexpr,
    ALONE: tl.constexpr,
    CHOICES: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    experts, slots = tl.arange(0, EXPERTS), tl.arange(0, SLOTS)[None, :]
    there = tokens < num_tokens
    ranks = _ranks(logits, tokens, num_tokens, num_experts, EXPERTS)
    best_weights = tl.zeros((TOKENS, SLOTS), dtype=tl.float32)
    best_experts = tl.zeros((TOKENS, SLOTS), dtype=tl.int32)
    hits = tl.zeros((TOKENS, EXPERTS), dtype=tl.int32)
    for slot in tl.static_range(CHOICES):
        rank = tl.max(ranks, 1)
        expert = EXPERTS - 1 - (rank & (EXPERTS - 1)).to(tl.int32)
        score = (rank >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        best_weights = tl.where(slots == slot, score[:, None], best_weights)
        best_experts = tl.where(slots == slot, expert[:, None], best_experts)
        is_best = experts[None, :] == expert[:, None]
        hits += (is_best & there[:, None]).to(tl.int32)
        ranks = tl.where(is_best, -1, ranks)
    if NORMALISE:
        best_weights /= tl.sum(best_weights, 1)[:, None]
    pairs = tokens[:, None] * CHOICES + slots
    stored = there[:, None] & (slots < CHOICES)
    tl.store(weights + pairs, best_weights, mask=stored)
    count = tl.sum(hits, 0)
    if ALONE:
        end = tl.cumsum(count, 0)
        tl.store(ends + experts, end, mask=experts < num_experts)
        _sort(order, best_experts, hits, end - count, tokens, there, CHOICES, EXPERTS)
    else:
        tl.store(chosen + pairs, best_experts, mask=stored)
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
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    experts, slots = tl.arange(0, EXPERTS), tl.arange(0, SLOTS)[None, :]
    total = tl.zeros((EXPERTS,), dtype=tl.int32)
    before = tl.zeros((EXPERTS,), dtype=tl.int32)
    for start in range(0, num_blocks, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        source = counts + blocks[:, None] * EXPERTS + experts[None, :]
        count = tl.load(source, mask=(blocks < num_blocks)[:, None], other=0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where((blocks < tl.program_id(0))[:, None], count, 0), 0)
    end = tl.cumsum(total, 0)
    if tl.program_id(0) == 0:
        tl.store(ends + experts, end, mask=experts < num_experts)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = tokens < num_tokens
    inside = there[:, None] & (slots < CHOICES)
    mine = tl.load(chosen + tokens[:, None] * CHOICES + slots, mask=inside, other=EXPERTS)
    hits = tl.zeros((TOKENS, EXPERTS), dtype=tl.int32)
    for slot in tl.static_range(CHOICES):
        expert = tl.sum(tl.where(slots == slot, mine, 0), 1)
        hits += (experts[None, :] == expert[:, None]).to(tl.int32)
    _sort(order, mine, hits, end - total + before, tokens, there, CHOICES, EXPERTS)


def route(logits_TX: Tensor, *, choices: int, normalise: bool) -> Routes:
    """Returns which experts tokens go to.

    Args:
        logits_TX: Contiguous.
        choices: Experts that each token goes to; of equal ones it takes the first.
        normalise: Whether a token's weights are scaled so that their sum is 1.
    """
    num_tokens, num_experts = logits_TX.shape
    tokens = next((most for most in ALONE_TOKENS if num_tokens <= most), BLOCK_TOKENS)
    is_alone = num_tokens <= tokens
    blocks, experts = triton.cdiv(num_tokens, tokens), triton.next_power_of_2(num_experts)
    weights_TC = logits_TX.new_empty(num_tokens, choices, dtype=torch.float32)
    order_P = logits_TX.new_empty(num_tokens * choices, dtype=torch.int32)
    ends_X = order_P.new_empty(num_experts)
    chosen_TC = order_P if is_alone else torch.empty_like(order_P)
    counts = order_P if is_alone else order_P.new_empty(blocks, experts)
    sizes = {"CHOICES": choices, "SLOTS": triton.next_power_of_2(choices), "EXPERTS": experts}
    sizes |= {"TOKENS": tokens, "enable_fp_fusion": True}
    sizes["num_warps"] = min(max(tokens // 4, 1), 8)
    _route[(blocks,)](
        logits_TX,
        weights_TC,
        chosen_TC,
        counts,
        order_P,
        ends_X,
        num_tokens,
        num_experts,
        NORMALISE=normalise,
        ALONE=is_alone,
        **sizes,
    )
    if not is_alone:
        _place[(blocks,)](
            chosen_TC,
            counts,
            order_P,
            ends_X,
            num_tokens,
            num_experts,
            blocks,
            **sizes,
            BLOCKS=BLOCKS,
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
def _weights(matrix, row, start, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Returns some numbers of some rows of a matrix, transposed: `[BLOCK, COLUMNS]`."""
    rows = (row + tl.arange(0, COLUMNS)).to(tl.int64)
    return tl.trans(tl.load(matrix + rows[:, None] * WIDTH + start + tl.arange(0, BLOCK)[None, :]))


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
    column = (tl.program_id(0) % num_columns) * COLUMNS
    gates = expert * 2 * inner + column
    channels = tl.arange(0, BLOCK)
    source = x + (pairs // CHOICES).to(tl.int64)[:, None] * WIDTH + channels[None, :]
    gate = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    up = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, WIDTH, BLOCK):
        values = tl.load(source + start)
        some = _weights(weight, gates, start, WIDTH, COLUMNS, BLOCK)
        gate = tl.dot(values, some, gate, input_precision="ieee")
        some = _weights(weight, gates + inner, start, WIDTH, COLUMNS, BLOCK)
        up = tl.dot(values, some, up, input_precision="ieee")
    result = gate / (1 + tl.exp(-gate)) * up
    columns = column + tl.arange(0, COLUMNS)
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
    column = (tl.program_id(0) % num_columns) * COLUMNS
    channels = tl.arange(0, BLOCK)
    source = hidden + rows.to(tl.int64)[:, None] * INNER + channels[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, INNER, BLOCK):
        some = _weights(weight, expert * width + column, start, INNER, COLUMNS, BLOCK)
        total = tl.dot(tl.load(source + start), some, total, input_precision="ieee")
    pairs = tl.load(order + rows)
    total *= tl.load(pair_weights + pairs)[:, None]
    columns = column + tl.arange(0, COLUMNS)
    target = out + pairs.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=there[:, None])


@triton.jit
def _gate_up_described(
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
    """Does what `_gate_up` does, with gates and ups in one product.

    Args:
        weight: A description of `[2 * X, I, D]`.
    """
    num_columns = inner // COLUMNS
    tile = tl.program_id(0) // num_columns
    expert, first, end = _rows_of_tile(ends, tile, num_experts, EXPERTS, ROWS)
    if first >= end:
        return
    rows = first + tl.arange(0, ROWS)
    pairs = tl.load(order + tl.minimum(rows, end - 1))
    column = (tl.program_id(0) % num_columns) * COLUMNS
    channels = tl.arange(0, BLOCK)
    source = x + (pairs // CHOICES).to(tl.int64)[:, None] * WIDTH + channels[None, :]
    total = tl.zeros((ROWS, 2 * COLUMNS), dtype=tl.float32)
    for start in range(0, WIDTH, BLOCK):
        values = tl.load(source + start)
        some = weight.load([expert * 2, column, start]).reshape(2 * COLUMNS, BLOCK)
        total = tl.dot(values, some.T, total)
    gate, up = total.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1).split()
    result = gate / (1 + tl.exp(-gate)) * up
    target = out + rows.to(tl.int64)[:, None] * inner + (column + tl.arange(0, COLUMNS))[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=(rows < end)[:, None])


@triton.jit
def _down_described(
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
    """Does what `_down` does, with as many programs as run at a time.

    Each goes from tile to tile, and copies for the next one while it ends one.

    Args:
        hidden: A description of the input. Of rows after an expert's last, nothing is stored.
        weight: A description of `[X * D, I]`.
    """
    num_columns = width // COLUMNS
    experts = tl.arange(0, EXPERTS)
    inside = experts < num_experts
    expert_ends = tl.load(ends + experts, mask=inside, other=0)
    begins = tl.load(ends + experts - 1, mask=inside & (experts > 0), other=0)
    num_tiles = tl.sum(tl.cdiv(expert_ends - begins, ROWS), 0) * num_columns
    # Where there are fewer tiles than programs, some have none.
    begin, step = tl.program_id(0), tl.num_programs(0)
    for number in tl.range(begin, tl.maximum(num_tiles, begin), step, flatten=True):
        tile = number // num_columns
        expert, first, end = _rows_of_tile(ends, tile, num_experts, EXPERTS, ROWS)
        rows = first + tl.arange(0, ROWS)
        column = (number % num_columns) * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, INNER, BLOCK):
            some = weight.load([expert * width + column, start])
            total = tl.dot(hidden.load([first, start]), some.T, total)
        pairs = tl.load(order + tl.minimum(rows, end - 1))
        total *= tl.load(pair_weights + pairs)[:, None]
        columns = column + tl.arange(0, COLUMNS)
        target = out + pairs.to(tl.int64)[:, None] * width + columns[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=(rows < end)[:, None])


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
    64: Tiles(Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 4, 3)),
    16: Tiles(Tile(32, 64, 128, 4, 4), Tile(32, 128, 64, 4, 4)),
    0: Tiles(Tile(LEAST_ROWS, 64, 128, 4, 4), Tile(LEAST_ROWS, 64, 128, 4, 4)),
}
"""The tiles by the least pairs that an expert has on average: the fastest of those tried on an H200
with the matrices of the A3B model. Which of them is taken changes no byte there."""


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


def _options(tile: Tile, num_experts: int) -> dict[str, int]:
    """Returns what both products are compiled with."""
    return {
        "EXPERTS": max(triton.next_power_of_2(num_experts), LEAST_EXPERTS),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "BLOCK": tile.block,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }


@functools.cache
def has_descriptors(device: torch.device) -> bool:
    """Returns whether a device copies tiles by itself, and Triton knows how to ask for it."""
    return (
        device.type == "cuda"
        and TensorDescriptor is not None
        and torch.cuda.get_device_capability(device)[0] == HOPPER
    )


@functools.cache
def num_programs(device: torch.device) -> int:
    """Returns how many programs of the largest tiles run at a time."""
    if device.type != "cuda":
        return PROGRAMS_A_PROCESSOR
    properties = torch.cuda.get_device_properties(device)
    return PROGRAMS_A_PROCESSOR * properties.multi_processor_count


def _is_described(weight: Tensor, tile: Tile) -> bool:
    """Returns whether the device copies the tiles of a product by itself."""
    is_large = tile.rows >= DESCRIBED_ROWS and weight.itemsize == 2
    return is_large and has_descriptors(weight.device)


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
    kernel, matrix = _gate_up, weight
    if _is_described(weight, tile):
        kernel, parted = _gate_up_described, weight.view(2 * num_experts, inner, width)
        matrix = TensorDescriptor.from_tensor(parted, [2, tile.columns, tile.block])
    kernel[_grid(num_pairs, num_experts, tile, inner)](
        x_TD,
        matrix,
        hidden_PI,
        routes.order_P,
        routes.ends_X,
        num_experts,
        inner,
        CHOICES=routes.weights_TC.shape[1],
        WIDTH=width,
        **_options(tile, num_experts),
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
    kernel, source, matrix = _down, hidden_PI, weight
    grid = _grid(num_pairs, num_experts, tile, width)
    if _is_described(weight, tile):
        kernel, grid = _down_described, (num_programs(weight.device),)
        source = TensorDescriptor.from_tensor(hidden_PI, [tile.rows, tile.block])
        matrix = TensorDescriptor.from_tensor(weight.flatten(0, 1), [tile.columns, tile.block])
    kernel[grid](
        source,
        matrix,
        out_PD,
        routes.order_P,
        routes.ends_X,
        routes.weights_TC,
        num_experts,
        width,
        INNER=inner,
        **_options(tile, num_experts),
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
    for moe in filter(None, dict.fromkeys((arch.understanding_moe, arch.generation_moe))):
        for num_tokens in (*ALONE_TOKENS, MAX_SEQUENCES + 1):
            x_TD = torch.zeros(num_tokens, arch.hidden_size, dtype=dtype, device=device)
            routes = route(
                x_TD.new_zeros(num_tokens, moe.num_experts),
                choices=moe.num_experts_per_tok,
                normalise=moe.norm_topk_prob,
            )
        # No expert has a row, so that no weights are read.
        routes.ends_X.zero_()
        inner, width = moe.intermediate_size, arch.hidden_size
        gates_ups = x_TD.new_empty(moe.num_experts, 2 * inner, width)
        downs = x_TD.new_empty(moe.num_experts, width, inner)
        for tiles in TILES.values():
            hidden_PI = gate_up(x_TD, gates_ups, routes, tiles.gate_up)
            # Without rows nothing was written to them.
            parts = down(hidden_PI, downs, routes, tiles.down).zero_()
            add_parts(parts, x_TD, x_TD)
