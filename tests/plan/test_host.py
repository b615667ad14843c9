"""How weights and jobs share host memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensebatch.checkpoint.files import open_checkpoint
from sensebatch.errors import ConfigError
from sensebatch.plan.batches import Demand
from sensebatch.plan.computation import Computation
from sensebatch.plan.host import (
    ENOUGH_BYTES,
    LOADING_BYTES,
    PROGRAM_BYTES,
    HostMemory,
    prepared_bytes,
)
from sensebatch.plan.load import Load
from sensebatch.plan.passes import NUM_PACKED, NUM_STAGING
from sensebatch.plan.weight_bytes import weight_bytes
from sensebatch.resolutions import Resolution
from sensebatch.tasks import Branch
from sensebatch.units import GIB
from tests.plan.loads import (
    COMPUTATION,
    make_interleave,
    make_load,
    place_all,
    placed,
    with_drawing,
)


def test_a_host_budget_shrinks_batches_even_with_all_weights_on_the_device() -> None:
    load = make_load(16, prompt=700, text=1024)
    chosen = place_all([load], device_free=120 * GIB, host_budget_bytes=3 * GIB).leanest
    assert (chosen.mode, chosen.num_buffers) == ("full", None)
    assert chosen.batch_size in (4, 8)
    assert chosen.host_bytes <= 3 * GIB


def test_prefixes_that_do_not_fit_the_host_shrink_batches() -> None:
    edits = with_drawing(make_load(8, prompt=5000), branches=(Branch.COND, Branch.IMG_COND))
    rich = place_all([edits], vram_mode="balanced")
    assert rich.leanest.batch_size is None
    poor = place_all([edits], vram_mode="balanced", host_free=16 * GIB).leanest
    assert poor.batch_size is not None
    assert poor.host_bytes <= 16 * GIB + PROGRAM_BYTES or poor.batch_size == 1
    capped = place_all([edits], vram_mode="balanced", host_budget_bytes=10 * GIB).leanest
    assert capped.batch_size is not None
    assert capped.host_bytes <= 10 * GIB


def test_the_host_keeps_what_its_budget_allows() -> None:
    weights = weight_bytes(COMPUTATION)
    rich = placed(vram_mode="balanced", host_budget_bytes=60 * GIB)
    all_weights = weights.blocks + weights.embeddings + PROGRAM_BYTES
    assert all_weights < rich.host_bytes < all_weights + 2 * GIB
    poor = placed(vram_mode="balanced", host_budget_bytes=20 * GIB)
    assert poor.host_bytes <= 20 * GIB
    assert poor.host_bytes > 20 * GIB - weights.block
    assert placed(vram_mode="full").host_bytes < PROGRAM_BYTES + 2 * GIB


def test_what_is_prepared_ahead_is_that_of_the_batch_that_follows() -> None:
    demand = Demand(prompt_tokens=500, text_tokens=0, max_images=1)
    edits = replace(make_load(4), demands=((demand, 4),))
    more = replace(edits, demands=((demand, 5),))
    small = with_drawing(edits, resolution=Resolution(height=512, width=512))
    own, of_small = prepared_bytes(edits), prepared_bytes(small)
    assert of_small < own

    def peak(*loads: Load) -> int:
        return place_all(list(loads), vram_mode="balanced").groups[edits.group].host_bytes

    assert peak(more) - peak(edits) == own
    assert peak(edits, small) - peak(edits) == of_small
    assert peak(more, small) == peak(more) == peak(make_load(4))


@pytest.mark.parametrize("budget", [None, 60 * GIB])
def test_workers_of_a_host_have_one_copy_of_streamed_weights(budget: int | None) -> None:
    alone, both = [
        placed(vram_mode="balanced", host_budget_bytes=budget, num_workers=count)
        for count in (1, 2)
    ]
    weights = weight_bytes(COMPUTATION)
    besides = alone.host_bytes - weights.blocks - weights.embeddings
    assert besides > PROGRAM_BYTES
    assert both.host_bytes == alone.host_bytes + besides
    assert both.device_bytes == alone.device_bytes


def test_workers_of_a_host_share_its_budget() -> None:
    memory: dict[str, Any] = {"vram_mode": "balanced", "host_budget_bytes": 20 * GIB}
    alone, both = [placed(num_workers=count, **memory) for count in (1, 2)]
    weights = weight_bytes(COMPUTATION)
    assert both.host_bytes == alone.host_bytes == 20 * GIB
    assert alone.host_block_bytes is not None
    assert both.host_block_bytes is not None
    # A second program, and staging buffers of its own.
    less = alone.host_block_bytes - both.host_block_bytes
    besides = 20 * GIB - weights.embeddings - alone.host_block_bytes
    assert less == besides + NUM_STAGING * weights.block
    whole: dict[str, Any] = {"vram_mode": "full", "device_free": 80 * GIB}
    enough = placed(**whole).host_bytes
    with pytest.raises(ConfigError, match="expected cpu to be at least"):
        placed(num_workers=2, host_budget_bytes=enough, **whole)
    placed(num_workers=2, host_budget_bytes=2 * enough, **whole)


def test_a_host_budget_must_cover_the_program_with_all_weights_on_the_device() -> None:
    with pytest.raises(ConfigError, match=r"max_memory: expected cpu to be at least 2\.\d\d GiB"):
        place_all(vram_mode="full", device_free=80 * GIB, host_budget_bytes=GIB)
    # Host and device are one: the program is smaller, and nobody knows by how much.
    assert placed(vram_mode="full", host_budget_bytes=GIB).num_buffers is None


@settings(max_examples=25)
@given(
    budget=st.integers(0, 60 * GIB),
    jobs=st.integers(1, 16),
    prompt=st.integers(1, 9000),
    num_workers=st.integers(1, 8),
)
def test_a_host_budget_is_never_exceeded(
    budget: int, jobs: int, prompt: int, num_workers: int
) -> None:
    loads = [make_load(jobs, prompt=prompt), make_interleave(2)]
    memory: dict[str, Any] = {
        "vram_mode": "balanced",
        "host_budget_bytes": budget,
        "num_workers": num_workers,
    }
    try:
        chosen = place_all(loads, **memory)
    except ConfigError as error:
        said = float(str(error).split("at least ")[1].split(" GiB")[0])
        memory["host_budget_bytes"] = round(said * GIB)
        assert memory["host_budget_bytes"] > budget
        chosen = place_all(loads, **memory)
    for placement in chosen.groups.values():
        assert placement.host_bytes <= memory["host_budget_bytes"]
    assert len({placement.host_block_bytes for placement in chosen.groups.values()}) == 1


@pytest.mark.parametrize("spare", [-1, 0])
def test_blocks_are_packed_within_a_host_budget(spare: int) -> None:
    """What they are read into is as large as two blocks, and there until the last is packed."""
    weights = weight_bytes(replace(COMPUTATION, packs=True))
    packing = NUM_PACKED * weights.block
    assert LOADING_BYTES + packing > PROGRAM_BYTES
    enough = LOADING_BYTES + packing + weights.embeddings + weights.packed_blocks
    host = HostMemory(
        weights=weights, free_bytes=ENOUGH_BYTES, process_bytes=enough + spare, is_apart=True
    )
    blocks = host.block_bytes(0)
    assert (blocks >= weights.packed_blocks) == (spare >= 0)
    assert host.peak_bytes(0, blocks, streams=True) <= enough + spare


@pytest.mark.parametrize("model", ["synthetic:8b", "synthetic:a3b"])
def test_weights_pass_through_the_host_within_a_budget(model: str) -> None:
    computation = Computation(arch=open_checkpoint(model).architecture, item_bytes=2)
    weights = weight_bytes(computation)
    passing = max(weights.embeddings, NUM_STAGING * weights.block)
    host = HostMemory(
        weights=weights, free_bytes=ENOUGH_BYTES, process_bytes=2 * GIB, is_apart=True
    )
    assert not host.holds(0, streams=False)
    assert host.least_bytes(0, streams=False) == LOADING_BYTES + passing
    assert host.peak_bytes(0, 0, streams=False) == LOADING_BYTES + passing


@settings(max_examples=40, deadline=None)
@given(
    vram=st.integers(20 * GIB, 45 * GIB),
    jobs=st.integers(1, 32),
    prompt=st.integers(1, 9000),
    text=st.sampled_from([0, 1024]),
    more=st.integers(0, 8 * GIB),
)
def test_a_host_budget_that_an_error_names_will_do_and_so_will_more(
    vram: int, jobs: int, prompt: int, text: int, more: int
) -> None:
    loads = [make_load(jobs, prompt=prompt, text=text), make_interleave(min(jobs, 8))]
    memory: dict[str, Any] = {"vram_budget_bytes": vram}
    with pytest.raises(ConfigError, match="cpu to be at least") as error:
        place_all(loads, host_budget_bytes=1, **memory)
    said = float(str(error.value).split("at least ")[1].split(" GiB")[0])
    budget = round(said * GIB) + more
    assert place_all(loads, host_budget_bytes=budget, **memory).host_bytes <= budget


def test_weights_leave_a_large_job_its_part_of_what_the_host_has_free() -> None:
    free = 40 * GIB
    vast = with_drawing(make_load(1), resolution=Resolution(height=16384, width=16384))
    large = place_all([vast], vram_mode="balanced", host_free=free).leanest
    assert large.host_bytes <= free + PROGRAM_BYTES
    assert large.host_block_bytes is not None
    small = place_all([make_load(1)], vram_mode="balanced", host_free=free).leanest
    assert small.host_block_bytes is not None
    assert large.host_block_bytes < small.host_block_bytes


def test_more_host_memory_is_never_refused_where_less_would_do() -> None:
    """Larger batches would leave no room for all weights, and those that stream want more yet."""
    memory: dict[str, Any] = {"vram_budget_bytes": 34 * GIB}
    modes = []
    for tenths in range(23, 46):
        budget = tenths * GIB // 10
        chosen = place_all([make_load(16, text=1024)], host_budget_bytes=budget, **memory)
        assert chosen.host_bytes <= budget
        modes.append(chosen.leanest.mode)
    assert modes[0] == "full"
    assert modes[-1] == "fast"
