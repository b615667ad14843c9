"""The system turn of a batch goes through the network once, and not again for later batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sensebatch.config import default_config
from sensebatch.contract import Phase
from sensebatch.engine.memory.pages import Pages
from sensebatch.engine.model.attention import sdpa
from sensebatch.engine.model.kv_cache import KVCache
from sensebatch.engine.runner import PassLimits, Runner
from sensebatch.engine.tasks.state import PreparedJob, RunningJob, prepare_job, start_jobs
from sensebatch.jobs import Job, Source, group_key
from sensebatch.plan.computation import Computation
from sensebatch.plan.footprint import prompt_bytes
from sensebatch.plan.load import Load
from sensebatch.resolutions import Resolution
from sensebatch.tasks import Branch, Task
from tests.engine.golden_model import build_network, infer
from tests.engine.memory.test_estimates import MOST, small_network
from tests.engine.memory.tracker import LiveBytes
from tests.golden_data import ByteTokenizer

SYSTEM = "a rule. " * 37
TURN = len(f"system\n{SYSTEM}\n") + 2


class CountingRunner(Runner):
    """Knows how many tokens went through the understanding expert in each pass."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            network=build_network("dense_fm"), tokenizer=ByteTokenizer(), attention=sdpa, **options
        )
        self.passes: list[int] = []

    def _extending(self, extensions: Any, attention: Any) -> Any:
        self.passes.append(sum(len(e.prompt.token_ids) for e in extensions))
        return super()._extending(extensions, attention)


def prepared(
    runner: Runner, prompt: str, *, system: str = SYSTEM, task: Task = Task.T2I
) -> PreparedJob:
    sampling = replace(default_config("8b").tasks[task].sampling, num_steps=1)
    job = Job(
        id=prompt,
        task=task,
        prompt=prompt,
        resolution=Resolution(height=64, width=64),
        seed=1,
        think=False,
        sampling=sampling,
        source=Source(file="test", row="0"),
    )
    return prepare_job(runner.network.arch, runner.tokenizer, job, system_prompt=system)


def rest(job: PreparedJob) -> int:
    """Returns the tokens of a job's conditional prompt after its system turn."""
    return len(job.prompts[Branch.COND].token_ids) - TURN


def bits(state: RunningJob) -> list[bytes]:
    """Returns what a job has cached, in every layer."""
    return [
        part.numpy().tobytes()
        for cache in state.caches.values()
        for layer in range(2)
        for part in cache.read(layer)
    ]


def start(runner: Runner, *jobs: PreparedJob) -> list[RunningJob]:
    with infer():
        return start_jobs(runner, jobs, decodes=False)


def test_the_system_turn_of_a_batch_is_computed_once() -> None:
    runner = CountingRunner()
    jobs = [prepared(runner, prompt) for prompt in ("one", "another", "a third")]
    uncond = len(jobs[0].prompts[Branch.UNCOND].token_ids)
    states = start(runner, *jobs)
    assert runner.passes == [TURN, sum(map(rest, jobs)) + uncond]
    lengths = [state.caches[Branch.COND].length for state in states]
    assert lengths == [TURN + rest(job) for job in jobs]
    assert runner.seconds[Phase.PREFILL] > 0


def test_the_next_batch_finds_the_turn_and_ends_in_the_same_bits() -> None:
    runner, later = CountingRunner(), CountingRunner()
    job = prepared(runner, "one")
    (expected,) = start(runner, job)
    start(later, prepared(later, "before"), prepared(later, "it"))
    later.passes.clear()
    (found,) = start(later, job)
    assert later.passes == [rest(job) + len(job.prompts[Branch.UNCOND].token_ids)]
    assert bits(found) == bits(expected)


def test_turns_are_kept_between_runners_and_not_mixed_up() -> None:
    kept: dict[tuple[int, ...], KVCache] = {}
    runner = CountingRunner(system_turns=kept)
    start(runner, prepared(runner, "one"))
    assert [len(turn) for turn in kept] == [TURN]
    other = prepared(runner, "one", system="another rule. ")
    (expected,) = start(CountingRunner(), other)
    runner = CountingRunner(system_turns=kept)
    (found,) = start(runner, other)
    assert len(runner.passes) == 2
    assert bits(found) == bits(expected)
    assert list(kept) == [other.prompts[Branch.COND].system_ids]


