"""Text attends run by run: what a run computes does not depend on how long text is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sensebatch.engine.model import attention
from sensebatch.engine.model.attention import (
    Attention,
    Segment,
    attend_each,
    attend_without_mask,
    runs_of,
    sdpa,
)
from sensebatch.plan.footprint import WORKSPACE_BYTES
from sensebatch.plan.passes import RUN_SCORES
from tests.engine.memory.tracker import LiveBytes
from tests.golden_data import relative_error

HEADS, KV_HEADS, DIM = 4, 2, 16
MASK_BYTES = 1 + 4
"""Bytes a score of a mask takes: a bool, and the number torch's kernel makes of it."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def attend(num_cached: int, segments: list[Segment], attend_run: Attention = sdpa) -> torch.Tensor:
    new = segments[-1][1]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(new, HEADS, DIM, generator=generator)
    k, v = (torch.randn(num_cached + new, KV_HEADS, DIM, generator=generator) for _ in range(2))
    out = torch.full_like(q, float("nan"))
    attend_each(attend_run, q, k, v, runs_of(segments, num_cached), out)
    return out


@pytest.mark.parametrize("attend_run", [sdpa, attend_without_mask])
@pytest.mark.parametrize("num_cached", [0, 1, 37])
@pytest.mark.parametrize("scores", [1, 100, 1000])
def test_long_text_in_runs_is_what_it_is_at_once(
    monkeypatch: pytest.MonkeyPatch, attend_run: Attention, num_cached: int, scores: int
) -> None:
    segments = [(0, 5, False), (5, 21, True), (21, 90, False)]
    expected = attend(num_cached, segments, attend_run)
    monkeypatch.setattr(attention, "RUN_SCORES", scores)
    assert relative_error(attend(num_cached, segments, attend_run), expected) < 1e-6


def test_every_run_has_as_many_scores_as_it_may_and_images_stay_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "RUN_SCORES", 1000)
    runs: list[tuple[int, int, bool]] = []

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        runs.append((q.shape[0], k.shape[0], causal))
        return sdpa(q, k, v, causal)

    attend(10, [(0, 40, True), (40, 90, False)], watched)
    assert runs[0] == (40, 50, False)
    assert runs[1:] == [(10, keys, True) for keys in range(60, 101, 10)]


@pytest.mark.parametrize("num_cached", [0, 10])
def test_a_long_prompt_takes_no_more_than_a_plan_leaves_for_a_mask(num_cached: int) -> None:
    tokens = 8192
    with LiveBytes() as live:
        out = attend(num_cached, [(0, tokens, False)])
        inputs = (HEADS + 2 * KV_HEADS) * DIM * (tokens + num_cached) * 4
        held = inputs + out.nbytes
    # A mask for all scores would take four times as much.
    assert tokens**2 >= 4 * RUN_SCORES
    assert live.peak - held <= MASK_BYTES * RUN_SCORES + out.nbytes
    assert MASK_BYTES * RUN_SCORES <= WORKSPACE_BYTES


def test_prompts_of_ordinary_length_are_one_run() -> None:
    """Cut in two, they might end in other bytes than before."""
    calls: list[Any] = []

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        calls.append(q.shape[0])
        return sdpa(q, k, v, causal)

    attend(1096, [(0, 3000, False)], watched)
    assert calls == [3000]
