from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensebatch.export.ledger import Shard
from sensebatch.export.shards import Limits, Row, ShardPlan, plan_shards

LIMITS = Limits(num_bytes=1000, num_images=30, num_rows=20)


def row(number: int, num_bytes: int = 10, split: str = "train") -> Row:
    return Row(
        task="t2i",
        split=split,
        digest=f"{number:032x}",
        num_bytes=num_bytes,
        num_images=1,
        place=number,
    )


def done(plan: ShardPlan) -> list[Shard]:
    """Returns the shards that a plan leaves, as they are when it was carried out."""
    written = [replace(shard, files={shard.stem: 1}) for shard, _ in plan.written]
    return [*plan.kept, *written]


def digests(shards: list[Shard]) -> list[str]:
    return [digest for shard in shards for digest in shard.rows]


rows_of_any_size = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 1500), st.sampled_from(["train", "test"])),
    unique_by=lambda drawn: drawn[0],
).map(lambda drawn: [row(*values) for values in drawn])


@given(rows_of_any_size, rows_of_any_size)
def test_shards_hold_exactly_the_rows_that_are_wanted(before: list[Row], after: list[Row]) -> None:
    old = done(plan_shards([], before, LIMITS))
    plan = plan_shards(old, after, LIMITS)
    left = done(plan)
    assert Counter(digests(left)) == Counter(row.digest for row in after)
    by_digest = {row.digest: row.split for row in after}
    assert all(by_digest[digest] == shard.split for shard in left for digest in shard.rows)
    assert len({shard.stem for shard in left}) == len(left)
    names = {shard.stem for shard in left}
    assert {shard.stem for shard in old} - names == {shard.stem for shard in plan.removed}


@given(rows_of_any_size)
def test_no_shard_is_larger_than_its_limits(rows: list[Row]) -> None:
    for shard, own in plan_shards([], rows, LIMITS).written:
        assert shard.rows == tuple(row.digest for row in own)
        assert shard.num_bytes == sum(row.num_bytes for row in own)
        assert len(own) == 1 or (shard.num_bytes <= 1000 and len(own) <= 20)


def test_images_of_a_shard_are_limited() -> None:
    limits = Limits(num_bytes=10**9, num_images=4)
    rows = [replace(row(number), num_images=2) for number in range(5)]
    plan = plan_shards([], rows, limits)
    assert [len(own) for _, own in plan.written] == [2, 2, 1]


def test_rows_of_a_new_set_keep_their_order() -> None:
    rows = [row(number) for number in (5, 3, 9, 1)]
    assert digests(done(plan_shards([], rows, LIMITS))) == [row.digest for row in rows]


def test_nothing_is_written_where_nothing_changed() -> None:
    rows = [row(number) for number in range(50)]
    old = done(plan_shards([], rows, LIMITS))
    plan = plan_shards(old, reversed(rows), LIMITS)
    assert (plan.written, plan.removed, list(plan.kept)) == ((), (), old)


@pytest.mark.parametrize("step", [1, 7, 100])
def test_set_that_grows_writes_at_most_twice_its_growth_and_has_few_shards(step: int) -> None:
    limits = Limits(num_bytes=1000)
    rows = [row(number) for number in range(1000)]
    shards = done(plan_shards([], rows, limits))
    for _ in range(30):
        # Somewhere in the middle, as a new value of a matrix would be.
        new = [row(len(rows) + number) for number in range(step)]
        rows[500:500] = new
        plan = plan_shards(shards, rows, limits)
        written = sum(shard.num_bytes for shard, _ in plan.written)
        assert written <= 2 * sum(row.num_bytes for row in new)
        shards = done(plan)
    smallest = sum(row.num_bytes for row in rows) / 1000
    assert len(shards) <= 2 * smallest + 8


def test_shard_that_lost_a_row_is_written_again_alone() -> None:
    rows = [row(number) for number in range(60)]
    old = done(plan_shards([], rows, LIMITS))
    plan = plan_shards(old, rows[:30] + rows[31:], LIMITS)
    assert [shard.stem for shard, _ in plan.written] == ["t2i/train-00001"]
    assert list(plan.kept) == [old[0], old[2]]
