"""How long a worker may say nothing."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from sensebatch.plan.patience import (
    CPU_UNKNOWN_S,
    LEAST_S,
    SLOWNESS,
    UNKNOWN_S,
    PlannedSeconds,
    patience_s,
)
from sensebatch.plan.seconds import Clock
from sensebatch.plan.speed import Speed
from sensebatch.tasks import Task
from tests.plan.loads import COMPUTATION
from tests.plan.test_seconds import H200, make_load
from tests.plan.test_seconds import seconds as least_seconds

known = st.one_of(st.none(), st.floats(0, 1e6))


@given(st.lists(known, max_size=3), st.booleans())
def test_patience_is_many_times_what_anybody_expects_and_never_short(
    known_s: list[float | None], on_cpu: bool
) -> None:
    found = patience_s(*known_s, on_cpu=on_cpu)
    expected = [seconds for seconds in known_s if seconds is not None]
    assert found >= LEAST_S
    assert all(found >= SLOWNESS * seconds for seconds in expected)
    if expected:
        assert found in (LEAST_S, SLOWNESS * max(expected))
    else:
        assert found == (CPU_UNKNOWN_S if on_cpu else UNKNOWN_S)


def test_plan_of_a_measured_gpu_counts_every_weight_as_copied_for_every_image() -> None:
    load = make_load(4)
    planned = PlannedSeconds(
        gpu="NVIDIA H200", clock=Clock(COMPUTATION, H200), loads={load.group: load}
    )
    found = planned.of("NVIDIA H200", load.group, 4)
    assert found is not None
    assert found > 1.05 * least_seconds(load, 4, vram_mode="full").images
    alone = planned.of("NVIDIA H200", load.group, 1)
    assert alone is not None
    assert 3.9 * alone < found <= 4 * alone
    thinking = make_load(4, text_tokens=500)
    planned = replace(planned, loads={thinking.group: thinking})
    silent = replace(planned, loads={thinking.group: replace(thinking, text_tokens=0)})
    with_text, without = (p.of("NVIDIA H200", thinking.group, 4) for p in (planned, silent))
    assert (with_text or 0) > (without or 0) > 0


def test_nothing_is_known_of_other_gpus_groups_and_numbers() -> None:
    load = make_load(4)
    planned = PlannedSeconds(
        gpu="NVIDIA H200", clock=Clock(COMPUTATION, H200), loads={load.group: load}
    )
    assert planned.of("NVIDIA L4", load.group, 4) is None
    assert planned.of("NVIDIA H200", replace(load.group, think=True), 4) is None
    assert replace(planned, clock=None).of("NVIDIA H200", load.group, 4) is None


def test_speed_of_a_task_is_that_of_its_own_batches() -> None:
    speed, load = Speed(), make_load(1)
    speed.measured(load.group, 2, 30.0)
    assert speed.of_task(load.group, 1) == 15.0
    other = replace(load.group, task=Task.EDIT)
    assert speed.of(other, 1) == 15.0
    assert speed.of_task(other, 1) is None
