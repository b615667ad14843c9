"""A batch of different jobs gives what the same jobs give alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from sensebatch.contract import Channel
from sensebatch.engine.memory import places as places_module
from sensebatch.engine.memory.lanes import CpuLane
from sensebatch.engine.memory.places import Places
from sensebatch.engine.runner import Runner
from sensebatch.engine.tasks.interleave import run_interleave
from sensebatch.engine.tasks.noise import Noise
from sensebatch.engine.tasks.registry import runner_of
from sensebatch.engine.tasks.state import PreparedJob, job_generator, prepare_job
from sensebatch.jobs import CfgNorm, Failure, JobResult
from tests.engine.golden_model import (
    KeptImages,
    build_job,
    build_runner,
    draw_together,
    infer,
    succeeded,
)
from tests.golden_data import load_case, relative_error

pytestmark = pytest.mark.slow

BATCH_TOLERANCE = 1e-5


def variant(
    runner: Runner,
    prepared: PreparedJob,
    prompt: str,
    *,
    system: str,
    seed: int,
    cfg_norm: CfgNorm,
    low: float,
    scale: float,
) -> PreparedJob:
    """Returns another job of the same group."""
    sampling = replace(
        prepared.job.sampling, cfg_norm=cfg_norm, cfg_interval=(low, 1.0), cfg_scale=scale
    )
    job = replace(prepared.job, prompt=prompt, seed=seed, sampling=sampling)
    return prepare_job(
        runner.network.arch, runner.tokenizer, job, system_prompt=system, images=prepared.images
    )


def jobs_of(config: str, name: str) -> tuple[Runner, list[PreparedJob]]:
    case = load_case(config, name)
    interleave = case.kind == "interleave"
    system = case.params["system_message"] if interleave else "You draw."
    first = build_job(case, system)
    prompt = first.job.prompt
    mark = "<image> " * prompt.count("<image>")
    # The golden weights make <img> come up after the golden prompt, so it is kept here.
    longer = prompt if interleave else f"{mark}a prompt of another length"
    runner = build_runner(case)
    other = partial(variant, runner, first, system=system)
    return runner, [
        first,
        other(longer, seed=7, cfg_norm=CfgNorm.GLOBAL, low=0.0, scale=3.0),
        other(f"{mark}z", seed=8, cfg_norm=CfgNorm.CHANNEL, low=0.4, scale=2.5),
    ]


def fresh(jobs: list[PreparedJob]) -> list[PreparedJob]:
    """Returns the jobs with their generators at the start."""
    return [replace(job, generator=job_generator(job.job.seed)) for job in jobs]


@pytest.mark.parametrize("config", ["dense_fm", "dense_pixel", "moe"])
@pytest.mark.parametrize(
    "name",
    [
        "t2i_cfg4_none",
        "t2i_think_max",
        "t2i_think_eos",
        "edit_2img_cfg4_img2",
        "edit_2img_onetag_cfg4_img1",
        "edit_think_end",
    ],
)
def test_a_batch_of_single_images_equals_its_jobs_alone(config: str, name: str) -> None:
    runner, jobs = jobs_of(config, name)
    with infer():
        images, thoughts = draw_together(runner, fresh(jobs))
        for index, job in enumerate(fresh(jobs)):
            alone, thought = draw_together(runner, [job])
            assert thoughts[index] == thought[0]
            assert relative_error(images[index], alone[0]) < BATCH_TOLERANCE


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("dense_fm", "il_text_nothink"),
        ("dense_fm", "il_text_think"),
        ("dense_fm", "il_img_nothink"),
        ("moe", "il_img_think"),
    ],
)
def test_a_batch_of_interleave_jobs_equals_its_jobs_alone(config: str, name: str) -> None:
    runner, jobs = jobs_of(config, name)
    kept = KeptImages(len(jobs))
    with infer():
        results = succeeded(run_interleave(runner, fresh(jobs), kept=(), channel=kept))
        for index, job in enumerate(fresh(jobs)):
            alone = KeptImages(1)
            (result,) = succeeded(run_interleave(runner, [job], kept=(), channel=alone))
            assert results[index].text == result.text
            assert len(kept.images[index]) == len(alone.images[0])
            for together, single in zip(kept.images[index], alone.images[0], strict=True):
                assert together.tokens == single.tokens
                error = relative_error(
                    torch.from_numpy(together.image), torch.from_numpy(single.image)
                )
                assert error < BATCH_TOLERANCE
    assert sum(map(len, kept.images)) >= len(jobs)


def test_an_image_that_is_not_finite_fails_its_job_alone() -> None:
    from sensebatch.engine.tasks.single_image import run_single_image

    runner, jobs = jobs_of("dense_fm", "t2i_cfg4_none")
    embed = runner.network.predict_image

    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        x = embed(*args, **options)
        x[2:4] = float("nan")
        return x

    runner.network.predict_image = poisoned
    try:
        with infer():
            results = run_single_image(runner, fresh(jobs), kept=(), channel=Channel())
    finally:
        del runner.network.predict_image
    assert [isinstance(result, Failure) for result in results] == [False, True, False]
    assert isinstance(results[1], Failure)
    assert "expected finite pixels" in results[1].message


def run(runner: Runner, jobs: list[PreparedJob]) -> list[JobResult]:
    run_task = runner_of(jobs[0].job.task).run
    with infer():
        results = run_task(runner, fresh(jobs), kept=(), channel=Channel(), script=None)
    return succeeded(results)


def pixels_of(results: list[JobResult]) -> list[bytes]:
    return [image.tobytes() for result in results for image in result.images]


def test_pixels_are_whole_once_the_device_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pending: list[tuple[np.ndarray, torch.Tensor]] = []
    to_list = torch.Tensor.tolist

    def later(tensor: torch.Tensor) -> np.ndarray:
        pending.append((np.zeros(tensor.shape, dtype=np.uint8), tensor))
        return pending[-1][0]

    def waited(tensor: torch.Tensor) -> Any:
        while pending:
            place, copied = pending.pop()
            place[:] = copied.numpy()
        return to_list(tensor)

    runner, jobs = jobs_of("dense_fm", "t2i_cfg4_none")
    expected = pixels_of(run(runner, jobs))
    monkeypatch.setattr(runner, "copy_pixels", later)
    monkeypatch.setattr(torch.Tensor, "tolist", waited)
    assert pixels_of(run(runner, jobs)) == expected


@pytest.mark.parametrize("name", ["t2i_cfg4_none", "il_text_nothink"])
def test_results_stay_as_they_are_while_other_batches_are_drawn(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places_module, "PinnedMemory", lambda _: None)
    runner, jobs = jobs_of("dense_fm", name)
    expected = pixels_of(run(runner, jobs))
    monkeypatch.setattr(runner, "copy_pixels", Places(CpuLane()).bring)
    results = run(runner, jobs)
    run(runner, jobs[::-1])
    assert pixels_of(results) == expected


def test_noise_is_on_its_way_before_the_steps_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    runner, jobs = jobs_of("dense_fm", "t2i_cfg4_none")
    condition, copy = runner.network.condition, Noise.to

    def conditioned(*args: Any) -> torch.Tensor:
        order.append("steps")
        return condition(*args)

    def copied(noise: Noise, device: torch.device) -> torch.Tensor:
        order.append("noise")
        return copy(noise, device)

    monkeypatch.setattr(runner.network, "condition", conditioned)
    monkeypatch.setattr(Noise, "to", copied)
    run(runner, jobs)
    assert order == ["noise"] * 3 + ["steps"]
