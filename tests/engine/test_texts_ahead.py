"""While weights stream, an engine writes the texts of batches that follow beside the first."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest

from sensebatch.contract import Phase, Progress
from sensebatch.engine.decoding import step_together
from sensebatch.engine.engine import SenseNovaEngine
from sensebatch.engine.model.kv_cache import KVCache
from sensebatch.engine.weights.residency import Residency
from sensebatch.engine.writing import Text, TextRoom
from sensebatch.errors import BatchStoppedError, OutOfMemoryError
from sensebatch.jobs import Batch, BatchResult, Job, VramMode, batch_id, group_key
from sensebatch.plan.batches import make_plan, plan_entry
from sensebatch.plan.load import plan_loads
from sensebatch.tasks import Task
from tests.engine.golden_model import KeptImages, succeeded
from tests.engine.test_engine import Line, load, make_config, make_job, raising

pytestmark = pytest.mark.slow

BUDGET = 249_600_000
"""Holds a few blocks of the tiny model, and the texts of two batches at a time."""
SIZE = 2
NUM_TOKENS = 10


def make_jobs(task: Task = Task.T2I, num_jobs: int = 4) -> list[Job]:
    sampling = replace(
        make_job("a").sampling,
        num_steps=1,
        max_think_tokens=NUM_TOKENS,
        max_new_tokens=NUM_TOKENS,
    )
    think = task is Task.T2I
    resolution = make_job("a").resolution if think else None
    return [
        make_job(
            "x" * number,
            task=task,
            think=think,
            sampling=sampling,
            resolution=resolution,
        )
        for number in range(1, num_jobs + 1)
    ]


def engine_for(jobs: Sequence[Job], **memory: Any) -> SenseNovaEngine:
    config = make_config(max_batch_size=SIZE, **memory)
    plan = make_plan([plan_entry(job) for job in jobs], config.memory)
    return load(config, loads=plan_loads(plan, system_prompt_bytes=35))


def batches_of(jobs: Sequence[Job]) -> list[Batch]:
    members = [tuple(jobs[start : start + SIZE]) for start in range(0, len(jobs), SIZE)]
    keys = [tuple(job.id for job in of_batch) for of_batch in members]
    return [
        Batch(id=batch_id(own), group=group_key(of_batch[0]), jobs=of_batch, keys=own)
        for own, of_batch in zip(keys, members, strict=True)
    ]


class Run:
    """Runs batches as an executor does, and knows what the engine reported of each."""

    def __init__(self, engine: SenseNovaEngine) -> None:
        self._engine = engine
        self.stop: Callable[[], bool] = lambda: False
        self.phases: list[list[Phase | None]] = []

    def __call__(self, batch: Batch, following: Sequence[Batch] = ()) -> BatchResult:
        seen: list[Phase | None] = []
        self.phases.append(seen)

        def progress(one: Progress) -> None:
            seen.append(one.phase)
            jobs = sum(len(other.jobs) for other in (batch, *following))
            is_text = one.phase is Phase.THINK and bool(following)
            assert one.num_together <= jobs if is_text else not one.num_together
            assert not is_text or one.step > 1 or one.num_together == jobs

        prepare = self._engine.prepare
        return self._engine.generate(
            batch,
            [prepare(job, ()) for job in batch.jobs],
            kept=(),
            channel=Line(KeptImages(len(batch.jobs)), progress, self.stop),
            following=[(one, [prepare(job, ()) for job in one.jobs]) for one in following],
        )

    def all(self, batches: Sequence[Batch]) -> list[BatchResult]:
        results = []
        for number, batch in enumerate(batches):
            ahead = self._engine.num_following(batch.group, batch.id)
            results.append(self(batch, batches[number + 1 : number + 1 + ahead]))
        return results


def outputs(results: Sequence[BatchResult]) -> list[tuple[Any, ...]]:
    return [
        ([image.tobytes() for image in job.images], job.text, job.think_tokens)
        for result in results
        for job in succeeded(result.results)
    ]


@pytest.fixture(scope="module")
def expected() -> list[tuple[Any, ...]]:
    """What an engine makes that has all weights on the device."""
    jobs = make_jobs()
    return outputs(Run(engine_for(jobs, vram_mode="full")).all(batches_of(jobs)))


@pytest.fixture(scope="module")
def engine() -> SenseNovaEngine:
    """Streams weights, and writes two batches together."""
    jobs = make_jobs()
    loaded = engine_for(jobs, vram_budget_bytes=BUDGET)
    assert loaded.info.vram_mode is VramMode.BALANCED
    assert [loaded.num_following(batch.group, batch.id) for batch in batches_of(jobs)] == [1, 1]
    return loaded


def test_texts_are_written_ahead_and_images_are_those_of_resident_weights(
    engine: SenseNovaEngine, expected: list[tuple[Any, ...]]
) -> None:
    batches = batches_of(make_jobs())
    run = Run(engine)
    first = run(batches[0], batches[1:])
    assert list(engine._written) == [batches[1].id]
    assert engine.num_following(batches[1].group, batches[1].id) == 0
    gc.collect()
    held = engine._pages.num_made - len(engine._pages._free)
    assert held > 0
    second = run(batches[1])
    assert outputs([first, second]) == expected
    assert [Phase.THINK in phases for phases in run.phases] == [True, False]
    assert all(Phase.DENOISE in phases for phases in run.phases)
    assert not engine._written
    del first, second
    gc.collect()
    assert engine._pages.num_made - len(engine._pages._free) < held


def test_another_order_of_batches_changes_nothing(
    engine: SenseNovaEngine, expected: list[tuple[Any, ...]]
) -> None:
    """What was written ahead is forgotten, and written again."""
    run, batches = Run(engine), batches_of(make_jobs())
    run(batches[0], batches[1:])
    first, second = run(batches[0]), run(batches[1])
    assert outputs([first, second]) == expected
    assert [Phase.THINK in phases for phases in run.phases] == [True] * 3
    # Also where what comes first writes nothing ahead.
    engine._written[batches[0].id] = []
    story = replace(batches[1], group=replace(batches[1].group, task=Task.INTERLEAVE))
    assert engine._write(Mock(), story, (), ()) is None
    assert not engine._written


def test_weights_give_way_to_caches_and_come_back(
    engine: SenseNovaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = batches_of(make_jobs())
    sizes: list[int] = []
    resize = Residency.resize

    def watched(self: Residency, num_buffers: int, *, within: bool = False) -> int:
        sizes.append(num_buffers)
        return resize(self, num_buffers, within=within)

    taken: list[int] = []
    block = 1_329_024 + 4096

    def left(_: TextRoom, active: Sequence[Text], tokens: int) -> int:
        """Returns memory for one block less each time."""
        taken.append(sum(len(text.caches) for text in active))
        assert tokens == 4
        return (4 - len(taken)) * block

    monkeypatch.setattr(Residency, "resize", watched)
    monkeypatch.setattr("sensebatch.engine.writing.left_bytes", left)
    monkeypatch.setattr("sensebatch.plan.passes.TEXT_ROOM_TOKENS", 4)
    Run(engine)(batches[0], batches[1:])
    first, *grown, last = sizes
    # Beside the ring, as many blocks stay as rooms leave memory for.
    assert taken == [4, 4, 4]
    assert grown == [2 + 3, 2 + 2, 2 + 1]
    assert first == last == engine._placement.num_buffers


def test_texts_that_there_is_no_room_for_wait(
    engine: SenseNovaEngine, monkeypatch: pytest.MonkeyPatch, expected: list[tuple[Any, ...]]
) -> None:
    """The second batch begins beside the first, waits while that grows, and ends after it."""
    batches, together = batches_of(make_jobs()), []
    text_bytes = engine._placement.text_bytes
    assert text_bytes is not None
    lengths: list[int] = []
    all_caches: dict[int, Sequence[KVCache]] = {}

    def room(caches: Sequence[KVCache], _: int) -> int:
        """Returns half of the memory for a text that has just begun, and more for a longer one."""
        all_caches[id(caches)] = caches
        lengths.append(caches[0].length)
        return text_bytes // 2 + (lengths[-1] > max(lengths[:2]))

    def step(steps: Sequence[Any]) -> list[list[int]]:
        together.append(len(steps))
        written = [id(decoder._caches) for decoder, _ in steps]
        for other in all_caches.keys() - written:
            assert all(cache._parcel is not None for cache in all_caches[other])
        return step_together(steps)

    monkeypatch.setattr("sensebatch.engine.writing.room_bytes", room)
    monkeypatch.setattr("sensebatch.engine.writing.step_together", step)
    monkeypatch.setattr("sensebatch.plan.passes.TEXT_ROOM_TOKENS", 4)
    run = Run(engine)
    results = [run(batches[0], batches[1:]), run(batches[1])]
    assert outputs(results) == expected
    # Both write four tokens; then one at a time writes the six that are left.
    assert together == [2] * 4 + [1] * 12


def test_answers_are_written_ahead() -> None:
    jobs = make_jobs(Task.ASK)
    batches = batches_of(jobs)
    full = outputs(Run(engine_for(jobs, vram_mode="full")).all(batches))
    run = Run(engine_for(jobs, vram_budget_bytes=BUDGET))
    assert outputs(run.all(batches)) == full
    assert [Phase.THINK in phases for phases in run.phases].count(True) < len(batches)


def test_a_stop_while_texts_are_written_leaves_nothing_and_resumes_to_the_same(
    engine: SenseNovaEngine, expected: list[tuple[Any, ...]]
) -> None:
    batches = batches_of(make_jobs())
    run = Run(engine)
    run.stop = lambda: run.phases[-1].count(Phase.THINK) == 3
    # Alone, a batch of one pass would be finished.
    with pytest.raises(BatchStoppedError):
        run(batches[0], batches[1:])
    assert run.phases == [[Phase.THINK] * 3]
    assert not engine._written
    assert outputs(Run(engine).all(batches)) == expected


def test_texts_that_do_not_fit_together_are_written_alone_from_then_on(
    engine: SenseNovaEngine, monkeypatch: pytest.MonkeyPatch, expected: list[tuple[Any, ...]]
) -> None:
    batches, placements = batches_of(make_jobs()), engine._placements
    # This test is the last of the module, since the engine remembers.
    for error in (
        RuntimeError("CUDA error: out of memory"),
        OutOfMemoryError("7 MiB of weights did not fit"),
    ):
        engine._continue_with(placements)
        assert engine.num_following(batches[0].group, batches[0].id) == 1
        with monkeypatch.context() as patch:
            patch.setattr("sensebatch.engine.writing.step_together", raising(error))
            with pytest.raises(OutOfMemoryError, match=f"did not fit: {error}"):
                Run(engine)(batches[0], batches[1:2])
        assert engine.num_following(batches[0].group, batches[0].id) == 0
    assert outputs(Run(engine).all(batches)) == expected
