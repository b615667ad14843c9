"""What a run continues with after memory ran out."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sensebatch.jobs import Precision
from sensebatch.plan.fallback import leaner
from sensebatch.plan.host import PROGRAM_BYTES
from sensebatch.plan.passes import RING
from sensebatch.plan.weight_bytes import weight_bytes
from sensebatch.units import GIB
from tests.plan.loads import (
    COMPUTATION,
    FP8,
    make_load,
    make_story,
    place_all,
)


def test_what_one_group_gives_up_no_other_keeps() -> None:
    dot, story = make_load(), make_story(2)
    placed = place_all([dot, story], vram_budget_bytes=24 * GIB)
    before = [placed.of(load.group).num_buffers for load in (dot, story)]
    less = leaner(COMPUTATION, placed, story.group)
    assert less is not None
    after = [less.of(load.group).num_buffers for load in (dot, story)]
    assert after == [before[0] - (before[1] - after[1]), max(before[1] // 2, RING)]
    # Nor does a group that was not planned for.
    assert less.leanest.num_buffers == after[1]
    while less.of(story.group).num_buffers > RING:
        less = leaner(COMPUTATION, less, story.group)
    alone = leaner(COMPUTATION, less, story.group)
    assert (alone.of(story.group).mode, alone.of(story.group).tokens_per_pass) == ("low", 1)
    assert alone.of(dot.group) == less.of(dot.group)
    assert leaner(COMPUTATION, alone, story.group) is None


def test_all_weights_are_given_up_by_every_group_and_the_host_budget_holds() -> None:
    dot, story = make_load(), make_story(1)
    placed = place_all([dot, story], device_free=80 * GIB, host_budget_bytes=20 * GIB)
    assert placed.of(dot.group).num_buffers is None
    less = leaner(COMPUTATION, placed, dot.group)
    assert all(less.of(load.group).num_buffers for load in (dot, story))
    kept = less.of(dot.group).host_block_bytes + weight_bytes(COMPUTATION).embeddings
    assert 15 * GIB < kept + PROGRAM_BYTES <= 20 * GIB
    assert 15 * GIB < less.of(dot.group).host_bytes <= 20 * GIB


@settings(max_examples=25)
@given(budget=st.integers(int(2.5 * GIB), 40 * GIB))
def test_a_budget_is_never_exceeded_with_float8(budget: int) -> None:
    chosen = place_all(vram_budget_bytes=budget, precision=Precision.FP8).leanest
    assert chosen.device_bytes <= budget
    placed, group = place_all(vram_budget_bytes=budget, precision=Precision.FP8), make_load().group
    while (after := leaner(FP8, placed, group)) is not None:
        assert after.of(group).device_bytes <= placed.of(group).device_bytes
        placed = after
    assert placed.of(group).num_buffers == RING
