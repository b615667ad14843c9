"""What the caches of a batch reserve, holes between them included, as torch's allocator does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from sensebatch.checkpoint.architecture import OFFICIAL_8B, parse_architecture
from sensebatch.engine import decoding
from sensebatch.engine.decoding import end_text
from sensebatch.engine.model.kv_cache import KVCache, SharedRoom, Span, UnderstandingContext
from sensebatch.plan.computation import Computation
from sensebatch.plan.footprint import text_bytes
from sensebatch.plan.load import interleave_tokens
from sensebatch.plan.passes import MAX_PREFILL_TOKENS
from sensebatch.resolutions import Resolution
from sensebatch.tasks import Task
from tests.engine.memory.allocator import ReservedBytes
from tests.engine.memory.test_estimates import LEAST, MOST, make_load

pytestmark = pytest.mark.slow

PROMPT, TEXT, IMAGE = 300, 300, 2304
NUM_IMAGES, NUM_LAYERS = 6, 42


def new_cache() -> KVCache:
    """Returns a cache of the 8B model's, without memory."""
    return KVCache(
        num_layers=NUM_LAYERS,
        num_kv_heads=8,
        head_dim=128,
        dtype=torch.bfloat16,
        device=torch.device("meta"),
    )


def add(caches: Sequence[KVCache], num_tokens: int) -> None:
    """Adds tokens to caches, as many in a pass as there may be."""
    together = max(MAX_PREFILL_TOKENS // num_tokens, 1)
    for start in range(0, len(caches), together):
        spans = [Span(cache=c, num_tokens=num_tokens) for c in caches[start : start + together]]
        UnderstandingContext(spans, Mock())
        for span in spans:
            span.cache.advance(num_tokens, 0)


def story_bytes(live: ReservedBytes, num_jobs: int) -> int:
    """Returns the bytes of the caches when the last images of interleave jobs are drawn.

    Args:
        live: Counts what they take on the way.
        num_jobs: In the batch; each has a cache that text and images are added to, and another one
            for images alone.
    """
    conds, others = ([new_cache() for _ in range(num_jobs)] for _ in range(2))
    add([cache for pair in zip(conds, others, strict=True) for cache in pair], PROMPT)
    for number in range(1, NUM_IMAGES + 1):
        SharedRoom(conds, TEXT)
        for cond in conds:
            cond.advance(TEXT, 0)
        growing = [cache for pair in zip(conds, others, strict=True) for cache in pair]
        add(growing, 1)
        follows = number < NUM_IMAGES
        end_text(Mock(), conds, IMAGE + 1 if follows else 0)
        if follows:
            add(growing, IMAGE + 1)
    return live.now


@pytest.mark.parametrize("num_jobs", [1, 2, 4, 7])
def test_caches_that_grow_together_leave_few_holes(
    monkeypatch: pytest.MonkeyPatch, num_jobs: int
) -> None:
    """Growing one by one they reserve 1.15 of what they hold with four jobs, 1.37 with seven."""
    monkeypatch.setattr(decoding, "_operations_for", lambda *_: object())
    with ReservedBytes() as live:
        held = story_bytes(live, num_jobs)
    assert held <= live.reserved <= 1.10 * held
    size = Resolution(height=1152, width=2048)
    load = replace(
        make_load(Task.INTERLEAVE, size, num_jobs, PROMPT),
        text_tokens=NUM_IMAGES * TEXT,
        drawn_tokens=interleave_tokens(IMAGE, NUM_IMAGES),
    )
    computation = Computation(arch=parse_architecture(OFFICIAL_8B), item_bytes=2, fused=True)
    assert LEAST <= text_bytes(computation, load, parked=False) / live.reserved <= MOST
