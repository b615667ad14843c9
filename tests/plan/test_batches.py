from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from sensebatch.config import MemoryConfig
from sensebatch.jobs import Drawing, GroupKey, group_key
from sensebatch.plan.batches import PlanEntry, make_plan, plan_entry
from sensebatch.resolutions import Resolution
from sensebatch.tasks import Branch, Task
from tests.executor.fakes import make_job

sizes = st.builds(
    Resolution, height=st.sampled_from([32, 64, 256]), width=st.sampled_from([32, 96])
)
drawings = st.builds(
    Drawing,
    resolution=sizes,
    num_steps=st.sampled_from([2, 50]),
    timestep_shift=st.just(3.0),
    branches=st.sampled_from([(Branch.COND,), (Branch.COND, Branch.UNCOND)]),
)
groups = st.builds(
    GroupKey,
    task=st.sampled_from(Task),
    think=st.booleans(),
    drawing=st.none() | drawings,
)
entries = st.lists(st.tuples(groups, st.integers(1, 10), st.booleans()), max_size=60).map(
    lambda rows: [
        PlanEntry(id=f"job{i}", group=group, max_images=images, alone=alone)
        for i, (group, images, alone) in enumerate(rows)
    ]
)
memories = st.builds(
    MemoryConfig,
    max_batch_size=st.integers(1, 5),
    max_batch_image_tokens=st.integers(1, 60),
)


@given(entries=entries, memory=memories)
def test_every_job_is_in_exactly_one_batch(entries: list[PlanEntry], memory: MemoryConfig) -> None:
    plan = make_plan(entries, memory)
    planned = Counter(job for group in plan.groups for ids in group.batches() for job in ids)
    assert planned == Counter(entry.id for entry in entries)
    assert plan.num_jobs == len(entries)
    assert plan.num_batches == sum(len(list(group.batches())) for group in plan.groups)


@given(entries=entries, memory=memories)
def test_batches_are_of_one_group_and_fit(entries: list[PlanEntry], memory: MemoryConfig) -> None:
    group_of = {entry.id: entry.group for entry in entries}
    for group in make_plan(entries, memory).groups:
        for ids in group.batches():
            assert {group_of[job] for job in ids} == {group.group}
            assert len(ids) <= memory.max_batch_size
            tokens = len(ids) * group.group.image_tokens
            thinks = group.group.think and group.group.task is Task.T2I
            assert len(ids) == 1 or thinks or tokens <= memory.max_batch_image_tokens


@given(entries=entries, memory=memories)
def test_jobs_that_draw_nothing_are_limited_by_their_number_alone(
    entries: list[PlanEntry], memory: MemoryConfig
) -> None:
    for group in make_plan(entries, memory).groups:
        if group.group.drawing is None:
            assert group.batch_size == memory.max_batch_size
            assert group.max_image_tokens == 0


@given(entries=entries, memory=memories)
def test_thinking_jobs_are_decoded_together_however_large_their_images(
    entries: list[PlanEntry], memory: MemoryConfig
) -> None:
    for group in make_plan(entries, memory).groups:
        if group.group.think and group.group.task is Task.T2I:
            assert group.batch_size == memory.max_batch_size


@given(entries=entries, memory=memories, fitting=st.integers(1, 6))
def test_no_batch_is_larger_than_fits(
    entries: list[PlanEntry], memory: MemoryConfig, fitting: int
) -> None:
    wanted = [group.batch_size for group in make_plan(entries, memory).groups]
    fits = [group.batch_size for group in make_plan(entries, memory, lambda _: fitting).groups]
    assert fits == [min(size, fitting) for size in wanted]


@given(entries=entries, memory=memories)
def test_jobs_keep_the_manifests_order_and_failed_ones_come_last_and_alone(
    entries: list[PlanEntry], memory: MemoryConfig
) -> None:
    plan = make_plan(entries, memory)
    assert [group.group for group in plan.groups] == list(
        dict.fromkeys(entry.group for entry in entries)
    )
    for group in plan.groups:
        own = [entry for entry in entries if entry.group == group.group]
        order = [e.id for e in own if not e.alone] + [e.id for e in own if e.alone]
        assert [job for ids in group.batches() for job in ids] == order
        failed = {entry.id for entry in own if entry.alone}
        assert all(len(ids) == 1 for ids in group.batches() if failed & set(ids))


@given(entries=entries, memory=memories, done=st.integers(0, 20))
def test_jobs_left_after_whole_batches_are_cut_the_same_way(
    entries: list[PlanEntry], memory: MemoryConfig, done: int
) -> None:
    batches = [ids for group in make_plan(entries, memory).groups for ids in group.batches()]
    finished = {job for ids in batches[:done] for job in ids}
    left = make_plan([entry for entry in entries if entry.id not in finished], memory)
    left_batches = {ids for group in left.groups for ids in group.batches()}
    assert left_batches == set(batches[done:])


def test_job_larger_than_the_budget_still_gets_a_batch() -> None:
    job = make_job("large", resolution=Resolution(height=2048, width=2048))
    plan = make_plan([plan_entry(job)], MemoryConfig(max_batch_image_tokens=10))
    assert list(plan.groups[0].batches()) == [("large",)]


def test_a_group_depends_only_on_what_shapes_a_batch() -> None:
    job = make_job("a")
    assert group_key(replace(job, seed=9, prompt="other")) == group_key(job)
    assert group_key(replace(job, think=True)) != group_key(job)
