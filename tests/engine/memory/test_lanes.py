"""Lanes of a GPU take streams of which torch has few."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from sensebatch.engine import graphs
from sensebatch.engine.memory import lanes

NUM_STREAMS = 32
"""Torch's, which it hands out in turn."""
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def _streams_in_turn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    caches = (lanes._streams, graphs._recording_stream)
    for cache in caches:
        cache.cache_clear()
    numbers = itertools.cycle(range(NUM_STREAMS))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: next(numbers))
    yield
    for cache in caches:
        cache.cache_clear()


def test_no_lane_copies_in_the_stream_that_graphs_are_recorded_in() -> None:
    first = lanes.CudaLane(DEVICE)
    recording = graphs._recording_stream(DEVICE)
    # One for each time that weights are loaded.
    for _ in range(NUM_STREAMS):
        lane = lanes.CudaLane(DEVICE)
        assert len({recording, lane._stream, lane._unpacking}) == 3
        assert lane._stream == first._stream
