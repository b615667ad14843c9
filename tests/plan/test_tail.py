"""In which order workers are handed the batches of a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from sensebatch.config import MemoryConfig
from sensebatch.plan.batches import Demand, Plan, PlanEntry, make_plan
from sensebatch.plan.forecast import forecast, timed_batches
from sensebatch.plan.tail import TEXT_STEP_TOKENS, batch_work, handed_out, works
from sensebatch.plan.workers import take_turns
from tests.plan.loads import with_drawing
from tests.plan.test_seconds import make_load

STORY = make_load(num_images=4).group
IMAGE = make_load().group
ASK = replace(IMAGE, drawing=None)
GROUPS = (STORY, IMAGE, replace(STORY, think=True))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans of a few groups, whose jobs have different numbers of images and tokens."""
    kinds = st.tuples(
        st.sampled_from(GROUPS), st.integers(1, 6), st.integers(1, 400), st.integers(0, 60)
    )
    jobs = draw(st.lists(st.tuples(kinds, st.booleans()), min_size=1, max_size=40))
    entries = [
        PlanEntry(
            id=f"j{number}",
            group=group,
            max_images=images,
            prompt_tokens=prompt,
            text_tokens=text,
            alone=alone and number % 5 == 0,
        )
        for number, ((group, images, prompt, text), alone) in enumerate(jobs)
    ]
    size = draw(st.integers(1, 4))
    return make_plan(entries, MemoryConfig(max_batch_size=size, max_batch_image_tokens=1 << 20))


def end(plan: Plan, groups: Sequence[Sequence[tuple[str, ...]]], num_workers: int) -> float:
    """Returns when the last batch is through, by its expected work."""
    of_batch = {
        batch: work
        for group in plan.groups
        for batch, work in zip(group.batches(), works(group), strict=True)
    }
    turns = take_turns((of_batch[batch] for group in groups for batch in group), num_workers)
    return max(end for _, end in turns)


@given(plans(), st.integers(1, 9))
def test_only_the_order_within_a_group_changes_and_only_to_end_earlier(
    plan: Plan, num_workers: int
) -> None:
    as_planned = [list(group.batches()) for group in plan.groups]
    found = [list(batches) for batches in handed_out(plan, num_workers)]
    assert [sorted(group) for group in found] == [sorted(group) for group in as_planned]
    if found == as_planned:
        return
    assert num_workers > 1
    assert end(plan, found, num_workers) < end(plan, as_planned, num_workers)
    for group, batches, planned in zip(plan.groups, found, as_planned, strict=True):
        work = dict(zip(planned, works(group), strict=True))
        fresh = batches[: len(batches) - len(group.alone)]
        assert batches[len(fresh) :] == [(job_id,) for job_id in group.alone]
        falls = sorted(fresh, key=work.__getitem__, reverse=True)
        assert batches == planned or fresh == falls


@given(plans())
def test_one_worker_is_handed_everything_as_it_is_planned(plan: Plan) -> None:
    assert [list(batches) for batches in handed_out(plan, 1)] == [
        list(group.batches()) for group in plan.groups
    ]


@given(plans(), st.integers(1, 9), st.data())
def test_what_is_left_is_cut_alike_whatever_was_handed_out_first(
    plan: Plan, num_workers: int, data: st.DataObject
) -> None:
    handed = [batch for batches in handed_out(plan, num_workers) for batch in batches]
    done = handed[: data.draw(st.integers(0, len(handed)))]
    gone = {job_id for batch in done for job_id in batch}
    left = [
        PlanEntry(id=job_id, group=group.group, alone=job_id in group.alone)
        for group in plan.groups
        for job_id in (*group.fresh, *group.alone)
        if job_id not in gone
    ]
    size = max(group.batch_size for group in plan.groups)
    again = make_plan(left, MemoryConfig(max_batch_size=size, max_batch_image_tokens=1 << 20))
    batches = [batch for group in again.groups for batch in group.batches()]
    assert sorted(batches) == sorted(handed[len(done) :])


def stories(*images: int) -> Plan:
    entries = [PlanEntry(id=f"s{n}", group=STORY, max_images=m) for n, m in enumerate(images)]
    return make_plan(entries, MemoryConfig(max_batch_size=1))


def test_a_long_story_at_the_end_comes_first() -> None:
    plan = stories(1, 1, 1, 1, 4)
    (batches,) = handed_out(plan, 2)
    assert [ids for (ids,) in batches] == ["s4", "s0", "s1", "s2", "s3"]
    as_planned = timed_batches(plan, [], [8.0], by_manifest=False)
    sooner = timed_batches(plan, [], [8.0], by_manifest=False, num_workers=2)
    assert (forecast(as_planned, 2).seconds, forecast(as_planned, 2).tail_s) == (30.0, 10.0)
    assert (forecast(sooner, 2).seconds, forecast(sooner, 2).tail_s) == (20.0, 0.0)
    assert sum(seconds for _, seconds in sooner) == 5 * 8.0
    assert sooner[0] == (("s4",), 20.0)


def test_an_order_that_saves_nothing_stays() -> None:
    (batches,) = handed_out(stories(1, 2), 2)
    assert list(batches) == [("s0",), ("s1",)]


def test_text_counts_once_a_batch_and_everything_else_for_each_job() -> None:
    short, long = Demand(10, 5, 1), Demand(30, 50, 2)
    evaluations = STORY.drawing.num_evaluations if STORY.drawing else 0
    images = 3 * STORY.image_tokens * evaluations
    assert batch_work(STORY, [short, long]) == 40 + 50 * TEXT_STEP_TOKENS + images
    assert batch_work(ASK, [short]) == 10 + 5 * TEXT_STEP_TOKENS
    # 48 of the evaluations are without the middle layers.
    leaner = with_drawing(make_load(), layer_stride=2).group
    assert batch_work(leaner, [Demand(0, 0, 1)]) == IMAGE.image_tokens * (52 + 48 / 3)


def test_defaults_of_a_run_keep_batches_that_are_alike_in_their_order() -> None:
    config = MemoryConfig(max_batch_size=2)
    plan = make_plan([PlanEntry(id=f"j{n}", group=IMAGE) for n in range(9)], config)
    assert plan.groups[0].kinds == ()
    (batches,) = handed_out(plan, 4)
    assert list(batches) == list(plan.groups[0].batches())
