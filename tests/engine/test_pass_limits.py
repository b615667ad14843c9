"""How much goes through the network at a time is what the placement says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sensebatch.engine.runner import PassLimits
from sensebatch.plan import passes
from sensebatch.resolutions import Resolution
from tests.engine.test_engine import generate, load, make_config, make_job, pixels

pytestmark = pytest.mark.slow

NUM_TOKENS = make_job("a").resolution.image_tokens


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images in a part, and four in a pass but under `low`."""
    monkeypatch.setattr(passes, "ROWS", 2 * NUM_TOKENS)
    monkeypatch.setattr(passes, "LOW_TOKENS_PER_PASS", 2 * NUM_TOKENS)
    monkeypatch.setattr(passes, "TOKENS_PER_PASS", 5 * NUM_TOKENS)


@pytest.mark.parametrize(("mode", "passes"), [("full", 1), ("balanced", 1), ("low", 2)])
def test_low_draws_as_many_images_in_a_pass_as_share_a_part(mode: str, passes: int) -> None:
    result = generate(load(make_config(vram_mode=mode)), *map(make_job, ("a", "bb", "ccc", "dddd")))
    assert result.metrics.num_denoise_steps == 2 * passes


@pytest.mark.parametrize(
    ("sampling", "interval"), [({"cfg_scale": 1.0}, (0.0, 1.0)), ({"cfg_scale": 4.0}, (0.3, 1.0))]
)
@pytest.mark.parametrize("num_jobs", [2, 3, 5, 7])
def test_images_are_the_same_bytes_however_many_share_a_pass(
    sampling: dict[str, Any], interval: tuple[float, float], num_jobs: int
) -> None:
    """Products of matrices of another size would round otherwise, so that a level would change."""
    first = make_job("a")
    settings = replace(first.sampling, **sampling, cfg_interval=interval)
    jobs = [make_job("a" * (1 + index), sampling=settings) for index in range(num_jobs)]
    expected = pixels(generate(load(make_config(vram_mode="full")), *jobs))
    assert pixels(generate(load(make_config(vram_mode="low")), *jobs)) == expected
    assert len(set(expected)) == num_jobs


def test_images_are_the_same_bytes_where_guidance_rests_for_some() -> None:
    first = make_job("a")
    intervals = [(0.0, 1.0), (0.3, 1.0), (0.3, 1.0), (0.0, 1.0), (0.0, 1.0), (0.0, 0.3), (0.0, 1.0)]
    jobs = [
        make_job(
            "a" * (1 + index),
            sampling=replace(first.sampling, cfg_scale=4.0, cfg_interval=interval),
        )
        for index, interval in enumerate(intervals)
    ]
    expected = pixels(generate(load(make_config(vram_mode="full")), *jobs))
    assert pixels(generate(load(make_config(vram_mode="low")), *jobs)) == expected


@pytest.mark.parametrize(
    ("images", "parts"),
    [
        ([0, 0, 1, 1, 2, 2, 3, 3, 4, 4], [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]),
        ([0, 1, 1, 2, 2, 3], [(0, 2), (2, 3), (3, 5), (5, 6)]),
        ([0, 0, 0, 1, 2], [(0, 2), (2, 4), (4, 5)]),
        ([0], [(0, 1)]),
    ],
)
def test_images_that_fill_a_part_keep_their_evaluations_to_themselves(
    images: list[int], parts: list[tuple[int, int]]
) -> None:
    """Two images of `NUM_TOKENS` fill a part."""
    assert passes.evaluation_parts(images, NUM_TOKENS) == [slice(*part) for part in parts]


@pytest.mark.parametrize(
    ("image_tokens", "limit", "images"),
    [
        (1, 1, 1),
        (1, 5, 5),
        (1, 12, 12),
        (1, 13, 12),
        (6, 30, 4),
        (6, 11, 1),
        (7, 30, 4),
        (50, 1, 1),
    ],
)
def test_a_pass_is_whole_parts_or_less_than_one(image_tokens: int, limit: int, images: int) -> None:
    size = Resolution(height=32, width=32 * image_tokens)
    assert PassLimits(image_tokens=limit).together(size) == images


@pytest.mark.parametrize(
    ("mode", "names", "waits"),
    [("full", "abc", False), ("fast", "abc", False), ("low", "ab", False), ("low", "abc", True)],
)
def test_prefixes_wait_in_host_memory_where_a_batch_is_more_than_one_pass(
    mode: str, names: str, waits: bool
) -> None:
    engine = load(make_config(vram_mode=mode))
    generate(engine, *(make_job(name) for name in names))
    assert (engine._pages.num_made > 0) == waits
