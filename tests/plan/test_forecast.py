from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from sensebatch.config import MemoryConfig
from sensebatch.plan.batches import make_plan, plan_entry
from sensebatch.plan.forecast import forecast, timed_batches
from tests.executor.fakes import make_job

SECONDS = st.lists(st.integers(0, 50), max_size=40)


def numbered(seconds: list[int]) -> list[tuple[tuple[str, ...], float]]:
    return [((f"a{number}", f"b{number}"), float(one)) for number, one in enumerate(seconds)]


@given(SECONDS, st.integers(1, 9))
def test_the_tail_is_what_even_shares_would_save(seconds: list[int], num_workers: int) -> None:
    found = forecast(numbered(seconds), num_workers)
    assert found.seconds >= max(seconds, default=0)
    assert math.isclose(found.seconds - found.tail_s, sum(seconds) / num_workers)
    assert found.tail_s <= max(seconds, default=0)
    assert (found.batches_in_time, found.next_job) == (len(seconds), None)


@given(SECONDS, st.integers(1, 9), st.integers(0, 100))
def test_batches_are_begun_up_to_the_first_that_would_be_late(
    seconds: list[int], num_workers: int, available_s: int
) -> None:
    found = forecast(numbered(seconds), num_workers, available_s)
    reached = found.batches_in_time
    assert forecast(numbered(seconds[:reached]), num_workers).seconds <= available_s
    assert found.jobs_in_time == 2 * reached
    if reached < len(seconds):
        assert forecast(numbered(seconds[: reached + 1]), num_workers).seconds > available_s
        assert found.next_job == f"a{reached}"


def test_the_last_batch_can_leave_workers_idle() -> None:
    found = forecast(numbered([10, 10, 10, 10, 10]), 4)
    assert (found.seconds, found.tail_s) == (20, 7.5)


def test_batches_are_those_of_the_plan_in_either_order() -> None:
    jobs = [make_job("a"), make_job("t", think=True), make_job("b"), make_job("c")]
    plan = make_plan(map(plan_entry, jobs), MemoryConfig(max_batch_size=2))
    ids = [job.id for job in jobs]
    by_group = timed_batches(plan, ids, [1.0, 5.0], by_manifest=False)
    by_manifest = timed_batches(plan, ids, [1.0, 5.0], by_manifest=True)
    assert by_group == [(("a", "b"), 2.0), (("c",), 1.0), (("t",), 5.0)]
    assert by_manifest == [(("a", "b"), 2.0), (("t",), 5.0), (("c",), 1.0)]
