from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sensebatch.plan.workers import take_turns

COSTS = st.lists(st.integers(0, 50), max_size=40)


def test_the_worker_that_is_free_first_takes_the_next_batch() -> None:
    assert list(take_turns([5, 1, 1, 1, 4], 2)) == [(0, 5), (1, 1), (1, 2), (1, 3), (1, 7)]


@given(COSTS, st.integers(1, 9))
def test_no_worker_is_idle_while_another_one_has_a_batch_waiting(
    costs: list[int], num_workers: int
) -> None:
    ends = [0] * num_workers
    for cost, (number, end) in zip(costs, take_turns(costs, num_workers), strict=True):
        assert ends[number] == min(ends)
        ends[number] += cost
        assert end == ends[number]
