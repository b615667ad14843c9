"""Distances of images against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from sensebatch.report.distance import MAX_PSNR_DB, psnr, ssim


def _flat(value: int) -> np.ndarray:
    return np.full((16, 20, 3), value, dtype=np.uint8)


def _noisy(spread: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return (128 + rng.integers(-spread, spread + 1, (32, 32, 3))).astype(np.uint8)


def test_one_level_of_difference_everywhere_is_48_db() -> None:
    assert psnr(_flat(7), _flat(8)) == psnr(_flat(8), _flat(7)) == pytest.approx(48.1308, abs=1e-4)


def test_the_psnr_of_equal_images_has_a_bound() -> None:
    assert psnr(_flat(3), _flat(3)) == MAX_PSNR_DB


def test_the_similarity_of_flat_images_follows_from_their_means() -> None:
    c1 = (0.01 * 255) ** 2
    expected = (2 * 50 * 100 + c1) / (50**2 + 100**2 + c1)
    assert ssim(_flat(50), _flat(100)) == pytest.approx(expected, abs=1e-9)


def test_the_similarity_of_equal_images_is_1_and_falls_with_noise() -> None:
    assert ssim(_noisy(9), _noisy(9)) == pytest.approx(1, abs=1e-12)
    falling = [ssim(_flat(128)[:16, :16], _noisy(spread)[:16, :16]) for spread in (1, 3, 9)]
    assert falling == sorted(falling, reverse=True)


def test_structure_counts_and_not_only_the_mean() -> None:
    image = _noisy(60)
    shifted = np.roll(image, 3, axis=0)
    assert ssim(image, shifted) < 0.2 < ssim(image, np.clip(image + 2, 0, 255).astype(np.uint8))
