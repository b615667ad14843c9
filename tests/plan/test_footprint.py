"""What jobs take besides weights; tests/engine/memory compares the estimates with tensors."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from sensebatch.plan.footprint import cache_bytes, denoise_bytes, prompt_bytes
from sensebatch.tasks import Task
from tests.plan.loads import (
    ARCH,
    COMPUTATION,
    make_edits,
    make_load,
)


def test_a_cached_token_of_the_8b_model_takes_168_kib() -> None:
    assert cache_bytes(COMPUTATION, 1) == 42 * 2 * 8 * 128 * 2


@given(
    jobs=st.integers(1, 8),
    prompt=st.integers(1, 20_000),
    text=st.integers(0, 2_000),
    parked=st.booleans(),
)
def test_more_work_never_takes_less(jobs: int, prompt: int, text: int, parked: bool) -> None:
    load = make_load(jobs, prompt=prompt, text=text)
    longer = replace(load, prompt_tokens=prompt + 100)
    more = replace(load, batch_size=jobs + 1)
    assert denoise_bytes(COMPUTATION, longer, jobs) >= denoise_bytes(COMPUTATION, load, jobs)
    assert denoise_bytes(COMPUTATION, load, jobs + 1) > denoise_bytes(COMPUTATION, load, jobs)
    for larger in (longer, more):
        assert prompt_bytes(COMPUTATION, larger, parked=parked) >= prompt_bytes(
            COMPUTATION, load, parked=parked
        )


def test_embedded_input_images_are_counted() -> None:
    edits = make_edits(16)
    drawn_alike = replace(edits, group=replace(edits.group, task=Task.T2I))
    with_images, without = (
        prompt_bytes(COMPUTATION, load, parked=True) for load in (edits, drawn_alike)
    )
    assert with_images - without == 16 * 5000 * ARCH.hidden_size * 2
