"""Least times, compared with what was measured of a machine by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensebatch.checkpoint.architecture import A3B, parse_architecture
from sensebatch.jobs import Drawing, GroupKey, Precision, Stored
from sensebatch.plan.batches import Demand
from sensebatch.plan.computation import Computation
from sensebatch.plan.load import Load, interleave_tokens
from sensebatch.plan.seconds import Clock, GroupSeconds, new_clock
from sensebatch.plan.weight_bytes import weight_bytes
from sensebatch.plan.work import (
    Speeds,
    Work,
    denoising_work,
    network_sizes,
    understanding_work,
)
from sensebatch.resolutions import Resolution
from sensebatch.tasks import Branch, Task
from sensebatch.units import GIB
from tests.plan.loads import ARCH, COMPUTATION, place_all, with_drawing

SIZES = network_sizes(ARCH)
H200 = Speeds(
    copy_bytes_per_s=51.6 * GIB,
    gemm_flop_per_s=734e12,
    attention_flop_per_s=604e12,
    memory_bytes_per_s=4e12,
)
"""Measured on one H200; a decoder layer's products of 8192 rows took 4.31 ms there, attention of
two branches of 4096 queries and 4416 keys 0.98 ms, so that a step could not take less than
0.222 s. Reads were not measured; denoising is far from their limit."""
STEPS = 50
PREFIX = 320


def make_load(
    batch_size: int = 1, *, text_tokens: int = 0, num_images: int = 0, prompt: int = PREFIX
) -> Load:
    size = Resolution(height=2048, width=2048)
    group = GroupKey(
        task=Task.INTERLEAVE if num_images else Task.T2I,
        think=text_tokens > 0,
        drawing=Drawing(
            resolution=size,
            num_steps=STEPS,
            timestep_shift=3.0,
            branches=(Branch.COND, Branch.UNCOND),
        ),
    )
    return Load(
        group=group,
        batch_size=batch_size,
        prompt_tokens=prompt,
        text_tokens=text_tokens,
        drawn_tokens=interleave_tokens(size.image_tokens, num_images) if num_images else 0,
    )


def seconds(load: Load, num_jobs: int = 1, *, speeds: Speeds = H200, **memory: Any) -> GroupSeconds:
    placement = place_all([load], **memory).of(load.group)
    return Clock(COMPUTATION, speeds).group_seconds(load, num_jobs, placement)


def step(load: Load, num_jobs: int = 1, **memory: Any) -> float:
    """Returns the seconds of a denoising step a job, all else spread over the steps."""
    return seconds(load, num_jobs, **memory).images / STEPS / num_jobs


def test_a_layer_takes_as_long_as_its_parts_were_measured_to() -> None:
    work = denoising_work(COMPUTATION, SIZES, tokens=4096, images=1, prefixes=[PREFIX, PREFIX])
    layers = 2 * 8192 * SIZES.generation_matrices
    assert layers / ARCH.num_layers / H200.gemm_flop_per_s == pytest.approx(4.31e-3, rel=0.002)
    attention = work.attention_flop / ARCH.num_layers / H200.attention_flop_per_s
    assert attention == pytest.approx(0.98e-3, rel=0.002)


def test_a_resident_step_takes_as_long_as_the_limit_found_by_hand() -> None:
    work = denoising_work(COMPUTATION, SIZES, tokens=4096, images=1, prefixes=[PREFIX, PREFIX])
    # The embedders and the head, which the limit leaves out, are half a percent.
    assert work.seconds(H200) == pytest.approx(0.222, rel=0.01)
    assert step(make_load(), vram_mode="full") == pytest.approx(0.222, rel=0.01)


def test_one_streamed_job_waits_for_copies_and_two_hide_them() -> None:
    copies = weight_bytes(COMPUTATION).generation_layers / H200.copy_bytes_per_s
    assert copies == pytest.approx(0.293, rel=0.003)
    # Beside the steps there is one pass over the prompt, which copies as much.
    alone = step(make_load(), vram_mode="balanced")
    assert alone == pytest.approx(copies * (STEPS + 1) / STEPS, rel=0.001)
    assert alone > 0.293
    hidden = step(make_load(2), 2, vram_mode="balanced")
    assert hidden == pytest.approx(0.222 + copies / STEPS / 2, rel=0.01)
    assert step(make_load(2), 2, vram_mode="low") == pytest.approx(copies, rel=0.02)


def test_steps_without_the_middle_layers_compute_and_copy_a_third_of_them() -> None:
    load = with_drawing(make_load(), layer_stride=2)
    # The first step, every second from the next one on, which the last is one of, and a third of
    # the 24 others.
    evaluated = 26 + 24 / 3
    assert seconds(load, vram_mode="full").images == pytest.approx(0.222 * evaluated, rel=0.01)
    copies = weight_bytes(COMPUTATION).generation_layers / H200.copy_bytes_per_s
    streamed = seconds(load, vram_mode="low").images
    assert streamed == pytest.approx(copies * (evaluated + 1), rel=0.01)
    # Blocks that stay are not copied, which the steps with all of them bring.
    assert seconds(load, vram_mode="fast").images < 0.23 * evaluated + copies


def test_decoding_takes_as_long_as_reading_the_weights() -> None:
    work = seconds(make_load(text_tokens=1000), vram_mode="full")
    weights = 2 * (SIZES.understanding_matrices + SIZES.vocabulary_head)
    # Caches are read as well, and the text makes the image's prefix longer.
    least = 1000 * weights / H200.memory_bytes_per_s
    assert least < work.text < 1.1 * least
    together = seconds(make_load(4, text_tokens=1000), 4, vram_mode="full")
    assert together.text < 1.5 * work.text


def test_text_that_is_not_allowed_takes_no_time() -> None:
    assert seconds(make_load(), vram_mode="full").text == 0


def test_each_image_of_an_interleave_job_takes_longer_than_the_one_before() -> None:
    times = [seconds(make_load(num_images=count), vram_mode="full").images for count in range(1, 6)]
    growth = [later - earlier for earlier, later in pairwise(times)]
    assert growth == sorted(growth)
    assert growth[0] > times[0]


@settings(max_examples=20)
@given(jobs=st.integers(1, 40), batch_size=st.integers(1, 8), budget=st.integers(3, 60))
def test_less_memory_never_makes_a_run_faster(jobs: int, batch_size: int, budget: int) -> None:
    load = make_load(batch_size)
    full = seconds(load, jobs, vram_mode="full").images
    roomy = seconds(load, jobs, vram_budget_bytes=(budget + 8) * GIB).images
    tight = seconds(load, jobs, vram_budget_bytes=budget * GIB).images
    assert full <= roomy * (1 + 1e-9)
    assert roomy <= tight * (1 + 1e-9)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("copy_bytes_per_s", "low"),
        ("gemm_flop_per_s", "full"),
        ("attention_flop_per_s", "full"),
        ("memory_bytes_per_s", "full"),
    ],
)
def test_every_speed_matters(name: str, mode: str) -> None:
    load = make_load(text_tokens=100)
    slower = replace(H200, **{name: getattr(H200, name) / 10})
    before = seconds(load, vram_mode=mode)
    after = seconds(load, vram_mode=mode, speeds=slower)
    assert after.images + after.text > before.images + before.text


def test_a_smaller_last_batch_is_counted() -> None:
    times = [seconds(make_load(4), jobs, vram_mode="full").images for jobs in (4, 5, 8)]
    assert times[0] < times[1] < times[2]
    assert times[2] == pytest.approx(2 * times[0])


def test_8_bits_halve_the_time_of_products_and_of_copies() -> None:
    computation = replace(COMPUTATION, precision=Precision.INT8)
    assert new_clock(computation, H200) is None
    fast = replace(H200, quantised_flop_per_s={Stored.INT8: 2 * H200.gemm_flop_per_s})
    clock = new_clock(computation, fast)
    assert clock is not None
    load = make_load()
    copies = weight_bytes(COMPUTATION).generation_layers / H200.copy_bytes_per_s
    products = 2 * 8192 * SIZES.generation_matrices / H200.gemm_flop_per_s
    for mode, expected in (
        ("full", step(load, vram_mode="full") - products / 2),
        # The prompts' pass copies an expert that is not quantised.
        ("low", copies / 2 + copies / STEPS),
    ):
        placement = place_all([load], precision=Precision.INT8, vram_mode=mode).of(load.group)
        found = clock.group_seconds(load, 1, placement).images / STEPS
        assert found == pytest.approx(expected, rel=0.01)


def test_products_of_few_rows_wait_for_their_weights() -> None:
    work = Work(gemm_flop=1, attention_flop=1, weight_bytes=8 * 10**12, cache_bytes=4 * 10**12)
    assert work.seconds(H200) == pytest.approx(3.0)


def test_tokens_read_the_weights_of_all_experts_that_some_of_them_go_to() -> None:
    arch = parse_architecture(A3B)
    moe = arch.understanding_moe
    assert moe is not None
    computation, sizes = Computation(arch=arch, item_bytes=2), network_sizes(arch)
    one, sixteen, many = (
        understanding_work(computation, sizes, [(1, 100)] * count).weight_bytes / 2
        for count in (1, 16, 5000)
    )
    # Of 128 experts, sixteen tokens with eight each meet 82.4 on average, and thousands meet all.
    an_expert = arch.num_layers * 3 * arch.hidden_size * moe.intermediate_size
    assert one == sizes.understanding_matrices
    assert (sixteen - one) / an_expert + 8 == pytest.approx(82.42, abs=0.01)
    assert (many - one) / an_expert + 8 == pytest.approx(moe.num_experts)
    step = denoising_work(computation, sizes, tokens=4096, images=1, prefixes=[PREFIX, PREFIX])
    assert step.weight_bytes / 2 > sizes.generation_matrices + 23 * an_expert


def test_texts_that_are_written_together_wait_for_weights_once() -> None:
    load = make_load(16, text_tokens=300, prompt=100)
    text = []
    for jobs in (16, 64):
        several = replace(load, demands=((Demand(100, 300, 1), jobs),))
        text.append(seconds(several, jobs, vram_budget_bytes=7 * GIB).text)
    # Four times the caches leave less of the weights on the device.
    assert text[0] < text[1] < 1.5 * text[0]
    assert 64 * 300 / text[1] == pytest.approx(245, rel=0.1)
    longer = replace(load, text_tokens=1800, demands=((Demand(100, 1800, 1), 64),))
    # Not all of them have room at once.
    assert 9 < seconds(longer, 64, vram_budget_bytes=7 * GIB).text / text[1] < 15
