"""Whole jobs against the reference: text to image, think, edit and interleave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch

from sensebatch.contract import Channel
from sensebatch.engine.model import attention
from sensebatch.engine.model.patchify import tokens_to_image
from sensebatch.engine.runner import Runner
from sensebatch.engine.sampling.flow_matching import timesteps
from sensebatch.engine.sampling.guidance import Guidance
from sensebatch.engine.sampling.solvers import integrate
from sensebatch.engine.tasks import denoise as denoise_module
from sensebatch.engine.tasks import interleave
from sensebatch.engine.tasks.denoise import Canvas, denoise, draw_noise, image_noise_scale
from sensebatch.engine.tasks.interleave import run_interleave
from sensebatch.engine.tasks.state import start_jobs
from sensebatch.jobs import Solver
from sensebatch.tasks import Branch
from tests.engine import golden_model
from tests.engine.drawings import drawing_of
from tests.engine.golden_model import (
    TASKS,
    KeptImages,
    build_job,
    build_runner,
    case_resolutions,
    draw_together,
    infer,
    succeeded,
    watch_logits,
)
from tests.golden_data import (
    TOLERANCE,
    Case,
    case_ids,
    golden_architecture,
    load_case,
    relative_error,
)

pytestmark = pytest.mark.slow


@pytest.fixture(params=["masked", "without masks"], autouse=True)
def text_after_keys(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text attends to earlier keys as on a CPU, and as on a GPU without kernels."""
    if request.param != "masked":
        monkeypatch.setattr(golden_model, "sdpa", attention.attend_without_mask)


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
def test_images_follow_the_prefix_at_the_reference_position(config: str, name: str) -> None:
    case = load_case(config, name)
    runner = build_runner(case)
    job = build_job(case, generation_prompt(case))
    with infer():
        (state,) = start_jobs(runner, [job], decodes=False)
    for branch, cache in state.caches.items():
        assert cache.next_t == case.outputs[f"image_t_index_{branch}"]


def assert_drawn_from(
    case: Case, *, timesteps_name: str, noise_name: str, generator: torch.Generator
) -> None:
    """Checks the schedule of an image of a case, and the noise that a job's generator gives."""
    schedule = timesteps(case.params["num_steps"], case.params["timestep_shift"])
    torch.testing.assert_close(schedule, case.tensor(timesteps_name), rtol=0, atol=1e-7)
    arch = golden_architecture(case.config)
    noise = draw_noise(arch, case_resolutions(case)[0], generator)
    assert relative_error(noise[None], case.tensor(noise_name)[:1]) < TOLERANCE


@pytest.mark.parametrize(("config", "name"), case_ids("t2i", "think", "edit", "edit_think"))
def test_schedule_and_noise_match_the_reference(config: str, name: str) -> None:
    case = load_case(config, name)
    generator = torch.Generator().manual_seed(case.params["seed"])
    assert_drawn_from(
        case, timesteps_name="timesteps", noise_name="initial_noise", generator=generator
    )


@pytest.mark.parametrize(("config", "name"), case_ids("interleave"))
def test_schedules_and_noises_of_interleave_jobs_match_the_reference(
    config: str, name: str
) -> None:
    case = load_case(config, name)
    generator = torch.Generator().manual_seed(case.params["seed"])
    for number in range(case.outputs["num_images"]):
        assert_drawn_from(
            case,
            timesteps_name=f"timesteps_{number}",
            noise_name=f"initial_noise_{number}",
            generator=generator,
        )
        scale = image_noise_scale(golden_architecture(config), case_resolutions(case)[0])
        assert scale == pytest.approx(case.outputs["noise_scales"][number], rel=1e-6)


def test_every_step_of_an_image_matches_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    case = load_case("dense_fm", "t2i_cfg4_none")
    states: list[torch.Tensor] = []
    velocities: list[dict[str, torch.Tensor]] = []
    combine = Guidance.combine

    def watched_integrate(
        z: torch.Tensor, schedule: torch.Tensor, velocity: Any, solver: Solver
    ) -> torch.Tensor:
        def watched(z_JNx: torch.Tensor, *args: Any) -> torch.Tensor:
            states.append(z_JNx.clone())
            return velocity(z_JNx, *args)

        return integrate(z, schedule, watched, solver)

    def watched_combine(
        self: Guidance, found: Mapping[Branch, torch.Tensor], step: int
    ) -> torch.Tensor:
        velocities.append({branch: v.clone() for branch, v in found.items()})
        return combine(self, found, step)

    monkeypatch.setattr(denoise_module, "integrate", watched_integrate)
    monkeypatch.setattr(Guidance, "combine", watched_combine)
    with infer():
        draw_together(build_runner(case), [build_job(case, generation_prompt(case))])
    size = case_resolutions(case)[0]
    for number, state in enumerate(states[1:]):
        image = tokens_to_image(state, size.height, size.width)
        assert relative_error(image, case.tensor(f"image_after_step_{number}")) < TOLERANCE
    assert len(states) == len(velocities) == 4
    for branch, found in velocities[1].items():
        expected = case.tensor(f"v_{branch}_step_1")
        assert relative_error(found.reshape(expected.shape), expected) < TOLERANCE


def assert_chosen_from(seen: Sequence[torch.Tensor], case: Case) -> None:
    expected = case.tensor("step_logits")
    # A thought that `</think>` has ended is not asked what follows, but the pass has computed it.
    found = torch.cat(list(seen))[: len(expected)]
    assert relative_error(found, expected) < TOLERANCE
    assert found.argmax(-1).tolist() == case.outputs["argmax_decisions"]


