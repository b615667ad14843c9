"""How far two images are from each other. Numbers only."""

from __future__ import annotations

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

MAX_PSNR_DB = 99.0
"""PSNR of equal images, which have no distance to take a logarithm of."""
_WINDOW, _SPREAD = 11, 1.5


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
    x, y = first.astype(np.float64), second.astype(np.float64)
    mean_x, mean_y = _smooth(x), _smooth(y)
    var_x, var_y = _smooth(x * x) - mean_x**2, _smooth(y * y) - mean_y**2
    covariance = _smooth(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((similar / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def _smooth(values: np.ndarray) -> np.ndarray:
    """Returns means of `[height, width, channels]` under the window, row by row and column by
    column, since the window is a product of the two."""
    places = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(places**2) / (2 * _SPREAD**2))
    weights /= weights.sum()
    rows = sliding_window_view(values, _WINDOW, axis=0) @ weights
    means: np.ndarray = sliding_window_view(rows, _WINDOW, axis=1) @ weights
    return means