def test_a_batch_of_several_system_prompts_computes_each_once_and_keeps_none() -> None:
    runner = CountingRunner()
    jobs = [prepared(runner, "a"), prepared(runner, "b", system="rule"), prepared(runner, "c")]
    states = start(runner, *jobs)
    turns = TURN + jobs[1].prompts[Branch.COND].num_system
    uncond = len(jobs[0].prompts[Branch.UNCOND].token_ids)
    rests = sum(len(job.prompts[Branch.COND].after_system().token_ids) for job in jobs)
    assert runner.passes == [turns, rests + uncond]
    assert runner.system_turns == {}
    for state, job in zip(states, jobs, strict=True):
        (alone,) = start(CountingRunner(), job)
        for together, single in zip(
            state.caches[Branch.COND].read(1), alone.caches[Branch.COND].read(1), strict=True
        ):
            torch.testing.assert_close(together, single)


def test_jobs_without_a_system_prompt_are_one_pass() -> None:
    runner = CountingRunner()
    start(runner, prepared(runner, "a", system=""))
    assert len(runner.passes) == 1
    assert runner.system_turns == {}


def test_the_kept_turn_is_not_written_to() -> None:
    runner = CountingRunner(limits=PassLimits(park=Pages(pin=False).take))
    start(runner, prepared(runner, "a"))
    (cache,) = runner.system_turns.values()
    before = [part.clone() for part in cache.brought().read(0)]
    states = start(runner, prepared(runner, "b"), prepared(runner, "c"))
    with infer():
        runner.bring(state.caches[Branch.COND] for state in states)
        runner.append_tokens([(state.caches[Branch.COND], [1, 2, 3]) for state in states])
    assert cache.length == TURN
    assert all(map(torch.equal, before, cache.brought().read(0)))


def test_shared_tokens_count_where_prompts_are_cut_into_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sensebatch.engine.runner.MAX_PREFILL_TOKENS", 2 * (TURN + 60))
    runner = CountingRunner()
    start(runner, *(prepared(runner, f"prompt {number}") for number in range(4)))
    assert len(runner.passes) == 1 + 2


@pytest.mark.parametrize("jobs", [1, 4])
def test_prompts_after_a_shared_turn_take_no_more_than_expected(jobs: int) -> None:
    network = small_network()
    runner = Runner(network=network, tokenizer=ByteTokenizer(), attention=sdpa)
    system = "x" * 600
    batch = [prepared(runner, "y" * 400, system=system) for _ in range(jobs)]
    prompt = len(batch[0].prompts[Branch.COND].token_ids)
    load = Load(
        group=group_key(batch[0].job),
        batch_size=jobs,
        prompt_tokens=prompt,
        system_tokens=batch[0].prompts[Branch.COND].num_system,
    )
    with infer(), LiveBytes() as live:
        for _ in range(2):
            start_jobs(runner, batch, decodes=True)
    expected = prompt_bytes(Computation(arch=network.arch, item_bytes=4), load, parked=False)
    assert live.peak <= expected
    assert jobs == 1 or expected <= 2 * MOST * live.peak


def test_a_kept_turn_waits_where_the_next_batch_lets_prefixes_wait() -> None:
    kept: dict[tuple[int, ...], KVCache] = {}
    runner = CountingRunner(system_turns=kept)
    start(runner, prepared(runner, "a"))
    (cache,) = kept.values()
    assert cache._parcel is None
    later = CountingRunner(system_turns=kept, limits=PassLimits(park=Pages(pin=False).take))
    start(later, prepared(later, "b"), prepared(later, "c"))
    assert cache._parcel is not None


def test_a_turn_that_waits_comes_back_for_a_batch_whose_prefixes_stay() -> None:
    kept: dict[tuple[int, ...], KVCache] = {}
    before = CountingRunner(system_turns=kept, limits=PassLimits(park=Pages(pin=False).take))
    start(before, prepared(before, "a"))
    (cache,) = kept.values()
    assert cache._parcel is not None
    runner = CountingRunner(system_turns=kept)
    (found,) = start(runner, prepared(runner, "b"))
    assert all(tokens < TURN for tokens in runner.passes)
    assert cache._parcel is None
    alone = CountingRunner()
    (expected,) = start(alone, prepared(alone, "b"))
    assert bits(found) == bits(expected)
