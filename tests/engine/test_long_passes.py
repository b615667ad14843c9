"""Passes with more rows, prompts or images than are taken at a time, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sensebatch.contract import Channel
from sensebatch.engine import runner as runner_module
from sensebatch.engine.tasks.interleave import run_interleave
from sensebatch.engine.tasks.state import PreparedJob, prepare_job
from sensebatch.plan import passes
from sensebatch.tasks import Branch
from tests.engine.golden_model import (
    build_job,
    build_runner,
    draw_together,
    golden_step,
    infer,
    predict,
    prefill_text,
    succeeded,
)
from tests.engine.test_batches import BATCH_TOLERANCE, fresh, jobs_of
from tests.golden_data import CONFIGS, TOLERANCE, load_case, relative_error

pytestmark = pytest.mark.slow


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of a layer and the final norm take four rows at a time: less than an image has."""
    monkeypatch.setattr(passes, "ROWS", 4)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("config", CONFIGS)
def test_prompts_of_many_rows_match_the_reference(config: str) -> None:
    case = load_case(config, "prefix_text")
    runner = build_runner(case)
    with infer():
        cache, hidden = prefill_text(runner, case)
    assert len(hidden) > 2 * 4
    assert relative_error(hidden, case.tensor("last_hidden_state")[0]) < TOLERANCE
    keys, values = cache.read(runner.network.arch.num_layers - 1)
    for found, name in ((keys, "key"), (values, "value")):
        expected = case.tensor(f"{name}_{runner.network.arch.num_layers - 1}")
        assert relative_error(found.transpose(0, 1).reshape(expected.shape), expected) < TOLERANCE


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("config", CONFIGS)
def test_images_of_many_rows_match_the_reference(config: str) -> None:
    case = load_case(config, "gen_step_t0.37")
    runner = build_runner(case)
    with infer():
        step = golden_step(runner, case)
        found = step.velocity(predict(runner, step))
    expected = case.tensor("v_pred")
    assert relative_error(found.reshape(expected.shape), expected) < TOLERANCE


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("config", CONFIGS)
def test_guided_images_of_many_rows_match_the_reference(config: str) -> None:
    """As images of 2048x2048, whose guidance branches are several times `ROWS` together."""
    case = load_case(config, "t2i_cfg4_none")
    query = case.strings["query_cond"].removeprefix("<|im_start|>system\n")
    with infer():
        job = build_job(case, query.split("<|im_end|>", 1)[0])
        images, _ = draw_together(build_runner(case), [job])
    assert relative_error(images, case.tensor("final_image")) < TOLERANCE


@pytest.mark.parametrize("images_per_part", [1, 2, 4])
@pytest.mark.parametrize("config", CONFIGS)
def test_each_of_many_images_of_a_pass_equals_the_one_drawn_alone(
    config: str, images_per_part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = load_case(config, "t2i_cfg4_none")
    runner = build_runner(case)
    first = build_job(case, "You draw.")
    tokens = first.job.resolution.image_tokens
    monkeypatch.setattr(passes, "ROWS", images_per_part * tokens)
    jobs = [
        replace(
            first, job=replace(first.job, seed=seed), noise=first.noise.to("cpu") * (1 + seed / 10)
        )
        for seed in range(9)
    ]
    with infer():
        images, _ = draw_together(runner, jobs)
        for image, job in zip(images, jobs, strict=True):
            alone, _ = draw_together(runner, [job])
            assert relative_error(image, alone[0]) < BATCH_TOLERANCE


def test_each_thought_is_its_own_where_prompts_take_several_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner, jobs = jobs_of("dense_fm", "t2i_think_max")
    with infer():
        alone = [draw_together(runner, [job])[1][0] for job in fresh(jobs)]
        assert len({thought[0] for thought in alone if thought}) > 1
        # The first two prompts share a pass, and the third has one of its own.
        longest = max(len(job.prompts[Branch.COND].token_ids) for job in jobs)
        monkeypatch.setattr(runner_module, "MAX_PREFILL_TOKENS", longest)
        assert draw_together(runner, fresh(jobs))[1] == alone
        assert draw_together(runner, fresh(jobs[::-1]))[1] == alone[::-1]


def test_each_interleave_job_says_its_own_text_where_prompts_take_several_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner, (first, *_) = jobs_of("dense_fm", "il_text_nothink")
    sampling = replace(first.job.sampling, max_new_tokens=4, max_images=1)
    jobs = [
        prepare_job(
            runner.network.arch,
            runner.tokenizer,
            replace(first.job, prompt=prompt, sampling=sampling),
            system_prompt="",
        )
        for prompt in (first.job.prompt, "another prompt", "b")
    ]

    def texts(jobs: list[PreparedJob]) -> list[str | None]:
        with infer():
            results = run_interleave(runner, fresh(jobs), kept=(), channel=Channel())
        return [result.text for result in succeeded(results)]

    alone = [texts([job])[0] for job in jobs]
    assert len(set(alone)) == len(jobs)
    monkeypatch.setattr(runner_module, "MAX_PREFILL_TOKENS", 1)
    assert texts(jobs) == alone
