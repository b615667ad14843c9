"""Linear layers of 8-bit numbers, with a scale for each row of weights and for each token.

Weights are quantised once, at load, and activations in every pass. A row of `NUMBERS` says what
the numbers are and how they are multiplied: float8 (e4m3) is summed in float32, int8 in int32,
which makes no rounding errors.

Shape suffixes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sensebatch.jobs import Stored

if TYPE_CHECKING:
    from sensebatch.engine.model.operations import Operations

LEAST = 1e-12
"""Lower bound of a row's largest number, so that a row of zeros has a scale."""
EXACT_COLUMNS = 1024
"""So many products of two int8 numbers have a sum below 2^24, which float32 has exactly."""
LEAST_ROWS = 32
"""Rows that torch's int8 product is given at least: it refuses 16 and fewer."""
PLAIN_ROWS = 1024
"""Rows that it is given at a time, so that its sums take no more memory than quantising did."""

Quantised = tuple[Tensor, Tensor]
"""Rows of 8-bit numbers and their float32 scales `[rows, 1]`; the product is about the rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """8-bit numbers that matrices and tokens are quantised to."""

    dtype: torch.dtype
    largest: float
    """What the largest number of a row becomes."""
    rounded: Callable[[Tensor], Tensor]
    """Returns float32 numbers of at most `largest` in the dtype. May overwrite them."""
    product: Callable[[Quantised, Tensor, Tensor, torch.dtype], Tensor]
    """Returns quantised tokens by quantised weights `[O, I]` with their scales `[O]`, as `[T, O]`
    in a dtype, with torch's operations."""


def _float8_product(
    tokens: Quantised, weight_OI: Tensor, scale_O: Tensor, dtype: torch.dtype
) -> Tensor:
    """On a GPU one kernel multiplies and scales, and returns bfloat16."""
    x8_TI, scale_T1 = tokens
    if x8_TI.device.type != "cuda":
        # The same numbers in float32, for tests.
        product_TO = F.linear(x8_TI.float(), weight_OI.float())
        return (product_TO * scale_T1 * scale_O).to(dtype)
    return torch._scaled_mm(
        x8_TI,
        weight_OI.t(),
        scale_a=scale_T1,
        scale_b=scale_O[None],
        out_dtype=dtype,
        use_fast_accum=True,
    )


def _int8_product(
    tokens: Quantised, weight_OI: Tensor, scale_O: Tensor, dtype: torch.dtype
) -> Tensor:
    """The sums are exact, so they are the same on every device and for any number of rows."""
    x8_TI, scale_T1 = tokens
    out_TO = torch.empty(x8_TI.shape[0], weight_OI.shape[0], dtype=dtype, device=x8_TI.device)
    for start in range(0, x8_TI.shape[0], PLAIN_ROWS):
        rows = slice(start, start + PLAIN_ROWS)
        sums_TO = _int8_sums(x8_TI[rows], weight_OI).float()
        out_TO[rows] = sums_TO.mul_(scale_T1[rows]).mul_(scale_O)
    return out_TO


def _int8_sums(x8_TI: Tensor, weight_OI: Tensor) -> Tensor:
    if x8_TI.device.type != "cuda":
        # Not torch's int8 product, whose sums of two saturate on some processors.
        sums_TO = torch.zeros(x8_TI.shape[0], weight_OI.shape[0], dtype=torch.int32)
        for x, weight in zip(
            x8_TI.split(EXACT_COLUMNS, 1), weight_OI.split(EXACT_COLUMNS, 1), strict=True
        ):
            sums_TO += F.linear(x.float(), weight.float()).to(torch.int32)
        return sums_TO
    missing = max(LEAST_ROWS - x8_TI.shape[0], 0)
    return torch._int_mm(F.pad(x8_TI, (0, 0, 0, missing)), weight_OI.t())[: x8_TI.shape[0]]


NUMBERS = {
    Stored.FLOAT8: Numbers(
        dtype=torch.float8_e4m3fn,
        largest=torch.finfo(torch.float8_e4m3fn).max,
        # A rounding error of the division may exceed the largest number; the cast clamps it.
        rounded=lambda x: x.to(torch.float8_e4m3fn),
        product=_float8_product,
    ),
    Stored.INT8: Numbers(
        dtype=torch.int8,
        largest=127.0,
        rounded=lambda x: x.round_().to(torch.int8),
        product=_int8_product,
    ),
}
BY_DTYPE = {numbers.dtype: numbers for numbers in NUMBERS.values()}


def quantise_rows(x: Tensor, numbers: Numbers) -> Quantised:
    """Returns rows quantised with the largest number of each as its scale.

    The error of a number is at most one part in 16 of it in float8 (or 2^-10 of the scale if it is
    tiny), and half the scale in int8.

    Args:
        x: `[rows, columns]` in any floating point dtype.
        numbers: What it is quantised to.
    """
    # First, because processors find the largest number of float32 several times as fast.
    values = x.to(torch.float32, copy=True)
    largest = torch.maximum(-values.amin(-1, keepdim=True), values.amax(-1, keepdim=True))
    scale = largest.clamp_min(LEAST) / numbers.largest
    return numbers.rounded(values.div_(scale)), scale


class QuantisedLinear(nn.Module):
    """A linear layer without bias whose weights are 8-bit numbers with a scale for each output.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        numbers: What weights and tokens are quantised to.
        device: Device of the parameters, which are not initialised.
        operations: Quantise tokens and multiply.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        numbers: Numbers,
        device: torch.device,
        operations: Operations,
    ) -> None:
        super().__init__()
        self.numbers = numbers
        self._operations = operations
        weight_OI = torch.empty(out_features, in_features, dtype=numbers.dtype, device=device)
        scale_O = torch.empty(out_features, dtype=torch.float32, device=device)
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.scale = nn.Parameter(scale_O, requires_grad=False)

    def forward(self, x_TI: Tensor) -> Tensor:
        """Returns the layer's output `[T, O]` in the dtype of `x_TI`."""
        return self.multiply(self._operations.quantise(x_TI, self.numbers), x_TI.dtype)

    def multiply(self, tokens: Quantised, dtype: torch.dtype) -> Tensor:
        """Returns the layer's output `[T, O]` for tokens that are already quantised."""
        return self._operations.scaled_product(tokens, self.weight, self.scale, dtype)

    def add_to(self, residual_TO: Tensor, tokens: Quantised, *, in_place: bool) -> Tensor:
        """Returns the sum of `residual_TO` and the layer's output, perhaps in its memory."""
        if not in_place:
            return residual_TO + self.multiply(tokens, residual_TO.dtype)
        return self._operations.scaled_product(
            tokens, self.weight, self.scale, residual_TO.dtype, residual_TO
        )

    def add_product(self, residual_TO: Tensor, x_TI: Tensor, *, in_place: bool) -> Tensor:
        """Returns `add_to` of tokens that are not quantised yet."""
        tokens = self._operations.quantise(x_TI, self.numbers)
        return self.add_to(residual_TO, tokens, in_place=in_place)


def scale_of(weight: str) -> str:
    """Returns the name of the scales that belong to a weight's name."""
    return f"{weight.removesuffix('weight')}scale"
