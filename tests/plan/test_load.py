"""The most demanding job of a group."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.plan.loads import (
    make_load,
)


@given(jobs=st.integers(1, 8), tokens=st.integers(1, 40_000))
def test_a_pass_holds_at_least_one_job_and_no_more_than_the_batch(jobs: int, tokens: int) -> None:
    count = make_load(jobs).jobs_per_pass(tokens)
    assert 1 <= count <= jobs
    assert count == 1 or count * 4096 <= tokens
