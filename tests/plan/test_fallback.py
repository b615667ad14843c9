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
    make_interleave,
    make_load,
    place_all,
)


def test_memory_that_one_group_gives_up_is_given_up_by_all() -> None:
    short, long = make_load(), make_interleave(2)
    placed = place_all([short, long], vram_budget_bytes=24 * GIB)
    before = [placed.of(load.group).num_buffers for load in (short, long)]
    less = leaner(COMPUTATION, placed, long.group)
    assert less is not None
    after = [less.of(load.group).num_buffers for load in (short, long)]
    assert after == [before[0] - (before[1] - after[1]), max(before[1] // 2, RING)]
    # Nor does a group that was not planned for.
    assert less.leanest.num_buffers == after[1]
    while less.of(long.group).num_buffers > RING:
        less = leaner(COMPUTATION, less, long.group)
    alone = leaner(COMPUTATION, less, long.group)
    assert (alone.of(long.group).mode, alone.of(long.group).tokens_per_pass) == ("low", 1)
    assert alone.of(short.group) == less.of(short.group)
    assert leaner(COMPUTATION, alone, long.group) is None


def test_streaming_starts_for_all_groups_within_the_host_budget() -> None:
    short, long = make_load(), make_interleave(1)
    placed = place_all([short, long], device_free=80 * GIB, host_budget_bytes=20 * GIB)
    assert placed.of(short.group).num_buffers is None
    less = leaner(COMPUTATION, placed, short.group)
    assert all(less.of(load.group).num_buffers for load in (short, long))
    kept = less.of(short.group).host_block_bytes + weight_bytes(COMPUTATION).embeddings
    assert 15 * GIB < kept + PROGRAM_BYTES <= 20 * GIB
    assert 15 * GIB < less.of(short.group).host_bytes <= 20 * GIB


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
