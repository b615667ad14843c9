"""Linear layers in float8 (e4m3): a scale for each row of weights, and one for each token.

Weights are quantised once, at load; activations in every pass. Products are summed in float32.

Shape suffixes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
LEAST = 1e-12
"""What the largest number of a row counts as at least, so that a row of zeros has a scale."""


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rows as float8 and float32 scales `[rows, 1]`; their product is about `x`.

    The largest number of a row becomes the largest of float8, so a number is off by at most one
    part in 16 of itself, or by 2^-10 of the scale where it is tiny.

    Args:
        x: `[rows, columns]` in any floating point dtype.
    """
    largest = torch.maximum(-x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))
    scale = largest.float().clamp_min(LEAST) / LARGEST
    # The division may lead over the largest number by a rounding error, which the cast takes away.
    return x.to(torch.float32, copy=True).div_(scale).to(FP8), scale


class Fp8Linear(nn.Module):
    """A linear layer without bias whose weights are float8 with a scale for each output.

    Args:
        in_features: I.
        out_features: O.
        device: Of the parameters, which are not initialised.
        quantise: Returns tokens in float8; see `quantise_rows`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device,
        quantise: Callable[[Tensor], tuple[Tensor, Tensor]] = quantise_rows,
    ) -> None:
        super().__init__()
        self._quantise = quantise
        weight_OI = torch.empty(out_features, in_features, dtype=FP8, device=device)
        scale_O = torch.empty(out_features, dtype=torch.float32, device=device)
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.scale = nn.Parameter(scale_O, requires_grad=False)

    def forward(self, x_TI: Tensor) -> Tensor:
        """Returns `[T, O]` in the dtype of `x_TI`."""
        return self.multiply(*self._quantise(x_TI), x_TI.dtype)

    def multiply(self, x8_TI: Tensor, scale_T1: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns `[T, O]` from tokens that are quantised already."""
        return scaled_product(x8_TI, scale_T1, self.weight, self.scale, dtype)


def scaled_product(
    x8_TI: Tensor, scale_T1: Tensor, weight_OI: Tensor, scale_O: Tensor, dtype: torch.dtype
) -> Tensor:
    """Returns `[T, O]`, the product of quantised tokens and weights.

    On a GPU one kernel multiplies and scales, and gives bfloat16. Elsewhere the same numbers are
    multiplied in float32, for tests.
    """
    if x8_TI.device.type != "cuda":
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


def scale_of(weight: str) -> str:
    """Returns the name of the scales of a weight that is named from some module on."""
    return f"{weight.removesuffix('weight')}scale"
