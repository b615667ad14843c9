"""Kept images of an interrupted interleave job are taken only where the job says the same again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from sensebatch.contract import Channel, KeptImage
from sensebatch.engine.runner import Runner
from sensebatch.engine.tasks.interleave import run_interleave
from sensebatch.engine.tasks.state import PreparedJob
from sensebatch.jobs import JobResult
from sensebatch.resolutions import Resolution
from tests.engine.golden_model import KeptImages, infer, succeeded
from tests.engine.test_batches import fresh, jobs_of

pytestmark = pytest.mark.slow

Tokens = tuple[int, ...]


@pytest.fixture(scope="module")
def written() -> tuple[Runner, PreparedJob]:
    """Returns a job that draws two images, with a runner of its model."""
    runner, (job, *_) = jobs_of("dense_fm", "il_text_nothink")
    return runner, job


def run(written: tuple[Runner, PreparedJob], kept: KeptImages) -> JobResult:
    runner, job = written
    runner.num_denoise_steps = 0
    with infer():
        (result,) = succeeded(run_interleave(runner, fresh([job]), kept=kept.load(), channel=kept))
    return result


def made(result: JobResult) -> tuple[list[bytes], str | None]:
    return [image.tobytes() for image in result.images], result.text


def spoiled(kept: KeptImage, tokens: Tokens) -> KeptImage:
    """Returns another image, kept after these tokens."""
    return replace(kept, image=np.zeros_like(kept.image), tokens=tokens)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    "change",
    [
        lambda tokens: (tokens[0] + 1, *tokens[1:]),
        lambda tokens: (*tokens[:-2], tokens[-2] + 1, tokens[-1]),
        lambda tokens: (tokens[1], tokens[0], *tokens[2:]),
        lambda tokens: tokens[1:],
        lambda tokens: (tokens[0], *tokens),
        lambda tokens: tokens[:-1],
        lambda tokens: (*tokens, tokens[-1]),
        lambda _: (),
    ],
    ids=["first", "last", "order", "shorter", "longer", "without <img>", "after it", "none"],
)
def test_an_image_kept_after_other_text_is_drawn_again(
    written: tuple[Runner, PreparedJob], number: int, change: Callable[[Tokens], Tokens]
) -> None:
    runner, job = written
    whole = KeptImages(1)
    expected = made(run(written, whole))
    kept = KeptImages(1)
    kept.images[0] = list(whole.images[0])
    one = kept.images[0][number]
    kept.images[0][number] = spoiled(one, change(one.tokens))
    assert made(run(written, kept)) == expected
    assert runner.num_denoise_steps == job.job.sampling.num_steps
    assert runner.num_kept_images == len(whole.images[0]) - 1


def test_an_image_kept_after_the_same_text_is_taken(
    written: tuple[Runner, PreparedJob],
) -> None:
    runner, _ = written
    whole = KeptImages(1)
    result = run(written, whole)
    kept = KeptImages(1)
    kept.images[0] = [spoiled(one, one.tokens) for one in whole.images[0]][:1]
    taken = run(written, kept)
    assert runner.num_kept_images == 1
    assert made(taken) != made(result)
    assert not (taken.images[0] - 128).any()


def test_each_image_of_a_job_has_its_own_size_and_later_ones_the_last(
    written: tuple[Runner, PreparedJob],
) -> None:
    runner, job = written
    job = replace(job, job=replace(job.job, sampling=replace(job.job.sampling, max_images=3)))
    sizes = [Resolution(height=64, width=96), Resolution(height=32, width=64)]
    with infer():
        results = run_interleave(
            runner, fresh([job]), kept=(), channel=Channel(), resolutions=[sizes]
        )
    (result,) = succeeded(results)
    assert [image.shape[:2] for image in result.images] == [(64, 96), (32, 64), (32, 64)]
