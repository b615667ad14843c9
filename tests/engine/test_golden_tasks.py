"""Whole jobs against the reference: text to image, think, edit and interleave."""

from __future__ import annotations

import pytest
import torch

from sensebatch.engine.model import attention
from sensebatch.engine.sampling.flow_matching import timesteps
from sensebatch.engine.tasks.denoise import Drawing, denoise
from sensebatch.engine.tasks.interleave import run_interleave
from sensebatch.engine.tasks.state import start_jobs
from tests.engine.golden_model import (
    KeptImages,
    build_job,
    build_runner,
    case_resolutions,
    draw_together,
    infer,
)
from tests.golden_data import TOLERANCE, Case, case_ids, load_case, relative_error


@pytest.fixture(params=["masked", "without masks"], autouse=True)
def text_behind_keys(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text attends to earlier keys as on a CPU, and as on a GPU."""
    monkeypatch.setattr(attention, "_forms_scores", lambda _: request.param != "masked")


def generation_prompt(case: Case) -> str:
    """Returns the system turn of a case's conditional query."""
    query = case.strings["query_cond"]
    return query.removeprefix("<|im_start|>system\n").split("<|im_end|>", 1)[0]


def single_image_cases() -> list[tuple[str, str]]:
    ids = case_ids("t2i", "think", "edit", "edit_think")
    return [(config, name) for config, name in ids if name != "t2i_cfg4_batch2"]


@pytest.mark.parametrize(("config", "name"), single_image_cases())
def test_single_images_match_the_reference(config: str, name: str) -> None:
    case = load_case(config, name)
    runner = build_runner(case)
    with infer():
        images, thoughts = draw_together(runner, [build_job(case, generation_prompt(case))])
    assert relative_error(images, case.tensor("final_image")) < TOLERANCE
    if "think_token_ids" in case.outputs:
        assert thoughts == [case.outputs["think_token_ids"]]
        assert runner.tokenizer.decode(thoughts[0]) == case.outputs["think_text"]
    else:
        assert thoughts == [None]


@pytest.mark.parametrize(
    ("config", "name"), [ids for ids in single_image_cases() if "think" not in ids[1]]
)
def test_pictures_follow_the_prefix_at_the_reference_position(config: str, name: str) -> None:
    case = load_case(config, name)
    runner = build_runner(case)
    job = build_job(case, generation_prompt(case))
    with infer():
        (state,) = start_jobs(runner, [job], decodes=False)
    for branch, cache in state.caches.items():
        assert cache.next_t == case.outputs[f"image_t_index_{branch}"]


@pytest.mark.parametrize(("config", "name"), case_ids("t2i"))
def test_timesteps_match_the_reference(config: str, name: str) -> None:
    case = load_case(config, name)
    schedule = timesteps(case.params["num_steps"], case.params["timestep_shift"])
    torch.testing.assert_close(schedule, case.tensor("timesteps"), rtol=0, atol=1e-7)


@pytest.mark.parametrize("config", ["dense_fm", "dense_pixel", "moe"])
def test_a_batch_of_two_matches_the_reference(config: str) -> None:
    case = load_case(config, "t2i_cfg4_batch2")
    runner = build_runner(case)
    jobs = [build_job(case, generation_prompt(case)) for _ in range(2)]
    with infer():
        running = start_jobs(runner, jobs, decodes=False)
        images = denoise(
            runner,
            [
                Drawing(guidance=state.guidance, caches=state.caches, noise=noise)
                for state, noise in zip(running, case.tensor("initial_noise"), strict=True)
            ],
            case_resolutions(case)[0],
            num_steps=case.params["num_steps"],
            timestep_shift=case.params["timestep_shift"],
        )
    assert relative_error(images, case.tensor("final_image")) < TOLERANCE


@pytest.mark.parametrize(("config", "name"), case_ids("interleave"))
def test_interleave_matches_the_reference(config: str, name: str) -> None:
    case = load_case(config, name)
    runner = build_runner(case)
    kept = KeptImages(1)
    job = build_job(case, case.params["system_message"])
    with infer():
        (result,) = run_interleave(runner, [job], kept, resolutions=[case_resolutions(case)])
    assert result.error is None
    assert result.text == case.outputs["generated_text"]
    assert len(result.images) == case.outputs["num_images"]
    assert result.text_tokens == sum(map(len, case.outputs["text_segments_token_ids"]))
    for number, drawn in enumerate(kept.images[0]):
        expected = case.tensor(f"image_{number}")[0]
        assert relative_error(torch.from_numpy(drawn.image), expected) < TOLERANCE
    choices = list(kept.images[0][-1].tokens)
    assert case.outputs["argmax_decisions"][: len(choices)] == choices


@pytest.mark.parametrize(("config", "name"), case_ids("interleave"))
def test_interleave_from_checkpoints_ends_in_the_same_bytes(config: str, name: str) -> None:
    case = load_case(config, name)
    runner = build_runner(case)
    sizes = [case_resolutions(case)]
    whole = KeptImages(1)
    with infer():
        job = build_job(case, case.params["system_message"])
        (expected,) = run_interleave(runner, [job], whole, resolutions=sizes)
        steps = runner.num_denoise_steps
        for count in range(1, len(whole.images[0]) + 1):
            some = KeptImages(1)
            some.images[0] = whole.images[0][:count]
            job = build_job(case, case.params["system_message"])
            (resumed,) = run_interleave(runner, [job], some, resolutions=sizes)
            assert resumed.text == expected.text
            assert [image.tobytes() for image in resumed.images] == [
                image.tobytes() for image in expected.images
            ]
            assert runner.num_denoise_steps == steps + case.params["num_steps"] * (
                len(whole.images[0]) - count
            )
            steps = runner.num_denoise_steps
