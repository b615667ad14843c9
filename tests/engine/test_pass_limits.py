"""How much goes through the network at a time is what the placement says."""

from __future__ import annotations

import pytest

from sensebatch.engine.model.kv_cache import KVCache
from sensebatch.engine.runner import Runner
from tests.engine.test_engine import generate, load, make_config, make_job


@pytest.mark.parametrize(("mode", "passes"), [("full", 1), ("balanced", 1), ("low", 2)])
def test_low_draws_the_pictures_of_a_batch_one_by_one(mode: str, passes: int) -> None:
    result = generate(load(make_config(vram_mode=mode)), make_job("a"), make_job("bb"))
    assert result.metrics.num_denoise_steps == 2 * passes


@pytest.mark.parametrize(("mode", "parks"), [("full", False), ("fast", True), ("low", True)])
def test_prefixes_wait_in_host_memory_where_weights_do(
    monkeypatch: pytest.MonkeyPatch, mode: str, parks: bool
) -> None:
    moved = []
    # What is brought is there already where the host is the device.
    monkeypatch.setattr(Runner, "bring", lambda *_: None)
    monkeypatch.setattr(KVCache, "move", lambda _, device: moved.append(device))
    generate(load(make_config(vram_mode=mode)), make_job("a"))
    assert bool(moved) == parks