@pytest.mark.parametrize(("config", "name"), case_ids("think", "edit_think", configs=["dense_fm"]))
def test_thoughts_are_chosen_from_the_logits_of_the_reference(
    config: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = load_case(config, name)
    runner = build_runner(case)
    seen = watch_logits(runner, monkeypatch)
    with infer():
        draw_together(runner, [build_job(case, generation_prompt(case))])
    assert_chosen_from(seen, case)


@pytest.mark.parametrize(("config", "name"), case_ids("edit"))
def test_each_step_of_an_edit_evaluates_the_branches_of_the_reference(
    config: str, name: str
) -> None:
    case = load_case(config, name)
    sampling = build_job(case, "").job.sampling
    schedule = timesteps(sampling.num_steps, sampling.timestep_shift)[:-1].tolist()
    guidance = Guidance(TASKS[case.kind], sampling)
    found = [len(step.branches) for step in guidance.evaluations(schedule)]
    assert found == case.outputs["branch_calls_per_step"]


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
                Canvas(guidance=state.guidance, caches=state.caches, noise=noise)
                for state, noise in zip(running, case.tensor("initial_noise"), strict=True)
            ],
            drawing=drawing_of(
                running[0].guidance,
                case_resolutions(case)[0],
                num_steps=case.params["num_steps"],
                timestep_shift=case.params["timestep_shift"],
            ),
        )
    assert relative_error(images, case.tensor("final_image")) < TOLERANCE


@pytest.mark.parametrize(("config", "name"), case_ids("interleave"))
def test_interleave_matches_the_reference(config: str, name: str) -> None:
    case = load_case(config, name)
    runner = build_runner(case)
    kept = KeptImages(1)
    job = build_job(case, case.params["system_message"])
    with infer():
        results = run_interleave(
            runner, [job], kept=kept.load(), channel=kept, resolutions=[case_resolutions(case)]
        )
    (result,) = succeeded(results)
    assert result.text == case.outputs["generated_text"]
    assert len(result.images) == case.outputs["num_images"]
    assert result.text_tokens == sum(map(len, case.outputs["text_segments_token_ids"]))
    for number, drawn in enumerate(kept.images[0]):
        expected = case.tensor(f"image_{number}")[0]
        assert relative_error(torch.from_numpy(drawn.image), expected) < TOLERANCE
    choices = list(kept.images[0][-1].tokens)
    assert case.outputs["argmax_decisions"][: len(choices)] == choices


BRANCHES = {Branch.COND: "cond", Branch.IMG_COND: "text_uncond", Branch.UNCOND: "img_uncond"}
"""Names of branches, here and in the reference."""


@pytest.mark.parametrize(("config", "name"), case_ids("interleave"))
def test_what_interleave_jobs_read_and_choose_from_matches_the_reference(
    config: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = load_case(config, name)
    runner = build_runner(case)
    seen = watch_logits(runner, monkeypatch)
    embedded: list[torch.Tensor] = []
    places: list[dict[str, int]] = []
    embed_images = runner.embed_images

    def watched_embed(images: Iterable[Any]) -> list[torch.Tensor]:
        embeds = embed_images(images)
        embedded.extend(embeds)
        return embeds

    def watched_denoise(
        runner: Runner, canvases: Sequence[Canvas], *args: Any, **options: Any
    ) -> torch.Tensor:
        places.append(
            {BRANCHES[branch]: cache.next_t for branch, cache in canvases[0].caches.items()}
        )
        return denoise(runner, canvases, *args, **options)

    monkeypatch.setattr(runner, "embed_images", watched_embed)
    monkeypatch.setattr(interleave, "denoise", watched_denoise)
    job = build_job(case, case.params["system_message"])
    with infer():
        run_interleave(
            runner, [job], kept=(), channel=Channel(), resolutions=[case_resolutions(case)]
        )
    for number, found in enumerate(embedded[len(job.images) :]):
        assert relative_error(found, case.tensor(f"reencoded_und_embeds_{number}")) < TOLERANCE
    assert len(embedded) == len(job.images) + case.outputs["num_images"]
    for place, expected in zip(places, case.outputs["image_t_index"], strict=True):
        assert place == {branch: expected[branch] for branch in place}
    if "step_logits" in case:
        assert_chosen_from(seen, case)


@pytest.mark.parametrize(("config", "name"), case_ids("interleave"))
def test_interleave_from_kept_images_ends_in_the_same_bytes(config: str, name: str) -> None:
    case = load_case(config, name)
    runner = build_runner(case)
    sizes = [case_resolutions(case)]
    whole = KeptImages(1)
    with infer():
        job = build_job(case, case.params["system_message"])
        (expected,) = succeeded(
            run_interleave(runner, [job], kept=(), channel=whole, resolutions=sizes)
        )
        steps = runner.num_denoise_steps
        for count in range(1, len(whole.images[0]) + 1):
            job = build_job(case, case.params["system_message"])
            kept = [whole.images[0][:count]]
            resumed_jobs = run_interleave(
                runner, [job], kept=kept, channel=Channel(), resolutions=sizes
            )
            (resumed,) = succeeded(resumed_jobs)
            assert resumed.text == expected.text
            assert [image.tobytes() for image in resumed.images] == [
                image.tobytes() for image in expected.images
            ]
            assert runner.num_denoise_steps == steps + case.params["num_steps"] * (
                len(whole.images[0]) - count
            )
            steps = runner.num_denoise_steps
