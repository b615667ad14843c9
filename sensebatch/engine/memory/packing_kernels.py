"""Unpacks blocks on a GPU, as fast as its memory allows. Needs Triton.

See `packing` for what is unpacked.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sensebatch.engine.memory.packing import split_exceptions

BLOCK = 4096
"""Numbers of a program; even."""


@triton.jit(do_not_specialize=["base", "count"])
def _unpack(low, pairs, out, base, count, BLOCK: tl.constexpr):
    half: tl.constexpr = BLOCK // 2
    start = tl.program_id(0) * BLOCK
    places = start + tl.arange(0, BLOCK)
    of_pair = start // 2 + tl.arange(0, half)
    there = places < count
    byte = tl.load(low + places, mask=there, other=0).to(tl.int32)
    pair = tl.load(pairs + of_pair, mask=of_pair * 2 < count, other=0).to(tl.int32)
    code = tl.interleave(pair & 15, pair >> 4)
    value = ((byte & 0x80) << 8) | ((code + base) << 7) | (byte & 0x7F)
    tl.store(out + places, value.to(tl.int16), mask=there)


@triton.jit(do_not_specialize=["count"])
def _restore(indices, values, out, count, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = places < count
    index = tl.load(indices + places, mask=there, other=0)
    tl.store(out + index, tl.load(values + places, mask=there, other=0), mask=there)


def unpack_chunk(flat: Tensor, numbers: Tensor, base: int) -> None:
    """Writes the numbers of a packed chunk into int16 `numbers`."""
    count = numbers.numel()
    _unpack[(triton.cdiv(count, BLOCK),)](
        flat, flat[count:], numbers, base, count, BLOCK=BLOCK, num_warps=8
    )


def restore_exceptions(flat: Tensor, numbers: Tensor) -> None:
    """Writes exceptions into the int16 `numbers` of their block."""
    places, values = split_exceptions(flat)
    if places.numel():
        _restore[(triton.cdiv(places.numel(), BLOCK),)](
            places, values, numbers, places.numel(), BLOCK=BLOCK, num_warps=4
        )
