"""Which placement fits a budget."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensebatch.config import TINY_MODEL, default_config
from sensebatch.errors import ConfigError
from sensebatch.jobs import Precision, group_key
from sensebatch.manifest.read import read_rows
from sensebatch.plan.batches import Demand, demand_of
from sensebatch.plan.footprint import (
    cache_bytes,
    quantising_bytes,
    reading_bytes,
    text_memory,
)
from sensebatch.plan.load import Load
from sensebatch.plan.passes import RING
from sensebatch.plan.placement import Refusal
from sensebatch.plan.weight_bytes import weight_bytes
from sensebatch.resolutions import Resolution
from sensebatch.units import GIB
from tests.plan.loads import (
    ARCH,
    COMPUTATION,
    FP8,
    make_edits,
    make_interleave,
    make_load,
    place_all,
    placed,
    with_drawing,
)


def test_each_mode_takes_less_than_the_one_before() -> None:
    peaks = [placed(vram_mode=mode).device_bytes for mode in ("full", "fast", "balanced", "low")]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)


def test_auto_keeps_all_weights_if_they_fit_and_says_why() -> None:
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
        weights = weight_bytes(COMPUTATION)
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


def test_each_group_keeps_as_many_layers_as_its_jobs_leave_room_for() -> None:
    short, long = make_load(), make_interleave(2)
    placed = place_all([short, long], vram_budget_bytes=24 * GIB)
    of_short, of_long = placed.of(short.group), placed.of(long.group)
    assert of_short == place_all([short], vram_budget_bytes=24 * GIB).leanest
    assert of_short.num_buffers > of_long.num_buffers >= RING
    assert placed.leanest == of_long
    assert placed.device_bytes == max(of_short.device_bytes, of_long.device_bytes) <= 24 * GIB


def test_a_group_that_was_not_planned_gets_the_leanest_placement() -> None:
    placed = place_all([make_load(), make_interleave(2)], vram_budget_bytes=24 * GIB)
    other = with_drawing(make_load(), num_steps=7).group
    assert placed.of(other) == placed.leanest


def test_all_weights_stay_for_every_group_or_for_none() -> None:
    short, long = make_load(), make_interleave()
    assert place_all([short], device_free=37 * GIB).leanest.num_buffers is None
    placed = place_all([short, long], device_free=37 * GIB)
    assert all(placed.of(load.group).num_buffers for load in (short, long))
    # More buffers than blocks would be a waste of memory.
    weights = weight_bytes(COMPUTATION)
    blocks = weights.num_generation + weights.num_understanding
    assert placed.of(short.group).num_buffers < blocks


def test_smaller_budgets_lead_to_smaller_batches() -> None:
    # Otherwise the next test would prove nothing.
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
def test_a_resumed_run_cuts_its_batches_as_before(budget: float) -> None:
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
def test_text_is_decoded_with_resident_weights_if_possible(free: int) -> None:
    weights = weight_bytes(COMPUTATION)
    chosen = place_all([make_interleave(7)], device_free=free * GIB).leanest
    if chosen.num_buffers is not None:
        assert chosen.num_buffers >= weights.buffers_for_text(RING)


def test_half_of_the_texts_decoded_together_is_preferred_to_streaming() -> None:
    load = make_load(16, prompt=700, text=1024)
    half, quarter = (
        place_all([replace(load, batch_size=jobs)], vram_mode="full").leanest.device_bytes
        for jobs in (8, 4)
    )
    assert place_all([load], device_free=half).leanest.mode == "full"
    assert place_all([load], device_free=(half + quarter) // 2).leanest.mode != "full"


def test_what_is_read_ahead_is_counted_beside_what_is_drawn() -> None:
    several, alone = (
        replace(make_load(4), demands=((Demand(300, 0, 1), count),)) for count in (8, 4)
    )
    placement = place_all([several], device_free=100 * GIB).first
    reading = reading_bytes(COMPUTATION, several)
    assert placement.ahead_bytes == placement.reading_bytes == reading > 4 * 300 * 160_000
    assert placement.peak_bytes == placement.device_bytes + reading
    # After the only batch of the only group comes nothing.
    assert place_all([alone], device_free=100 * GIB).first.ahead_bytes == 0


def test_reading_ahead_changes_neither_mode_nor_batch_and_keeps_the_limit() -> None:
    load = replace(make_load(4), demands=((Demand(300, 0, 1), 8),))
    enough = place_all([load], vram_mode="full").first
    for free in (enough.device_bytes, enough.peak_bytes - 1, enough.peak_bytes):
        placements = place_all([load], device_free=free)
        assert (placements.first.mode, placements.first.batch_size) == ("full", None)
        assert placements.peak_bytes <= free
        fits = free == enough.peak_bytes
        assert placements.reads_ahead(load.group, load.group) is fits
        assert placements.first.ahead_bytes == (enough.reading_bytes if fits else 0)


@pytest.mark.parametrize("mode", ["fast", "balanced", "low"])
def test_nothing_is_read_ahead_where_weights_are_streamed(mode: str) -> None:
    placements = place_all([make_load(4)], vram_mode=mode)
    group = make_load(4).group
    assert not placements.reads_ahead(group, group)
    assert placements.peak_bytes == placements.device_bytes


def test_a_long_prompt_of_the_next_group_is_read_ahead_only_if_it_fits() -> None:
    short, long = make_load(4), make_load(4, prompt=9000)
    long = replace(long, group=replace(long.group, think=True))
    assert place_all([short, long], vram_mode="full").reads_ahead(short.group, long.group)
    free = place_all([short, long], vram_mode="full").device_bytes
    placements = place_all([short, long], device_free=free)
    assert placements.reads_ahead(short.group, short.group)
    assert not placements.reads_ahead(long.group, long.group)


def test_smaller_batches_are_preferred_to_streaming_while_passes_are_full() -> None:
    dots = make_edits(16)
    peak = place_all([dots], vram_mode="full").leanest.device_bytes
    chosen = place_all([dots], device_free=peak - GIB).leanest
    assert (chosen.mode, chosen.batch_size) == ("full", 8)
    assert place_all([replace(dots, batch_size=2)], device_free=34 * GIB).leanest.mode != "full"


def test_smaller_batches_are_preferred_to_single_passes_and_to_a_refusal() -> None:
    thinking = make_load(16, prompt=700, text=1024)
    roomy, tight = (
        place_all([thinking], vram_budget_bytes=int(gib * GIB)).leanest for gib in (9, 3.5)
    )
    assert (roomy.mode, roomy.batch_size) == ("balanced", None)
    assert tight.mode == "balanced"
    assert tight.batch_size in (2, 4, 8)
    assert tight.device_bytes <= 3.5 * GIB


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
def test_a_refusal_names_the_smallest_budget_that_fits(memory: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"expected at least \d+\.\d\d GiB") as refused:
        placed(vram_budget_bytes=GIB, **memory)
    assert "for t2i 2048x2048" in str(refused.value)
    said = float(str(refused.value).split("at least ")[1].split(" GiB")[0])
    enough = round(said * GIB)
    assert placed(vram_budget_bytes=enough, **memory).device_bytes <= enough


def test_float8_makes_every_mode_leaner() -> None:
    def peaks(precision: Precision | None) -> list[int]:
        return [
            place_all(vram_mode=mode, precision=precision).device_bytes
            for mode in ("full", "fast", "balanced", "low")
        ]

    plain, fp8, both = peaks(None), peaks(Precision.FP8), peaks(Precision.FP8_ALL)
    full, fast = 0, 1
    assert plain[full] - fp8[full] > 7 * GIB
    assert plain[full] - both[full] > 14 * GIB
    assert plain[fast] - fp8[fast] > 7 * GIB
    # The ring takes layers of the understanding expert, or else parts of the head.
    assert both[2] < fp8[2]
    assert fp8[2] - plain[2] == quantising_bytes(FP8)


def with_demands(load: Load, *prompts: int) -> Load:
    """Returns a load of jobs with prompts of so many tokens."""
    demands = tuple((Demand(tokens, 0, 1), n) for tokens, n in Counter(prompts).items())
    return replace(load, demands=demands, prompt_tokens=max(prompts), batch_size=len(prompts))


SMALL = with_demands(make_load(), 500, 600)
LARGE = with_demands(
    with_drawing(make_load(), resolution=Resolution(height=8192, width=8192)), 500, 500
)


def test_jobs_that_do_not_fit_the_free_memory_are_left_out_and_counted() -> None:
    needed = place_all([LARGE], vram_mode="low").device_bytes
    found = place_all([SMALL, LARGE], device_free=needed - 1)
    assert set(found.groups) == {SMALL.group}
    assert found.of(SMALL.group) == placed([SMALL], device_free=needed - 1)
    (line,) = found.refusals()
    assert line.startswith(
        "2 jobs do not fit and will fail: free device memory: expected at least "
    )
    assert "for t2i 8192x8192, found" in line
    # At once, and not only where there is nothing else to do.
    with pytest.raises(ConfigError, match=r"free device memory: expected .* 8192x8192"):
        place_all([LARGE], device_free=needed - 1)
    assert place_all([SMALL, LARGE], device_free=needed).refused == ()


def test_budget_or_mode_that_somebody_chose_is_an_error_for_all_jobs() -> None:
    needed = place_all([LARGE], vram_mode="low").device_bytes
    with pytest.raises(ConfigError, match="vram_budget: expected at least"):
        place_all([SMALL, LARGE], vram_budget_bytes=needed - 1)
    with pytest.raises(ConfigError, match="free device memory: expected at least"):
        place_all([SMALL, LARGE], device_free=needed - 1, vram_mode="low")


def test_one_long_prompt_does_not_cost_its_group_the_run() -> None:
    mixed = with_demands(make_load(), 500, 600, 500_000)
    found = place_all([mixed], device_free=20 * GIB)
    assert found.of(mixed.group) == placed([SMALL], device_free=20 * GIB)
    (refusal,) = found.refused
    assert refusal.demand.prompt_tokens == 500_000
    assert "2048x2048 with up to 500,000 tokens of prompt, found 20.00 GiB" in refusal.message


def test_demands_that_fit_alone_but_not_together_leave_the_smaller_one() -> None:
    prompt, text = Demand(200_000, 10, 1), Demand(10, 200_000, 1)
    load = replace(make_load(1, prompt=200_000, text=200_000), demands=((prompt, 1), (text, 1)))
    one = max(
        placed([replace(load.of_job(demand))], vram_mode="low").device_bytes
        for demand in (prompt, text)
    )
    found = place_all([load], device_free=one)
    assert len(found.refused) == 1
    assert found.of(load.group).device_bytes <= one


def test_what_does_not_fit_a_cpu_is_left_out_unless_asked_for() -> None:
    needed = place_all([LARGE], vram_mode="full").device_bytes
    one = placed([LARGE.of_job(Demand(500, 0, 1))]).device_bytes
    assert needed > one
    few = place_all([SMALL, LARGE], host_free=one)
    assert (few.refused, few.of(LARGE.group).batch_size) == ((), 1)
    less = place_all([SMALL, LARGE], host_free=one - 1)
    (line,) = less.refusals()
    assert "free host memory: expected at least" in line
    assert line.endswith("; vram_mode full tries it all the same")
    assert place_all([SMALL, LARGE], host_free=one - 1, vram_mode="full").refused == ()
    assert place_all([SMALL, LARGE], host_free=2 * one - 1, num_workers=2).refused
    with pytest.raises(ConfigError, match=r"free host memory: expected .* for the weights"):
        place_all([], host_free=GIB)


def test_jobs_that_take_more_than_a_refused_one_are_refused() -> None:
    rows = [{"prompt": "a " * length, "width": 64, "height": 64} for length in (10, 100, 1000)]
    jobs = list(read_rows(rows, default_config(TINY_MODEL), path=Path("rows")))
    refusal = Refusal(
        group=group_key(jobs[1]),
        demand=demand_of(jobs[1]),
        num_jobs=1,
        needed_bytes=1,
        message="too large",
    )
    found = replace(place_all([SMALL]), refused=(refusal,))
    assert [found.refusal(job) for job in jobs] == [None, "too large", "too large"]


def thoughts(jobs: int, *, batch: int = 16, text: int = 300) -> Load:
    """Returns the load of small images after thoughts, in as many batches as jobs fill."""
    load = make_load(batch, prompt=100, text=text)
    load = with_drawing(load, resolution=Resolution(height=512, width=512), num_steps=4)
    return replace(load, demands=((Demand(100, text, 1), jobs),))


def without_texts(load: Load, together: int) -> int:
    """Returns what the device holds beside texts and the weights that stay: logits of each batch,
    and what all batches share."""
    weights, text = weight_bytes(COMPUTATION), text_memory(COMPUTATION, load)
    return weights.rest + weights.buffers(RING, 0) + text.shared + together * text.of_step


def test_texts_of_as_many_batches_as_fit_are_written_together_where_weights_stream() -> None:
    budget = 7 * GIB
    for jobs, together in ((16, 1), (40, 3), (64, 4), (640, 6)):
        placement = place_all([thoughts(jobs)], vram_budget_bytes=budget).first
        caches = text_memory(COMPUTATION, thoughts(jobs)).of_batch
        assert placement.batch_size is None
        assert placement.text_batches == together
        assert placement.text_bytes is not None
        assert caches <= placement.text_bytes < budget - placement.device_bytes // 8
        assert placement.text_bytes == budget - without_texts(thoughts(jobs), together)
        assert placement.device_bytes <= budget
    # As many as fit if each writes a third of what it may; the others would then wait.
    likely = text_memory(COMPUTATION, thoughts(jobs)).of_likely
    assert together * likely <= placement.text_bytes < (together + 1) * likely
    longer = place_all([thoughts(640, text=1500)], vram_budget_bytes=budget).first
    assert (longer.batch_size, longer.text_batches) == (None, 3)


@pytest.mark.parametrize(
    ("load", "memory"),
    [
        (thoughts(64), {"vram_mode": "full"}),
        (thoughts(64), {"device_free": 60 * GIB}),
        (replace(thoughts(64), text_tokens=0), {"vram_budget_bytes": 7 * GIB}),
        (make_interleave(), {"vram_budget_bytes": 20 * GIB}),
        (make_load(4, text=300), {"device_free": 30 * GIB}),
    ],
)
def test_nothing_changes_where_text_is_resident_or_alternates_with_images(
    load: Load, memory: dict[str, Any]
) -> None:
    placement = place_all([load], **memory).first
    assert (placement.text_batches, placement.text_bytes) == (1, None)


def test_the_host_counts_what_waits_and_limits_how_much_is_written_together() -> None:
    one, four = (place_all([thoughts(n)], vram_budget_bytes=7 * GIB).first for n in (16, 64))
    waiting = cache_bytes(COMPUTATION, 3 * 16 * 400)
    assert four.host_bytes - one.host_bytes >= waiting
    least = one.host_bytes + waiting // 2
    fewer = place_all([thoughts(64)], vram_budget_bytes=7 * GIB, host_budget_bytes=8 * GIB).first
    assert fewer.text_batches < 4
    assert fewer.host_bytes <= 8 * GIB < least
