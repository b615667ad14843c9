"""Schedule, noise scale, guidance intervals and stops, even where no golden loop covers them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from sensebatch.checkpoint.architecture import parse_architecture
from sensebatch.config import default_config
from sensebatch.contract import Channel
from sensebatch.engine.sampling.flow_matching import (
    SERIAL_NUMBERS,
    initial_noise,
    noise_scale,
    timesteps,
    velocity_from_image,
)
from sensebatch.engine.sampling.guidance import Guidance
from sensebatch.engine.tasks.interleave import run_interleave
from sensebatch.jobs import CfgNorm
from sensebatch.tasks import Branch, Task
from tests.engine.golden_model import build_job, build_runner, infer, succeeded
from tests.golden_data import GOLDEN, golden_config, load_case

SCHEDULE = json.loads((GOLDEN / "common" / "schedule.json").read_text())
SAMPLING = default_config("official").tasks[Task.T2I].sampling


@pytest.mark.parametrize("case", SCHEDULE["timesteps"])
def test_timesteps_match_the_reference(case: dict[str, Any]) -> None:
    found = timesteps(case["num_steps"], case["timestep_shift"])
    expected = torch.tensor(case["timesteps"], dtype=torch.float64).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", SCHEDULE["noise_scale"])
def test_noise_scale_matches_the_reference(case: dict[str, Any]) -> None:
    arch = parse_architecture(golden_config(case["config"]))
    found = noise_scale(
        case["image_tokens"],
        scale=arch.noise_scale,
        mode=arch.noise_scale_mode,
        base_image_seq_len=arch.noise_scale_base_image_seq_len,
        max_value=arch.noise_scale_max_value,
    )
    assert found == pytest.approx(case["noise_scale"], rel=1e-6)
    ratio = found / arch.noise_scale_max_value
    assert ratio == pytest.approx(case["embedder_input"], rel=1e-6)


@pytest.mark.parametrize(
    ("mode", "expected"), [("resolution", 8.0), ("dynamic", 8.0), ("dynamic_sqrt", 8.0**0.5)]
)
def test_noise_scale_of_each_mode(mode: str, expected: float) -> None:
    found = noise_scale(4 * 64, scale=4.0, mode=mode, base_image_seq_len=64, max_value=100.0)
    assert found == pytest.approx(expected)
    capped = noise_scale(4 * 64, scale=4.0, mode=mode, base_image_seq_len=64, max_value=2.0)
    assert capped == 2.0


def test_the_velocity_near_the_end_is_divided_by_a_fiftieth() -> None:
    x, z = torch.tensor([1.0]), torch.tensor([0.0])
    assert velocity_from_image(x, z, 0.5).item() == pytest.approx(2.0)
    assert velocity_from_image(x, z, 0.999).item() == pytest.approx(50.0)


def test_later_images_of_a_job_have_other_noise_from_the_same_generator() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (initial_noise(32, 64, 2.0, generator) for _ in range(2))
    again = torch.Generator().manual_seed(1)
    assert torch.equal(initial_noise(32, 64, 2.0, again), first)
    assert torch.equal(initial_noise(32, 64, 2.0, again), second)
    assert not torch.equal(first, second)


def test_noise_in_memory_that_is_given_is_the_same() -> None:
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    place = torch.zeros(3 * 32 * 64)
    noise = initial_noise(32, 64, 2.0, generators[0], place)
    assert noise.data_ptr() == place.data_ptr()
    assert torch.equal(noise, initial_noise(32, 64, 2.0, generators[1]))
    assert torch.equal(*(generator.get_state() for generator in generators))


@pytest.mark.parametrize(
    ("task", "interval", "t", "active"),
    [
        (Task.T2I, (0.25, 0.75), 0.25, True),
        (Task.T2I, (0.25, 0.75), 0.75, True),
        (Task.T2I, (0.25, 0.75), 0.76, False),
        (Task.T2I, (0.0, 0.5), 0.9, False),
        (Task.EDIT, (0.25, 0.75), 0.25, False),
        (Task.EDIT, (0.25, 0.75), 0.5, True),
        (Task.EDIT, (0.25, 0.75), 0.75, False),
        (Task.EDIT, (0.0, 0.5), 0.9, True),
        (Task.INTERLEAVE, (0.25, 0.75), 0.75, False),
        (Task.INTERLEAVE, (0.0, 0.5), 0.9, True),
    ],
)
def test_the_interval_is_closed_for_t2i_and_open_for_the_others(
    task: Task, interval: tuple[float, float], t: float, active: bool
) -> None:
    guidance = Guidance(task, replace(SAMPLING, cfg_interval=interval))
    assert guidance.active(t) is active
    (step,) = guidance.evaluations([t])
    assert (len(step.branches) == 1) is not active


ON_THE_SCHEDULE = [
    (10, 1.0, (0.0, 0.3), {Task.T2I: [0, 1, 2, 3], Task.EDIT: [*range(10)]}),
    (10, 1.0, (0.3, 0.7), {Task.T2I: [3, 4, 5, 6, 7], Task.EDIT: [4, 5, 6]}),
    (8, 3.0, (0.7, 1.0), {Task.T2I: [7], Task.EDIT: []}),
    (8, 3.0, (0.1, 0.7), {Task.T2I: [2, 3, 4, 5, 6, 7], Task.EDIT: [2, 3, 4, 5, 6]}),
    (4, 3.0, (0.25, 0.5), {Task.T2I: [2, 3], Task.EDIT: []}),
]
"""(steps, shift, interval, guided steps): at least one end of each interval is a timestep."""


@pytest.mark.parametrize("task", [task for task in Task if task.spec.drawing])
@pytest.mark.parametrize(("num_steps", "shift", "interval", "guided"), ON_THE_SCHEDULE)
def test_interval_ends_on_a_timestep_are_compared_in_float32(
    task: Task,
    num_steps: int,
    shift: float,
    interval: tuple[float, float],
    guided: dict[Task, list[int]],
) -> None:
    guidance = Guidance(task, replace(SAMPLING, cfg_interval=interval))
    schedule = timesteps(num_steps, shift)[:-1]
    found = [step for step, t in enumerate(schedule.tolist()) if guidance.active(t)]
    assert found == guided[Task.T2I if task is Task.T2I else Task.EDIT]
    # The reference compares the schedule's own float32 numbers with the ends.
    low, high = interval
    inside = (
        (schedule >= low) & (schedule <= high)
        if task is Task.T2I
        else (schedule > low) & (schedule < high) | torch.tensor(low == 0)
    )
    assert found == inside.nonzero().flatten().tolist()


FACTOR = 2 / (2 * 4.0**2 + 2 * 0.4**2) ** 0.5
"""The length of the conditional velocity below by that of the guided one."""


@pytest.mark.parametrize(
    ("norm", "expected"),
    [(CfgNorm.GLOBAL, (4.0 * FACTOR, 0.4 * FACTOR)), (CfgNorm.CHANNEL, (1.0, 0.4))],
)
def test_a_guided_velocity_is_made_shorter_and_never_longer(
    norm: CfgNorm, expected: tuple[float, float]
) -> None:
    """Two tokens of two numbers: guidance makes the first 4 of 1, and the second 0.4 of 1."""
    cond = torch.ones(2, 2)
    uncond = torch.tensor([[0.0, 0.0], [1.2, 1.2]])
    guidance = Guidance(Task.T2I, replace(SAMPLING, cfg_scale=4.0, cfg_norm=norm))
    found = guidance.combine({Branch.COND: cond, Branch.UNCOND: uncond}, 1)
    torch.testing.assert_close(found, torch.tensor(expected)[:, None].expand(2, 2))
    alone = guidance.combine({Branch.COND: cond[1:], Branch.UNCOND: uncond[1:]}, 1)
    torch.testing.assert_close(alone, torch.full((1, 2), 0.4))


def test_cfg_zero_star_stands_still_at_step_0_only_where_guidance_is_active() -> None:
    velocities = {Branch.COND: torch.ones(4, 3), Branch.UNCOND: torch.full((4, 3), 0.5)}
    sampling = replace(SAMPLING, cfg_norm=CfgNorm.CFG_ZERO_STAR, cfg_interval=(0.5, 1.0))
    guidance = Guidance(Task.T2I, sampling)
    inside, outside = guidance.evaluations([0.6, 0.1])
    assert (inside.branches, outside.branches) == ((Branch.COND, Branch.UNCOND), (Branch.COND,))
    assert torch.equal(guidance.combine(velocities, 0), torch.zeros(4, 3))
    alone = {Branch.COND: velocities[Branch.COND]}
    assert torch.equal(guidance.combine(alone, 0), velocities[Branch.COND])
    assert guidance.combine(velocities, 1).abs().sum() > 0


def test_an_interleave_job_stops_at_its_last_image() -> None:
    case = load_case("dense_fm", "il_text_nothink")
    runner = build_runner(case)
    prepared = build_job(case, case.params["system_message"])
    job = replace(prepared.job, sampling=replace(prepared.job.sampling, max_images=1))
    with infer():
        results = run_interleave(runner, [replace(prepared, job=job)], kept=(), channel=Channel())
    (result,) = succeeded(results)
    assert case.outputs["num_images"] > 1
    assert len(result.images) == 1
    assert result.text is not None
    assert result.text.endswith("<image>")


def test_noise_is_scaled_as_one_tensor_would_be() -> None:
    # More numbers than are scaled at a time, and not a multiple of them.
    height, width, scale = 96, 3 * 64, 2.3
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    noise = initial_noise(height, width, scale, generators[0])
    assert noise.numel() % SERIAL_NUMBERS
    expected = scale * torch.randn(1, 3, height, width, generator=generators[1])[0]
    assert torch.equal(noise, expected)
