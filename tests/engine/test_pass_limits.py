"""How much goes through the network at a time is what the placement says."""

from __future__ import annotations

import pytest

from tests.engine.test_engine import generate, load, make_config, make_job


@pytest.mark.parametrize(("mode", "passes"), [("full", 1), ("balanced", 1), ("low", 2)])
def test_low_draws_the_pictures_of_a_batch_one_by_one(mode: str, passes: int) -> None:
    result = generate(load(make_config(vram_mode=mode)), make_job("a"), make_job("bb"))
    assert result.metrics.num_denoise_steps == 2 * passes


@pytest.mark.parametrize(
    ("mode", "names", "waits"),
    [("full", "ab", False), ("fast", "ab", False), ("low", "a", False), ("low", "ab", True)],
)
def test_prefixes_wait_in_host_memory_where_a_batch_is_more_than_one_pass(
    mode: str, names: str, waits: bool
) -> None:
    engine = load(make_config(vram_mode=mode))
    generate(engine, *(make_job(name) for name in names))
    assert (engine._pages.num_made > 0) == waits
