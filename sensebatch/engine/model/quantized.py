"""Linear layers in float8 (e4m3), with a scale for each row of weights and for each token.

Weights are quantised once, at load, and activations in every pass. Products are summed in float32.

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
"""Lower bound of a row's largest number, so that a row of zeros has a scale."""


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rows in float8 and their float32 scales `[rows, 1]`; the product is about `x`.

    The largest number of a row becomes the largest of float8. The error of a number is at most one
    part in 16 of it, or 2^-10 of the scale if it is tiny.

    Args:
        x: `[rows, columns]` in any floating point dtype.
    """
    largest = torch.maximum(-x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))
    scale = largest.float().clamp_min(LEAST) / LARGEST
    # A rounding error of the division may exceed the largest number; the cast clamps it.
    return x.to(torch.float32, copy=True).div_(scale).to(FP8), scale


class Fp8Linear(nn.Module):
    """A linear layer without bias whose weights are float8 with a scale for each output.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        device: Device of the parameters, which are not initialised.
        quantise: Returns tokens in float8, as `quantise_rows` does.
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
        """Returns the layer's output `[T, O]` in the dtype of `x_TI`."""
        return self.multiply(*self._quantise(x_TI), x_TI.dtype)

    def multiply(self, x8_TI: Tensor, scale_T1: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the layer's output `[T, O]` for tokens that are already quantised."""
        return scaled_product(x8_TI, scale_T1, self.weight, self.scale, dtype)


def scaled_product(
    x8_TI: Tensor, scale_T1: Tensor, weight_OI: Tensor, scale_O: Tensor, dtype: torch.dtype
) -> Tensor:
    """Returns the product of quantised tokens and weights, `[T, O]`.

    On a GPU one kernel multiplies and scales, and returns bfloat16. Elsewhere the same numbers are
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
    """Returns the name of the scales that belong to a weight's name."""
    return f"{weight.removesuffix('weight')}scale"
