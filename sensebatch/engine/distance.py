"""How far two images are from each other. Numbers only."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional

MAX_PSNR_DB = 99.0
"""PSNR of equal images, which have no distance to take a logarithm of."""


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio of two uint8 images of one shape, in dB."""
    error = np.square(first.astype(np.float64) - second).mean()
    return MAX_PSNR_DB if error == 0 else min(10 * math.log10(255**2 / error), MAX_PSNR_DB)


def ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the mean structural similarity of two images, at most 1.

    Args:
        first: uint8 `[height, width, 3]`, at least 11 pixels along each side.
        second: Likewise.

    Source: Wang et al., Image Quality Assessment, 2004: a Gaussian window of 11 pixels with a
    standard deviation of 1.5, on each channel; only windows inside the image count.
    """
    x, y = (
        torch.from_numpy(image.astype(np.float64)).permute(2, 0, 1)[:, None]
        for image in (first, second)
    )
    line = torch.exp(-(torch.arange(-5, 6).double() ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def smooth(values: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(values, window)

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((similar / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())
