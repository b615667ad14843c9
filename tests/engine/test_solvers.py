"""Solvers against flows whose solution is known, and what the reuse of guidance computes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sensebatch.engine.model.attention import sdpa
from sensebatch.engine.model.patchify import tokens_to_image
from sensebatch.engine.runner import Runner
from sensebatch.engine.sampling.flow_matching import explicit_timesteps, timesteps
from sensebatch.engine.sampling.guidance import Guidance
from sensebatch.engine.sampling.solvers import SOLVERS, integrate
from sensebatch.engine.tasks.denoise import Canvas, denoise
from sensebatch.jobs import CfgNorm, Solver
from sensebatch.resolutions import Resolution
from sensebatch.tasks import Branch, Task
from tests.engine.drawings import drawing_of
from tests.engine.golden_model import infer
from tests.engine.memory.test_estimates import small_network
from tests.engine.test_sampling import SAMPLING
from tests.golden_data import ByteTokenizer

SECOND_ORDER = [Solver.AB2, Solver.DPM2M]


def _error(solver: Solver, schedule: Tensor) -> float:
    """Returns the error at t = 1 of dx/dt = cos(3 t) x from 1, in double precision."""

    def velocity(z: Tensor, step: int, t: float) -> Tensor:
        assert t == schedule[step].item()
        return math.cos(3 * t) * z

    z = integrate(torch.ones(1, 1, 1, dtype=torch.float64), schedule, velocity, solver)
    return abs(z.item() - math.exp(math.sin(3) / 3))


def test_every_solver_has_a_row() -> None:
    assert list(SOLVERS) == list(Solver)


@pytest.mark.parametrize("solver", Solver)
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_the_error_falls_with_the_order_of_the_solver(solver: Solver, shift: float) -> None:
    coarse, fine = (_error(solver, timesteps(steps, shift).double()) for steps in (24, 48))
    order = math.log2(coarse / fine)
    assert order == pytest.approx(1 if solver is Solver.EULER else 2, abs=0.3)


@pytest.mark.parametrize("solver", SECOND_ORDER)
def test_steps_of_any_length_keep_the_order(solver: Solver) -> None:
    def uneven(steps: int) -> Tensor:
        return torch.tensor([(i / steps) ** 1.7 for i in range(steps + 1)], dtype=torch.float64)

    assert math.log2(_error(solver, uneven(24)) / _error(solver, uneven(48))) > 1.6


@pytest.mark.parametrize("solver", Solver)
def test_a_predicted_image_that_never_changes_is_reached_by_any_steps(solver: Solver) -> None:
    image = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(2))
    schedule = explicit_timesteps((0.1, 0.15, 0.6, 0.9))

    def towards(z: Tensor, _: int, t: float) -> Tensor:
        return (image - z) / (1 - t)

    found = integrate(noise.clone(), schedule, towards, solver)
    torch.testing.assert_close(found, image, rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", Solver)
def test_every_step_evaluates_once_and_changes_the_noise_in_place(solver: Solver) -> None:
    seen = []

    def velocity(z: Tensor, step: int, _: float) -> Tensor:
        seen.append(step)
        return torch.ones_like(z)

    noise = torch.zeros(1, 1, 1)
    assert integrate(noise, timesteps(7, 3.0), velocity, solver) is noise
    assert seen == list(range(7))
    assert noise.item() == pytest.approx(1)


def test_explicit_timesteps_stand_between_0_and_1_in_float32() -> None:
    found = explicit_timesteps((0.1, 0.7))
    assert found.dtype == torch.float32
    assert found.tolist() == torch.tensor([0.0, 0.1, 0.7, 1.0]).tolist()


def test_guidance_is_evaluated_in_every_nth_step_of_its_own_interval() -> None:
    sampling = replace(SAMPLING, cfg_scale=4.0, cfg_interval=(0.25, 0.8), guidance_stride=3)
    steps = Guidance(Task.T2I, sampling).evaluations([0.0, 0.25, 0.4, 0.5, 0.6, 0.7, 0.9])
    full = (Branch.COND, Branch.UNCOND)
    assert [len(step.branches) for step in steps] == [1, 2, 1, 1, 2, 1, 1]
    assert [step.branches for step in steps if step.keeps_effect] == [full, full]
    assert [step.uses_effect for step in steps] == [False, False, True, True, False, True, False]


def test_without_a_stride_no_effect_is_kept() -> None:
    steps = Guidance(Task.T2I, replace(SAMPLING, cfg_scale=4.0)).evaluations([0.0, 0.5])
    assert not any(step.keeps_effect or step.uses_effect for step in steps)


def test_the_step_that_cfg_zero_star_leaves_out_is_not_used_again() -> None:
    sampling = replace(SAMPLING, cfg_scale=4.0, cfg_norm=CfgNorm.CFG_ZERO_STAR, guidance_stride=2)
    steps = Guidance(Task.T2I, sampling).evaluations([0.0, 0.2, 0.4, 0.6])
    assert [step.uses_effect for step in steps] == [False, False, True, False]


def test_an_effect_that_never_changes_is_as_good_as_a_fresh_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a network that predicts the same images at every step."""
    network, size = small_network(), Resolution(height=64, width=64)
    runner = Runner(network=network, tokenizer=ByteTokenizer(), attention=sdpa)
    cond, uncond = torch.randn(2, size.image_tokens, 3072, generator=torch.Generator())
    num_evaluations = []

    def predict(_z: Tensor, *args: Any, **_: Any) -> Tensor:
        num_evaluations.append(len(args[-1]))
        return torch.stack([cond, uncond][: len(args[-1])])

    monkeypatch.setattr(network, "predict_image", predict)
    drawn = {}
    for stride in (1, 3):
        guidance = Guidance(Task.T2I, replace(SAMPLING, cfg_scale=3.0, guidance_stride=stride))
        caches = {branch: network.new_cache() for branch in guidance.branches}
        canvas = Canvas(guidance=guidance, caches=caches, noise=torch.ones(3, 64, 64))
        drawing = drawing_of(guidance, size, num_steps=5, guidance_stride=stride)
        with infer():
            drawn[stride] = denoise(runner, [canvas], drawing=drawing)
    assert num_evaluations == [2] * 5 + [2, 1, 1, 2, 1]
    torch.testing.assert_close(drawn[3], drawn[1], rtol=0, atol=1e-4)
    expected = tokens_to_image((uncond + 3 * (cond - uncond))[None], 64, 64)
    torch.testing.assert_close(drawn[1], expected, rtol=0, atol=1e-4)
