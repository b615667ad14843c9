"""Prompts that are read while another batch is drawn: in time, and to the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from sensebatch.config import MemoryConfig
from sensebatch.contract import Channel, Phase, Progress, Raised
from sensebatch.engine.model.kv_cache import KVCache
from sensebatch.engine.model.steps import Paced, run_through
from sensebatch.engine.tasks import state
from sensebatch.engine.tasks.single_image import run_single_image
from sensebatch.executor.worker import EngineWorker
from sensebatch.jobs import Batch, BatchResult, Job, batch_id, group_key
from sensebatch.plan.batches import make_plan, plan_entry
from sensebatch.plan.computation import Computation
from sensebatch.plan.footprint import reading_bytes
from sensebatch.plan.load import Load, group_load
from sensebatch.tasks import Branch, Task
from tests.engine.golden_model import build_job, build_runner, infer, succeeded
from tests.engine.memory.tracker import LiveBytes
from tests.engine.test_engine import load, make_config, make_job, planned, png
from tests.engine.test_system_turns import CountingRunner, prepared
from tests.golden_data import load_case

Work = list[str]


class Watched(Channel):
    """Notes each step of drawing among what else the engine does."""

    def __init__(self, work: Work, name: str) -> None:
        self._work, self._name = work, name

    def progress(self, progress: Progress) -> None:
        if progress.phase is Phase.DENOISE:
            self._work.append(f"{self._name} step {progress.step} of {progress.num_steps}")


def batches_of(*tasks: tuple[Task, bool]) -> list[Batch]:
    """Returns a batch of two small jobs for each task, with or without thinking."""
    batches = []
    for number, (task, thinks) in enumerate(tasks):
        changes: dict[str, Any] = {"task": task, "think": thinks}
        if task.spec.takes_images and task is Task.EDIT:
            changes["images"] = (planned(64, 64),)
        jobs = tuple(make_job(f"{'ab'[i]}{number}", **changes) for i in range(2))
        jobs = tuple(_short(job) for job in jobs)
        keys = tuple(job.id for job in jobs)
        batches.append(Batch(id=batch_id(keys), group=group_key(jobs[0]), jobs=jobs, keys=keys))
    return batches


def _short(job: Job) -> Job:
    return replace(
        job, sampling=replace(job.sampling, num_steps=3, max_images=1, max_new_tokens=64)
    )


def run(
    batches: Sequence[Batch], *, ahead: bool, work: Work | None = None, **memory: Any
) -> list[BatchResult]:
    """Returns what batches come to in one engine, one after the other."""
    loads = [
        group_load(make_plan(map(plan_entry, batch.jobs), MemoryConfig()).groups[0])
        for batch in {batch.group: batch for batch in batches}.values()
    ]
    worker = EngineWorker(load(make_config("full", **memory), loads=loads))
    for number, batch in enumerate(batches):
        for place, job in enumerate(batch.jobs):
            inputs = [png(64, 64) for _ in job.images]
            assert worker.prepare(number, place, job, inputs) is None
        if ahead:
            worker.expect(number)
    results = []
    for number, batch in enumerate(batches):
        channel = Watched([] if work is None else work, batch.jobs[0].id)
        outcome = worker.generate(number, batch, kept=(), channel=channel)
        assert not isinstance(outcome, Raised), outcome
        worker.release(number)
        results.append(outcome)
    return results


def made(results: Sequence[BatchResult]) -> list[Any]:
    return [
        ([image.tobytes() for image in job.images], job.text)
        for result in results
        for job in succeeded(result.results)
    ]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Work:
    """Notes when the prompts of a batch have been read."""
    work: Work = []
    read_prompts = state.read_prompts

    def noted(runner: Any, jobs: Any, decodes: bool = False) -> Any:
        found = yield from read_prompts(runner, jobs, decodes)
        work.append(f"read {jobs[0].job.id}")
        return found

    monkeypatch.setattr(state, "read_prompts", noted)
    return work


def test_prompts_are_read_before_the_last_step_of_the_batch_before_has_ended(
    watched: Work,
) -> None:
    run(batches_of(*[(Task.T2I, False)] * 3), ahead=True, work=watched)
    assert watched == [
        "read a0",
        *(f"a0 step {step} of 3" for step in (1, 2, 3)),
        "read a1",
        *(f"a1 step {step} of 3" for step in (1, 2, 3)),
        "read a2",
        *(f"a2 step {step} of 3" for step in (1, 2, 3)),
    ]


def test_reading_is_spread_over_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    layers: list[int] = []
    advance = Paced.advance

    def counted(self: Paced[Any], num_calls: int) -> None:
        before = self._left
        advance(self, num_calls)
        layers.append(before - self._left)

    monkeypatch.setattr(Paced, "advance", counted)
    run(batches_of(*[(Task.T2I, False)] * 2), ahead=True)
    # Of the system turn nothing is left to be read; the last call is the one that ends it.
    assert len(layers) == 4
    assert layers[0] > 0
    assert max(layers[:3]) - min(layers[:3]) <= 1
    assert layers[3] == 0


@pytest.mark.parametrize("name", ["t2i_cfg4_none", "edit_2img_cfg4_img2"])
@pytest.mark.parametrize("tokens_of_a_pass", [100, 9216])
def test_as_many_steps_are_expected_as_there_are(
    name: str, tokens_of_a_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sensebatch.engine.runner.MAX_PREFILL_TOKENS", tokens_of_a_pass)
    case = load_case("dense_fm", name)
    runner, jobs = build_runner(case), [build_job(case, "Draw. ")] * 2
    found = []
    with infer():
        # The system turn is there the second time.
        for _ in range(2):
            expected = state.read_ahead(runner, jobs)._left
            found.append(sum(1 for _ in state.read_prompts(runner, jobs)))
            assert found[-1] == expected
    assert found[0] == found[1] + runner.network.arch.num_layers


@pytest.mark.parametrize("system", ["", "a rule. " * 5])
def test_each_step_gives_memory_to_one_job(system: str) -> None:
    runner = CountingRunner()
    batch = [prepared(runner, f"{'y' * 20} {number}", system=system) for number in range(4)]
    caches: list[KVCache] = []
    new_cache, fork = runner.network.new_cache, KVCache.fork

    def noted(cache: KVCache) -> KVCache:
        caches.append(cache)
        return cache

    with infer(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(runner.network, "new_cache", lambda: noted(new_cache()))
        patched.setattr(KVCache, "fork", lambda cache, room=0: noted(fork(cache, room)))
        steps = state.read_prompts(runner, batch)
        have_room = []
        for _ in steps:
            # The system turn's cache is the first that has memory.
            have_room.append(sum(bool(cache.layers[0].shape[1]) for cache in caches))
    branches = len(batch[0].prompts)
    first = have_room.index(branches + bool(system))
    gains = [after - before for before, after in pairwise(have_room[first:])]
    assert gains[:3] == [branches - 1] * 3
    assert not any(gains[3:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "tasks",
    [
        [(Task.T2I, False)] * 3,
        [(Task.T2I, True)] * 2,
        [(Task.EDIT, False)] * 2,
        [(Task.INTERLEAVE, True)] * 2,
        [(Task.T2I, False), (Task.EDIT, False), (Task.T2I, True), (Task.INTERLEAVE, True)],
    ],
)
def test_what_is_read_ahead_leaves_all_bytes_as_they_are(
    tasks: list[tuple[Task, bool]], watched: Work
) -> None:
    batches = batches_of(*tasks)
    expected = made(run(batches, ahead=False))
    watched.clear()
    assert made(run(batches, ahead=True, work=watched)) == expected
    for number in range(1, len(batches)):
        read, last = watched.index(f"read a{number}"), f"a{number - 1} step"
        assert any(step.startswith(last) for step in watched[:read])
        assert not any(step.startswith(f"a{number} step") for step in watched[:read])


@pytest.mark.slow
def test_nothing_is_read_ahead_where_weights_are_streamed() -> None:
    batches = batches_of(*[(Task.T2I, False)] * 2)
    for mode in ("fast", "balanced", "low"):
        loads = [group_load(make_plan(map(plan_entry, batches[0].jobs), MemoryConfig()).groups[0])]
        engine = load(make_config(mode), loads=loads)
        prepared = [engine.prepare(job, ()) for job in batches[0].jobs]

        class Asks(Channel):
            def progress(self, progress: Progress) -> None:
                if progress.phase is Phase.DENOISE:
                    assert engine.read(prepared) is None  # noqa: B023

        engine.generate(batches[0], prepared, kept=(), channel=Asks())


def test_what_is_read_ahead_is_not_counted_as_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter(range(10_000))
    # Every look at the clock is a second; only the device's work would take longer.
    monkeypatch.setattr("sensebatch.engine.runner.time.perf_counter", lambda: float(next(moments)))

    class Slow(Channel):
        def progress(self, progress: Progress) -> None:  # noqa: ARG002
            for _ in range(100):
                next(moments)

    batch = batches_of((Task.T2I, False))[0]
    worker = EngineWorker(load(make_config("full")))
    for place, job in enumerate(batch.jobs):
        worker.prepare(0, place, job, [])
    outcome = worker.generate(0, batch, kept=(), channel=Slow())
    assert isinstance(outcome, BatchResult)
    assert 0 < outcome.metrics.denoise_s < 20


def test_a_paced_computation_ends_with_the_last_call() -> None:
    done: list[int] = []

    def counting(count: int) -> Any:
        for number in range(count):
            done.append(number)
            yield
        return "result"

    paced: Paced[str] = Paced(counting(10), num_steps=6)
    for calls in (2, 1, 0):
        paced.advance(calls)
    # Four more than it was said to have.
    assert len(done) == 10
    assert paced.finish() == "result"
    assert run_through(counting(2)) == "result"


def test_the_room_for_what_is_read_ahead_decides() -> None:
    batches = batches_of(*[(Task.T2I, False)] * 2)
    loads = [group_load(make_plan(map(plan_entry, batches[0].jobs), MemoryConfig()).groups[0])]
    engine = load(make_config("full"), loads=loads)
    group = batches[0].group
    placement = engine._placements.of(group)
    assert placement.room_bytes is not None
    assert placement.reading_bytes > 0
    tight = replace(placement, room_bytes=placement.reading_bytes - 1)
    prepared = [engine.prepare(job, ()) for job in batches[0].jobs]
    with torch.inference_mode():
        engine._settle(group)
        assert engine.read(prepared) is not None
        engine._placements = engine._placements.replacing(group, tight)
        assert engine.read(prepared) is None


@pytest.mark.parametrize("jobs", [1, 4])
def test_reading_ahead_takes_no_more_than_is_counted(jobs: int) -> None:
    runner = CountingRunner()
    batch = [prepared(runner, f"{'y' * 400} {number}") for number in range(jobs)]
    prompt = batch[-1].prompts[Branch.COND]
    counted = Load(
        group=group_key(batch[0].job),
        batch_size=jobs,
        prompt_tokens=len(prompt.token_ids),
        system_tokens=prompt.num_system,
    )

    def peak(ahead: bool) -> int:
        runner = CountingRunner()
        with infer(), LiveBytes() as live:
            reading = state.read_ahead(runner, batch) if ahead else None
            runner.progress = lambda _: reading.advance(0) if reading is not None else None
            run_single_image(runner, batch, kept=(), channel=Channel())
            return live.peak

    found = peak(True) - peak(False)
    arch = CountingRunner().network.arch
    expected = reading_bytes(Computation(arch=arch, item_bytes=4), counted)
    assert 0 < found <= expected
