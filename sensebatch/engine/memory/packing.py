"""bfloat16 weights in three quarters of their bytes, without a loss, for the way to the device.

Weights are small numbers of about one size, so nearly all of their exponents are among 15 that
follow one another. A packed block has sign and mantissa of each number in a byte, and the exponents
of two numbers in another one. The few numbers with other exponents are exceptions, which are listed
with their places. Chunks lie one after the other, so that one can be unpacked while the next one
arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sensebatch.plan import passes
from sensebatch.plan.passes import packed_chunk_bytes

CODES = 15
"""Exponents that have a code; 0 stands for none of them."""
GRAIN = 4
"""The bytes of a block are a multiple of this."""
SAMPLE = 101
"""One number in so many says which exponents have codes."""
EXCEPTION_BYTES = 6
"""An exception: its place as int32, then the number."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Packed:
    """A packed block."""

    flat: Tensor
    """uint8: of each chunk the low bytes, then the codes."""
    exceptions: Tensor
    """uint8: the places of numbers without a code, then these numbers."""
    base: int
    """What is added to a code to get its exponent."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.flat.nbytes + self.exceptions.nbytes

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields the first number of each chunk, and the chunk's bytes."""
        most = packed_chunk_bytes(passes.PACKING_CHUNK)
        for start in range(0, self.flat.numel(), most):
            yield start // 3 * 2, self.flat[start : start + most]


def split_exceptions(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Returns places (int32) and numbers (int16) of exceptions as views of their bytes."""
    count = flat.numel() // EXCEPTION_BYTES
    return flat[: 4 * count].view(torch.int32), flat[4 * count :].view(torch.int16)


def pack(raw: Tensor, device: torch.device, new: Callable[[int], Tensor]) -> Packed | None:
    """Returns a block packed; None if that is not worth while.

    Args:
        raw: uint8, the bytes of bfloat16 numbers.
        device: Where it is computed, a chunk at a time.
        new: Returns host memory for so many bytes.
    """
    if raw.numel() % GRAIN:
        return None
    numbers = raw.view(torch.int16)
    base = _best_base(numbers[::SAMPLE].to(device))
    packed = Packed(flat=new(packed_chunk_bytes(numbers.numel())), exceptions=raw[:0], base=base)
    places, values, num_exceptions = [], [], 0
    for first, target in packed.chunks():
        chunk = numbers[first : first + target.numel() // 3 * 2].to(device)
        code = ((chunk >> 7) & 0xFF).sub_(base)
        is_coded = (code >= 1) & (code <= CODES)
        code = code.mul_(is_coded).to(torch.uint8)
        count = chunk.numel()
        target[:count] = (((chunk >> 8) & 0x80) | (chunk & 0x7F)).to(torch.uint8)
        target[count:] = code[::2] | (code[1::2] << 4)
        found = is_coded.logical_not_().nonzero().flatten()
        places.append((found + first).to(torch.int32).cpu())
        values.append(chunk[found].cpu())
        num_exceptions += found.numel()
        if num_exceptions * EXCEPTION_BYTES > passes.MAX_EXCEPTION_BYTES:
            return None
    exceptions = new(num_exceptions * EXCEPTION_BYTES) if num_exceptions else raw[:0].clone()
    for part, found_parts in zip(split_exceptions(exceptions), (places, values), strict=True):
        part.copy_(torch.cat(found_parts))
    return Packed(flat=packed.flat, exceptions=exceptions, base=base)


def unpack(packed: Packed, target: Tensor) -> None:
    """Writes the bytes of a packed block into `target`, with torch's operations."""
    numbers = target.view(torch.int16)
    for first, flat in packed.chunks():
        count = flat.numel() // 3 * 2
        low, pairs = flat[:count].to(torch.int32), flat[count:].to(torch.int32)
        code = torch.stack((pairs & 15, pairs >> 4), 1).flatten()
        value = ((low & 0x80) << 8) | ((code + packed.base) << 7) | (low & 0x7F)
        numbers[first : first + count] = value.to(torch.int16)
    places, values = split_exceptions(packed.exceptions)
    numbers[places.to(torch.int64)] = values


def _best_base(sample: Tensor) -> int:
    """Returns the base with which most exponents of a sample have codes."""
    counts = torch.bincount(((sample >> 7) & 0xFF).to(torch.int64), minlength=256)
    sums = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    covered = sums[CODES:] - sums[:-CODES]
    return int(covered.argmax()) - 1
