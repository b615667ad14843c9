"""Synthetic weights keep to a script: what is decoded is what the settings say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from sensebatch.contract import Channel, Progress
from sensebatch.engine.engine import synthetic_text
from sensebatch.engine.runner import Runner
from sensebatch.engine.sampling.text import Writing, decode_text
from sensebatch.engine.tasks.interleave import run_interleave
from sensebatch.engine.tasks.single_image import run_single_image
from sensebatch.engine.tasks.state import PreparedJob
from sensebatch.tasks import Task
from tests.engine.golden_model import KeptImages, build_job, build_runner, infer, succeeded
from tests.engine.test_batches import fresh
from tests.engine.test_engine import generate, load, make_config, make_job
from tests.golden_data import ByteTokenizer, load_case

SCRIPT = synthetic_text(ByteTokenizer())
AND = " "


def runner_and_job(name: str, **sampling: Any) -> tuple[Runner, PreparedJob]:
    case = load_case("dense_fm", name)
    prepared = build_job(case, "You talk.")
    changed = replace(prepared.job.sampling, num_steps=1, **sampling)
    return build_runner(case), replace(prepared, job=replace(prepared.job, sampling=changed))


# The network of the first would stop by itself, that of the second would not.
@pytest.mark.parametrize("name", ["t2i_think_eos", "t2i_think_max"])
def test_thoughts_have_as_many_tokens_as_they_may(name: str) -> None:
    runner, job = runner_and_job(name, max_think_tokens=9)
    shorter = replace(job.job.sampling, max_think_tokens=4)
    jobs = [job, replace(job, job=replace(job.job, sampling=shorter))]
    steps: list[Progress] = []
    runner.progress = steps.append
    with infer():
        results = succeeded(
            run_single_image(runner, fresh(jobs), kept=(), channel=Channel(), script=SCRIPT)
        )
    assert [(result.think_tokens, result.text) for result in results] == [
        (9, 9 * AND),
        (4, 4 * AND),
    ]
    assert len([step for step in steps if step.phase == "think"]) == 9


@pytest.mark.parametrize(
    ("max_new_tokens", "max_images", "share"), [(18, 3, 6), (19, 3, 6), (2, 3, 1)]
)
def test_stories_have_an_even_share_of_text_before_every_image(
    max_new_tokens: int, max_images: int, share: int
) -> None:
    runner, job = runner_and_job(
        "il_text_nothink", max_new_tokens=max_new_tokens, max_images=max_images
    )
    with infer():
        (result,) = succeeded(
            run_interleave(runner, [job], kept=(), channel=Channel(), script=SCRIPT)
        )
    assert result.text == max_images * (share * AND + "<image>")
    assert len(result.images) == max_images
    assert result.text_tokens == max_images * share


def test_an_interleave_job_continues_from_its_images_to_the_same_bytes() -> None:
    runner, job = runner_and_job("il_text_nothink", max_new_tokens=9, max_images=3)
    whole = KeptImages(1)
    with infer():
        (expected,) = succeeded(
            run_interleave(runner, fresh([job]), kept=(), channel=whole, script=SCRIPT)
        )
        kept = [whole.images[0][:2]]
        runner.num_denoise_steps = 0
        (resumed,) = succeeded(
            run_interleave(runner, fresh([job]), kept=kept, channel=Channel(), script=SCRIPT)
        )
    assert runner.num_denoise_steps == 1
    assert [image.tobytes() for image in resumed.images] == [
        image.tobytes() for image in expected.images
    ]
    assert resumed.text == expected.text


def test_choices_are_replaced_and_passes_are_not() -> None:
    taken = []

    def step(pairs: Sequence[tuple[int, int]]) -> list[int]:
        taken.append(pairs)
        return [0 for _ in pairs]

    writing = Writing(
        {0: 0, 1: 5}, {0: 3, 1: 2}, stop_before=frozenset({0}), scripts={0: [1, 2, 3]}
    )
    decoded = decode_text(writing, step)
    assert decoded[0].tokens == [1, 2, 3]
    assert (decoded[1].tokens, decoded[1].stopped_by) == ([5], 0)
    assert taken == [[(0, 1), (1, 5)], [(0, 2)], [(0, 3)]]


@pytest.mark.slow
def test_only_synthetic_weights_keep_to_a_script() -> None:
    sampling = replace(make_job("a").sampling, max_think_tokens=7, max_new_tokens=8, max_images=2)
    think = make_job("a", think=True, sampling=sampling)
    tell = make_job("b", task=Task.INTERLEAVE, sampling=sampling)
    (thought,) = succeeded(generate(load(make_config(), "synthetic:tiny"), think).results)
    (result,) = succeeded(generate(load(make_config(), "synthetic:tiny"), tell).results)
    assert (thought.text, thought.think_tokens) == (7 * " and", 7)
    assert (result.text, result.text_tokens) == (2 * (4 * " and" + "<image>"), 8)
    assert succeeded(generate(load(make_config()), think).results)[0].text != thought.text
