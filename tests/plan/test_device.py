"""Memory arithmetic: what the weights take, and what fits a budget."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensebatch.checkpoint.architecture import OFFICIAL_8B, parse_architecture
from sensebatch.checkpoint.tensors import TensorGroup, expected_tensors
from sensebatch.config import MemoryConfig
from sensebatch.errors import ConfigError
from sensebatch.jobs import GroupKey, Task
from sensebatch.plan.device import PROGRAM_BYTES, RING, place
from sensebatch.plan.fallback import leaner
from sensebatch.plan.footprint import (
    Load,
    cache_bytes,
    denoise_bytes,
    jobs_per_pass,
    prompt_bytes,
    quantising_bytes,
)
from sensebatch.plan.placement import Placement, Placements
from sensebatch.plan.weight_bytes import weight_bytes
from sensebatch.resolutions import Resolution
from sensebatch.units import GIB
from tests.golden_data import CONFIGS, golden_architecture

ARCH = parse_architecture(OFFICIAL_8B)


def make_load(jobs: int = 4, *, branches: int = 2, prompt: int = 500, text: int = 0) -> Load:
    group = GroupKey(
        task=Task.T2I,
        resolution=Resolution(height=2048, width=2048),
        num_steps=50,
        timestep_shift=3.0,
        think=text > 0,
        branches=("cond", "uncond")[:branches],
    )
    return Load(group=group, batch_size=jobs, prompt_tokens=prompt, text_tokens=text)


def placed(
    loads: list[Load] | None = None, *, device_free: int | None = None, **memory: Any
) -> Placement:
    return place_all(loads, device_free=device_free, **memory).leanest


def place_all(
    loads: list[Load] | None = None,
    *,
    device_free: int | None = None,
    host_free: int = 200 * GIB,
    precision: str | None = None,
    **memory: Any,
) -> Placements:
    return place(
        ARCH,
        MemoryConfig(**memory),
        [make_load()] if loads is None else loads,
        item_bytes=2,
        device_free=device_free,
        host_free=host_free,
        precision=precision,
    )


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("item_bytes", [2, 4])
def test_every_weight_is_counted_once(config: str, item_bytes: int) -> None:
    arch = golden_architecture(config)
    weights = weight_bytes(arch, item_bytes)
    total = sum(math.prod(spec.shape) for spec in expected_tensors(arch).values())
    assert weights.blocks + weights.embeddings + weights.rest == total * item_bytes
    blocks = weights.num_generation + weights.num_understanding
    assert weights.blocks <= weights.block * blocks


def test_the_experts_of_the_8b_model_are_as_large_as_published() -> None:
    gib = {
        group: 2
        * sum(s.num_elements for s in expected_tensors(ARCH).values() if s.group is group)
        / GIB
        for group in TensorGroup
    }
    assert gib[TensorGroup.GENERATION] == pytest.approx(15.25, abs=0.01)
    assert gib[TensorGroup.UNDERSTANDING] == pytest.approx(15.13, abs=0.01)
    assert gib[TensorGroup.SHARED] == pytest.approx(2 * 1.16, abs=0.01)
    assert weight_bytes(ARCH, 2).block / GIB == pytest.approx(0.36, abs=0.01)


def test_a_cached_token_of_the_8b_model_takes_168_kib() -> None:
    assert cache_bytes(ARCH, 1, 2) == 42 * 2 * 8 * 128 * 2


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
    assert denoise_bytes(ARCH, longer, jobs, 2) >= denoise_bytes(ARCH, load, jobs, 2)
    assert denoise_bytes(ARCH, load, jobs + 1, 2) > denoise_bytes(ARCH, load, jobs, 2)
    for larger in (longer, more):
        assert prompt_bytes(ARCH, larger, 2, parked=parked) >= prompt_bytes(
            ARCH, load, 2, parked=parked
        )


def test_modes_take_less_and_less() -> None:
    peaks = [placed(vram_mode=mode).device_bytes for mode in ("full", "fast", "balanced", "low")]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)


def test_auto_takes_all_weights_where_they_fit_and_says_why() -> None:
    chosen = placed(device_free=80 * GIB)
    assert (chosen.mode, chosen.num_buffers) == ("full", None)
    assert "80.0 GiB" in chosen.reason
    assert placed(device_free=None).mode == "full"


@settings(max_examples=25)
@given(budget=st.integers(int(2.2 * GIB), 60 * GIB))
def test_a_budget_is_never_exceeded_and_never_wasted(budget: int) -> None:
    chosen = placed(vram_budget_bytes=budget)
    assert chosen.device_bytes <= budget
    if chosen.num_buffers is not None:
        weights = weight_bytes(ARCH, 2)
        assert chosen.num_buffers >= RING
        # One more block would not have fitted, or be the last.
        blocks = weights.num_generation + weights.num_understanding
        more = chosen.device_bytes + weights.block
        assert more > budget or chosen.num_buffers == blocks - 1


def test_a_larger_budget_never_streams_more() -> None:
    buffers = [
        placed(vram_budget_bytes=budget * GIB).num_buffers or 1000
        for budget in (3, 7, 9, 13, 20, 27, 40)
    ]
    assert buffers == sorted(buffers)


def make_story(jobs: int = 4) -> Load:
    load = make_load(jobs, prompt=1000, text=4000)
    group = replace(load.group, task=Task.INTERLEAVE, think=True)
    return replace(load, group=group, drawn_tokens=6 * 4098)


def test_every_group_keeps_as_many_layers_as_its_own_jobs_leave_room_for() -> None:
    dot, story = make_load(), make_story(2)
    placed = place_all([dot, story], vram_budget_bytes=24 * GIB)
    of_dot, of_story = placed.of(dot.group), placed.of(story.group)
    assert of_dot == place_all([dot], vram_budget_bytes=24 * GIB).leanest
    assert of_dot.num_buffers > of_story.num_buffers >= RING
    assert placed.leanest == of_story
    assert placed.device_bytes == max(of_dot.device_bytes, of_story.device_bytes) <= 24 * GIB


def test_a_group_that_was_not_planned_for_is_given_the_leanest_placement() -> None:
    placed = place_all([make_load(), make_story(2)], vram_budget_bytes=24 * GIB)
    other = replace(make_load().group, num_steps=7)
    assert placed.of(other) == placed.leanest


def test_all_weights_stay_for_every_group_or_for_none() -> None:
    dot, story = make_load(), make_story()
    assert place_all([dot], device_free=37 * GIB).leanest.num_buffers is None
    placed = place_all([dot, story], device_free=37 * GIB)
    assert all(placed.of(load.group).num_buffers for load in (dot, story))
    # More buffers than blocks would be memory for nothing.
    weights = weight_bytes(ARCH, 2)
    blocks = weights.num_generation + weights.num_understanding
    assert placed.of(dot.group).num_buffers < blocks


def make_edits(jobs: int) -> Load:
    load = make_load(jobs, prompt=5000)
    return replace(load, group=replace(load.group, task=Task.EDIT, branches=("cond", "img_cond")))


def test_smaller_batches_are_found_at_all() -> None:
    # Or the next test would have nothing to say.
    sizes = [
        place_all([make_edits(16)], vram_budget_bytes=int(gib * GIB)).leanest.batch_size
        for gib in (3.3, 3.5)
    ]
    assert sizes == [4, 8]


@settings(max_examples=100)
@given(budget=st.integers(int(3.2 * GIB), int(4 * GIB)), jobs=st.integers(1, 16))
def test_a_batch_is_as_large_as_a_budget_allows(budget: int, jobs: int) -> None:
    edits = make_edits(jobs)
    try:
        chosen = place_all([edits], vram_budget_bytes=budget).leanest
    except ConfigError:
        return
    sizes = [jobs]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    if chosen.batch_size is not None:
        larger = sizes[sizes.index(chosen.batch_size) - 1]
        mode = {"low": "low"}.get(chosen.mode, "balanced")
        alone = place_all([replace(edits, batch_size=larger)], vram_mode=mode).leanest
        assert alone.device_bytes > budget


@pytest.mark.parametrize("budget", [3, 3.5, 4.5])
def test_a_run_that_goes_on_cuts_its_batches_as_before(budget: float) -> None:
    def cut(left: int) -> int:
        load = replace(make_load(min(left, 16), prompt=700, text=1024), wanted_jobs=16)
        placed = place_all([load], vram_mode="balanced", vram_budget_bytes=int(budget * GIB))
        return placed.leanest.batch_size or 16

    whole = cut(100)
    assert whole < 16
    for left in range(1, 17):
        # A size that more jobs than there are could fill changes nothing.
        assert min(cut(left), left) == min(whole, left)


@pytest.mark.parametrize("free", [30, 38, 44, 46])
def test_texts_are_decoded_with_weights_that_stay_where_that_can_be(free: int) -> None:
    weights = weight_bytes(ARCH, 2)
    chosen = place_all([make_story(7)], device_free=free * GIB).leanest
    if chosen.num_buffers is not None:
        assert chosen.num_buffers >= weights.buffers_for_text(RING)


def test_texts_are_decoded_at_least_half_together_before_all_weights_stay() -> None:
    load = make_load(16, prompt=700, text=1024)
    half, quarter = (
        place_all([replace(load, batch_size=jobs)], vram_mode="full").leanest.device_bytes
        for jobs in (8, 4)
    )
    assert place_all([load], device_free=half).leanest.mode == "full"
    assert place_all([load], device_free=(half + quarter) // 2).leanest.mode != "full"


def test_embedded_input_pictures_are_counted() -> None:
    edits = make_edits(16)
    drawn_alike = replace(edits, group=replace(edits.group, task=Task.T2I))
    with_pictures, without = (
        prompt_bytes(ARCH, load, 2, parked=True) for load in (edits, drawn_alike)
    )
    assert with_pictures - without == 16 * 5000 * ARCH.hidden_size * 2


def test_a_host_budget_makes_batches_smaller_beside_a_full_device_too() -> None:
    load = make_load(16, prompt=700, text=1024)
    chosen = place_all([load], device_free=120 * GIB, host_budget_bytes=3 * GIB).leanest
    assert (chosen.mode, chosen.num_buffers) == ("full", None)
    assert chosen.batch_size in (4, 8)
    assert chosen.host_bytes <= 3 * GIB


def test_smaller_batches_come_before_streaming_as_long_as_passes_are_full() -> None:
    dots = make_load(16, prompt=5000)
    dots = replace(dots, group=replace(dots.group, branches=("cond", "img_cond"), task=Task.EDIT))
    peak = place_all([dots], vram_mode="full").leanest.device_bytes
    chosen = place_all([dots], device_free=peak - GIB).leanest
    assert (chosen.mode, chosen.batch_size) == ("full", 8)
    assert place_all([replace(dots, batch_size=2)], device_free=34 * GIB).leanest.mode != "full"


def test_fewer_jobs_a_batch_come_before_a_refusal_and_before_single_passes() -> None:
    thinking = make_load(16, prompt=700, text=1024)
    roomy, tight = (
        place_all([thinking], vram_budget_bytes=int(gib * GIB)).leanest for gib in (9, 3.5)
    )
    assert (roomy.mode, roomy.batch_size) == ("balanced", None)
    assert tight.mode == "balanced"
    assert tight.batch_size in (2, 4, 8)
    assert tight.device_bytes <= 3.5 * GIB


def test_prefixes_that_the_host_cannot_hold_make_batches_smaller() -> None:
    edits = make_load(8, prompt=5000)
    edits = replace(edits, group=replace(edits.group, branches=("cond", "img_cond")))
    rich = place_all([edits], vram_mode="balanced")
    assert rich.leanest.batch_size is None
    poor = place_all([edits], vram_mode="balanced", host_free=16 * GIB).leanest
    assert poor.batch_size is not None
    assert poor.host_bytes <= 16 * GIB + PROGRAM_BYTES or poor.batch_size == 1
    capped = place_all([edits], vram_mode="balanced", host_budget_bytes=10 * GIB).leanest
    assert capped.batch_size is not None
    assert capped.host_bytes <= 10 * GIB


def test_what_one_group_gives_up_no_other_keeps() -> None:
    dot, story = make_load(), make_story(2)
    placed = place_all([dot, story], vram_budget_bytes=24 * GIB)
    before = [placed.of(load.group).num_buffers for load in (dot, story)]
    less = leaner(ARCH, placed, story.group, 2)
    assert less is not None
    after = [less.of(load.group).num_buffers for load in (dot, story)]
    assert after == [before[0] - (before[1] - after[1]), max(before[1] // 2, RING)]
    # Nor does a group that was not planned for.
    assert less.leanest.num_buffers == after[1]
    while less.of(story.group).num_buffers > RING:
        less = leaner(ARCH, less, story.group, 2)
    alone = leaner(ARCH, less, story.group, 2)
    assert (alone.of(story.group).mode, alone.of(story.group).tokens_per_pass) == ("low", 1)
    assert alone.of(dot.group) == less.of(dot.group)
    assert leaner(ARCH, alone, story.group, 2) is None


def test_all_weights_are_given_up_by_every_group_and_the_host_budget_holds() -> None:
    dot, story = make_load(), make_story(1)
    placed = place_all([dot, story], device_free=80 * GIB, host_budget_bytes=20 * GIB)
    assert placed.of(dot.group).num_buffers is None
    less = leaner(ARCH, placed, dot.group, 2)
    assert all(less.of(load.group).num_buffers for load in (dot, story))
    kept = less.of(dot.group).host_budget_bytes + weight_bytes(ARCH, 2).embeddings
    assert 15 * GIB < kept + PROGRAM_BYTES <= 20 * GIB
    assert 15 * GIB < less.of(dot.group).host_bytes <= 20 * GIB


def test_a_reason_counts_the_layers_that_stay() -> None:
    said = {
        chosen.num_buffers: (chosen.mode, chosen.reason.split(" holds ")[1])
        for budget in range(15 * GIB, 18 * GIB, GIB // 16)
        if (chosen := placed(vram_budget_bytes=budget)).num_buffers is not None
    }
    assert ARCH.num_layers == 42
    rest = "generation layers, the others are streamed"
    assert said[41] == ("balanced", f"39 of 42 {rest}")
    # Where there is a buffer for each, none are left over for the others to go through.
    assert [said[count] for count in (42, 43, 44)] == [("fast", f"all {rest}")] * 3


@pytest.mark.parametrize("memory", [{"vram_mode": "fast"}, {}])
def test_what_cannot_fit_is_refused_with_what_would(memory: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"expected at least \d+\.\d\d GiB") as refused:
        placed(vram_budget_bytes=GIB, **memory)
    assert "for t2i 2048x2048" in str(refused.value)
    said = float(str(refused.value).split("at least ")[1].split(" GiB")[0])
    enough = round(said * GIB)
    assert placed(vram_budget_bytes=enough, **memory).device_bytes <= enough


def test_the_host_keeps_what_its_budget_allows() -> None:
    weights = weight_bytes(ARCH, 2)
    rich = placed(vram_mode="balanced", host_budget_bytes=60 * GIB)
    all_weights = weights.blocks + weights.embeddings + PROGRAM_BYTES
    assert all_weights < rich.host_bytes < all_weights + 2 * GIB
    poor = placed(vram_mode="balanced", host_budget_bytes=20 * GIB)
    assert poor.host_bytes <= 20 * GIB
    assert poor.host_bytes > 20 * GIB - weights.block
    assert placed(vram_mode="full").host_bytes < PROGRAM_BYTES + 2 * GIB


def test_a_host_budget_must_hold_the_program_where_all_weights_are_on_the_device() -> None:
    with pytest.raises(ConfigError, match=r"max_memory: expected cpu to be at least 1\.\d\d GiB"):
        place_all(vram_mode="full", device_free=80 * GIB, host_budget_bytes=GIB)
    # Host and device are one: the program is smaller, and nobody knows by how much.
    assert placed(vram_mode="full", host_budget_bytes=GIB).num_buffers is None


@settings(max_examples=25)
@given(budget=st.integers(0, 60 * GIB), jobs=st.integers(1, 16), prompt=st.integers(1, 9000))
def test_a_host_budget_is_never_exceeded(budget: int, jobs: int, prompt: int) -> None:
    loads = [make_load(jobs, prompt=prompt), make_story(2)]
    memory: dict[str, Any] = {"vram_mode": "balanced", "host_budget_bytes": budget}
    try:
        chosen = place_all(loads, **memory)
    except ConfigError as error:
        said = float(str(error).split("at least ")[1].split(" GiB")[0])
        memory["host_budget_bytes"] = round(said * GIB)
        assert memory["host_budget_bytes"] > budget
        chosen = place_all(loads, **memory)
    for placement in chosen.groups.values():
        assert placement.host_bytes <= memory["host_budget_bytes"]
    assert len({placement.host_budget_bytes for placement in chosen.groups.values()}) == 1


def test_float8_makes_every_mode_leaner() -> None:
    def peaks(precision: str | None) -> list[int]:
        return [
            place_all(vram_mode=mode, precision=precision).device_bytes
            for mode in ("full", "fast", "balanced", "low")
        ]

    plain, fp8, both = peaks(None), peaks("fp8"), peaks("fp8-all")
    full, fast = 0, 1
    assert plain[full] - fp8[full] > 7 * GIB
    assert plain[full] - both[full] > 14 * GIB
    assert plain[fast] - fp8[fast] > 7 * GIB
    # The ring takes layers of the understanding expert, or else parts of the head.
    assert both[2] < fp8[2]
    assert fp8[2] - plain[2] == quantising_bytes(ARCH, "fp8")


@settings(max_examples=25)
@given(budget=st.integers(int(2.5 * GIB), 40 * GIB))
def test_a_budget_is_never_exceeded_with_float8(budget: int) -> None:
    chosen = place_all(vram_budget_bytes=budget, precision="fp8").leanest
    assert chosen.device_bytes <= budget
    placed, group = place_all(vram_budget_bytes=budget, precision="fp8"), make_load().group
    while (after := leaner(ARCH, placed, group, 2, "fp8")) is not None:
        assert after.of(group).device_bytes <= placed.of(group).device_bytes
        placed = after
    assert placed.of(group).num_buffers == RING


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ConfigError, match=r"vram_mode: expected auto, .*found 'turbo'"):
        placed(vram_mode="turbo")


@given(jobs=st.integers(1, 8), tokens=st.integers(1, 40_000))
def test_a_pass_holds_at_least_one_job_and_no_more_than_the_batch(jobs: int, tokens: int) -> None:
    count = jobs_per_pass(make_load(jobs), tokens)
    assert 1 <= count <= jobs
    assert count == 1 or count * 4096 <= tokens
