"""A stop is heeded between passes and rounds; what was finished is kept, and nothing else lost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from sensebatch.contract import Channel, Drawn, Progress
from sensebatch.engine.engine import SenseNovaEngine
from sensebatch.engine.model.attention import sdpa
from sensebatch.engine.runner import Runner
from sensebatch.engine.tasks import interleave, single_image
from sensebatch.engine.tasks.interleave import run_interleave
from sensebatch.engine.tasks.state import RunningJob, start_jobs
from sensebatch.errors import BatchStoppedError, StorageFullError
from sensebatch.jobs import BatchResult, Failure, Job
from sensebatch.plan import passes
from sensebatch.tasks import Task
from tests.engine.golden_model import KeptImages, infer, succeeded
from tests.engine.test_batches import fresh, jobs_of
from tests.engine.test_engine import generate, load, make_config, make_job, pixels

pytestmark = pytest.mark.slow

NUM_STEPS = 2
NUM_ROUNDS = 3
NUM_TOKENS = 4
"""Tokens of a thought, or before each image of an interleave job; every job writes so many."""


@dataclass
class Stop:
    """Stops a batch once it has reported its progress so many times in a phase; None at once."""

    phase: str | None = None
    after: int = 0
    seen: list[str] = field(default_factory=list)
    """The phase of everything it reported."""

    def report(self, progress: Progress) -> None:
        self.seen.append(progress.phase)

    def __call__(self) -> bool:
        return self.phase is None or self.seen.count(self.phase) >= self.after


NEVER = Stop("never", 1)


@pytest.fixture
def after_prompts(monkeypatch: pytest.MonkeyPatch) -> Stop:
    """Stops a batch once its prompts are read."""
    stop = replace(NEVER)

    def watched(*args: Any, **options: Any) -> list[RunningJob]:
        running = start_jobs(*args, **options)
        stop.phase = None
        return running

    for module in (single_image, interleave):
        monkeypatch.setattr(module, "start_jobs", watched)
    return stop


@pytest.fixture(scope="module")
def engine() -> SenseNovaEngine:
    """Draws one image a pass; with synthetic weights, so that it writes what it is to write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "LOW_TOKENS_PER_PASS", 1)
        return load(make_config(vram_mode="low"), "synthetic:tiny")


def make_jobs(task: Task = Task.T2I, *, think: bool = False, rounds: int = NUM_ROUNDS) -> list[Job]:
    sampling = replace(
        make_job("a").sampling,
        num_steps=NUM_STEPS,
        max_think_tokens=NUM_TOKENS,
        max_images=rounds,
        max_new_tokens=rounds * NUM_TOKENS,
    )
    names = ("a", "bb", "ccc") if task is Task.T2I else ("a", "bb")
    return [make_job(name, task=task, think=think, sampling=sampling) for name in names]


def run(
    engine: SenseNovaEngine, jobs: Sequence[Job], kept: KeptImages | None = None, stop: Stop = NEVER
) -> BatchResult:
    return generate(engine, *jobs, kept=kept, progress=stop.report, stop=stop)


def outputs(result: BatchResult) -> tuple[list[bytes], list[str | None]]:
    return pixels(result), [job.text for job in succeeded(result.results)]


def num_kept(kept: KeptImages) -> list[int]:
    return [len(images) for images in kept.images]


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_batch_stops_after_the_pass_that_is_drawn_and_continues_from_there(
    engine: SenseNovaEngine, think: bool, step: int
) -> None:
    jobs, kept, stop = make_jobs(think=think), KeptImages(3), Stop("denoise", step)
    expected = run(engine, jobs)
    with pytest.raises(BatchStoppedError):
        run(engine, jobs, kept, stop)
    num_passes = -(-step // NUM_STEPS)
    assert stop.seen.count("denoise") == num_passes * NUM_STEPS
    assert num_kept(kept) == [1] * num_passes + [0] * (3 - num_passes)
    resumed = run(engine, jobs, kept)
    assert resumed.metrics.num_denoise_steps == (3 - num_passes) * NUM_STEPS
    assert resumed.metrics.num_kept_images == num_passes
    assert outputs(resumed) == outputs(expected)


@pytest.mark.parametrize(
    ("stop", "num_tokens"),
    [(Stop(), 0), (Stop("think", 2), 2), (Stop("think", NUM_TOKENS), NUM_TOKENS)],
)
@pytest.mark.parametrize("task", [Task.T2I, Task.INTERLEAVE])
def test_a_batch_that_has_drawn_nothing_stops_at_once(
    engine: SenseNovaEngine, task: Task, stop: Stop, num_tokens: int
) -> None:
    jobs = make_jobs(task, think=True)
    kept, stop = KeptImages(len(jobs)), replace(stop, seen=[])
    with pytest.raises(BatchStoppedError):
        run(engine, jobs, kept, stop)
    assert stop.seen == ["think"] * num_tokens
    assert not any(num_kept(kept))
    assert outputs(run(engine, jobs, kept)) == outputs(run(engine, jobs))


def test_a_stop_in_the_last_pass_is_not_heeded(engine: SenseNovaEngine) -> None:
    jobs = make_jobs()
    result = run(engine, jobs, stop=Stop("denoise", 2 * NUM_STEPS + 1))
    assert outputs(result) == outputs(run(engine, jobs))


def test_a_stop_before_passes_that_are_all_kept_is_not_heeded(
    engine: SenseNovaEngine, after_prompts: Stop
) -> None:
    jobs, kept = make_jobs(), KeptImages(3)
    expected = run(engine, jobs, kept)
    # Both images of a batch of two.
    kept.images = kept.images[:2]
    after_prompts.phase = "never"
    assert pixels(run(engine, jobs[:2], kept, after_prompts)) == pixels(expected)[:2]


@pytest.mark.parametrize("think", [False, True])
def test_a_batch_of_one_pass_is_finished_once_its_prompts_are_read(
    engine: SenseNovaEngine, think: bool, after_prompts: Stop
) -> None:
    (job, *_) = make_jobs(think=think)
    result = run(engine, [job], stop=after_prompts)
    after_prompts.phase = "never"
    assert outputs(result) == outputs(run(engine, [job]))


@pytest.mark.parametrize("task", [Task.T2I, Task.INTERLEAVE])
@pytest.mark.parametrize("layers", [0, 1, 5])
def test_a_stop_is_heeded_between_the_layers_of_prompts(
    engine: SenseNovaEngine, monkeypatch: pytest.MonkeyPatch, task: Task, layers: int
) -> None:
    """Also by a batch that would be finished once it draws."""
    (job, *_) = make_jobs(task, rounds=1)
    attended = itertools.count()
    asked = 0

    def attention(*args: Any) -> torch.Tensor:
        next(attended)
        return sdpa(*args)

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > layers

    monkeypatch.setattr(engine, "_attention", attention)
    monkeypatch.setattr(engine, "_system_turns", {})
    with pytest.raises(BatchStoppedError, match="read its prompts"):
        generate(engine, job, stop=stop)
    assert next(attended) == layers
    assert outputs(run(engine, [job])) == outputs(run(engine, [job]))


@pytest.mark.parametrize("step", [1, 4, 5])
def test_interleave_jobs_stop_after_the_round_that_is_drawn_and_continue_from_there(
    engine: SenseNovaEngine, step: int
) -> None:
    jobs, kept, stop = make_jobs(Task.INTERLEAVE), KeptImages(2), Stop("denoise", step)
    expected = run(engine, jobs)
    with pytest.raises(BatchStoppedError):
        run(engine, jobs, kept, stop)
    of_round = 2 * NUM_STEPS
    num_rounds = -(-step // of_round)
    assert stop.seen.count("denoise") == num_rounds * of_round
    # Nothing is read back or written after the images.
    assert stop.seen[-1] == "denoise"
    assert num_kept(kept) == [num_rounds] * 2
    resumed = run(engine, jobs, kept)
    assert resumed.metrics.num_denoise_steps == (NUM_ROUNDS - num_rounds) * of_round
    assert (resumed.metrics.num_kept_images, expected.metrics.num_kept_images) == (
        2 * num_rounds,
        0,
    )
    assert outputs(resumed) == outputs(expected)


def test_kept_images_of_an_interleave_job_that_fails_are_not_counted(
    engine: SenseNovaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, kept = make_jobs(Task.INTERLEAVE), KeptImages(2)
    with pytest.raises(BatchStoppedError):
        run(engine, jobs, kept, Stop("denoise", 1))
    assert num_kept(kept) == [1, 1]
    predict, calls = engine._network.predict_image, itertools.count(1)

    def fails_at_first(*args: Any, **options: Any) -> torch.Tensor:
        x = predict(*args, **options)
        return x * float("nan") if next(calls) == 1 else x

    monkeypatch.setattr(engine._network, "predict_image", fails_at_first)
    resumed = run(engine, jobs, kept)
    failed, written = resumed.results
    assert isinstance(failed, Failure)
    assert len(succeeded([written])[0].images) == NUM_ROUNDS
    assert resumed.metrics.num_kept_images == 1


def test_interleave_jobs_stop_before_the_next_round_is_drawn(engine: SenseNovaEngine) -> None:
    jobs, kept, stop = make_jobs(Task.INTERLEAVE), KeptImages(2), Stop("think", NUM_TOKENS + 1)
    with pytest.raises(BatchStoppedError):
        run(engine, jobs, kept, stop)
    assert stop.seen.count("think") == 2 * NUM_TOKENS
    assert num_kept(kept) == [1, 1]
    assert outputs(run(engine, jobs, kept)) == outputs(run(engine, jobs))


def test_a_stop_in_the_last_round_is_not_heeded(engine: SenseNovaEngine) -> None:
    jobs = make_jobs(Task.INTERLEAVE)
    stop = Stop("denoise", 2 * (NUM_ROUNDS - 1) * NUM_STEPS + 1)
    assert outputs(run(engine, jobs, stop=stop)) == outputs(run(engine, jobs))


def test_a_stop_in_the_text_after_the_last_image_is_not_heeded() -> None:
    """Interleave jobs that end by themselves, in the third round at the latest."""
    runner, jobs = jobs_of("dense_fm", "il_text_think")
    stop = Stop("think", 2 + 4 + 1)
    watched = Runner(
        network=runner.network,
        tokenizer=runner.tokenizer,
        attention=runner.attention,
        progress=stop.report,
        stop=stop,
    )
    with infer():
        expected = succeeded(run_interleave(runner, fresh(jobs), kept=(), channel=Channel()))
        found = succeeded(run_interleave(watched, fresh(jobs), kept=(), channel=Channel()))
    phases = [(phase, len(list(steps))) for phase, steps in itertools.groupby(stop.seen)]
    assert phases == [("think", 2), ("denoise", 3), ("think", 4), ("denoise", 3), ("think", 3)]
    assert [job.text for job in found] == [job.text for job in expected]


def test_interleave_jobs_of_one_image_are_finished(
    engine: SenseNovaEngine, after_prompts: Stop
) -> None:
    jobs = make_jobs(Task.INTERLEAVE, rounds=1)
    result = run(engine, jobs, stop=after_prompts)
    after_prompts.phase = "never"
    assert outputs(result) == outputs(run(engine, jobs))


class FullDisk(KeptImages):
    """Has no room for an image."""

    def keep(self, drawn: Drawn) -> None:  # noqa: ARG002
        raise StorageFullError("no room left on the disk")


def test_a_stop_does_not_hide_that_images_could_not_be_kept(engine: SenseNovaEngine) -> None:
    with pytest.raises(StorageFullError, match="no room left"):
        run(engine, make_jobs(), FullDisk(3), Stop("denoise", 1))


def test_the_waiting_after_a_stopped_batch_is_not_reported(engine: SenseNovaEngine) -> None:
    run(engine, make_jobs())
    with pytest.raises(BatchStoppedError):
        run(engine, make_jobs(), stop=Stop())
    assert run(engine, make_jobs()).metrics.wait_s is None


def test_a_batch_in_which_one_job_has_more_images_heeds_a_stop(
    engine: SenseNovaEngine,
) -> None:
    jobs = make_jobs(Task.INTERLEAVE)
    jobs[0] = replace(jobs[0], sampling=replace(jobs[0].sampling, max_images=1))
    with pytest.raises(BatchStoppedError):
        run(engine, jobs, stop=Stop())
