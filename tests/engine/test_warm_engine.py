"""A loaded engine that is planned again for another run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sensebatch.checkpoint.files import open_checkpoint
from sensebatch.config import RunConfig
from sensebatch.engine import engine as engine_module
from sensebatch.engine.engine import SenseNovaEngine, load_engine
from sensebatch.engine.weights.loader import open_weights
from sensebatch.engine.weights.sources import FileWeights, StoppableWeights, WeightSource
from sensebatch.errors import ConfigError, StoppedError
from sensebatch.jobs import ModelIdentity
from sensebatch.plan.batches import make_plan, plan_entry
from sensebatch.plan.load import Load, group_load
from sensebatch.tasks import Task
from sensebatch.units import GIB, MIB
from tests.engine.test_engine import generate, load, make_config, make_job, pixels

pytestmark = pytest.mark.slow

CHECKPOINT = open_checkpoint("tiny")


def _loads(config: RunConfig) -> list[Load]:
    plan = make_plan([plan_entry(make_job("a"))], config.memory)
    return [group_load(group) for group in plan.groups]


def _replan(engine: SenseNovaEngine, **memory: Any) -> None:
    config = make_config(**memory)
    engine.replan(config, loads=_loads(config), stop=lambda: False)


def _weights_of(engine: SenseNovaEngine) -> object:
    return engine._network


def test_images_are_the_same_wherever_the_weights_go() -> None:
    engine = load(make_config())
    expected = pixels(generate(engine, make_job("a")))
    for mode in ("low", "fast", "full"):
        _replan(engine, vram_mode=mode)
        assert engine.info.vram_mode == mode
        assert pixels(generate(engine, make_job("a"))) == expected


def test_weights_stay_where_the_new_plan_has_them_and_are_loaded_again_elsewhere() -> None:
    engine = load(make_config(vram_mode="full"))
    whole = _weights_of(engine)
    _replan(engine, vram_mode="full", max_batch_size=1)
    assert _weights_of(engine) is whole
    _replan(engine, vram_mode="balanced")
    streamed = _weights_of(engine)
    assert streamed is not whole
    _replan(engine, vram_mode="fast")
    assert _weights_of(engine) is streamed
    _replan(engine, vram_mode="full")
    assert _weights_of(engine) is not streamed


def test_a_smaller_budget_is_a_cap_after_the_earlier_run_has_left_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = load(make_config(vram_mode="full"))
    held: list[int | None] = []

    def cap(*_: object) -> None:
        residency = vars(engine).get("_residency")
        held.append(None if residency is None else residency._pool.num_bytes)

    monkeypatch.setattr(engine_module, "cap_device_memory", cap)
    for mode in ("fast", "low"):
        _replan(engine, vram_mode=mode)
    most = engine._residency._pool.num_bytes
    _replan(engine, vram_mode="fast")
    # Nothing while weights are loaded elsewhere; then no more than the new run may have.
    assert held == [None, most, engine._residency._pool.num_bytes]
    assert held[1] < held[2]


def test_weights_in_host_memory_do_not_suit_a_smaller_budget() -> None:
    engine = load(make_config(vram_mode="low"))
    held, placement = engine._residency.host_bytes, engine._placements.first
    for room, suits in ((None, True), (held, True), (held - 1, False)):
        wanted = replace(placement, host_block_bytes=room)
        assert engine._residency.suits(wanted) == suits


def test_jobs_that_do_not_fit_leave_the_engine_as_it_was() -> None:
    engine = load(make_config())
    before = _weights_of(engine)
    with pytest.raises(ConfigError, match="vram_budget"):
        _replan(engine, vram_budget_bytes=MIB)
    assert _weights_of(engine) is before
    generate(engine, make_job("a"))


def test_log_says_what_each_run_took_to_load_and_was_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = load(make_config(vram_mode="full"))
    assert engine.info.load_s > 0
    monkeypatch.setattr("time.perf_counter", lambda: 100.0)
    _replan(engine, vram_mode="full", vram_budget_bytes=GIB)
    assert (engine.info.load_s, engine.info.budget_bytes) == (0.0, GIB)


def test_closed_engine_holds_no_weights() -> None:
    engine = load(make_config())
    engine.close()
    assert not hasattr(engine, "_network")
    assert not hasattr(engine, "_residency")
    engine.close()


@pytest.mark.parametrize("mode", ["full", "low"])
def test_stop_while_weights_are_loaded_ends_the_load(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    reads: list[str] = []
    monkeypatch.setattr(
        engine_module, "open_weights", lambda *args: _Counting(open_weights(*args), reads)
    )
    with pytest.raises(StoppedError):
        _load_until(mode, lambda: len(reads) >= 3)
    in_vain = len(reads)
    engine = _load_until(mode, lambda: False)
    assert in_vain < len(reads) - in_vain
    generate(engine, make_job("a"))


def test_stop_after_the_load_ends_no_reading_of_weights() -> None:
    reads: list[str] = []
    weights = StoppableWeights(_Counting(FileWeights(CHECKPOINT), reads), lambda: True)
    (name, *_) = CHECKPOINT.tensors
    target = torch.empty(CHECKPOINT.tensors[name].shape)
    with pytest.raises(StoppedError):
        weights.read_into(name, None, target)
    weights.loaded()
    weights.read_into(name, None, target)
    assert reads == [name]


def _load_until(mode: str, stop: Callable[[], bool]) -> SenseNovaEngine:
    return load_engine(
        make_config(vram_mode=mode),
        checkpoint=CHECKPOINT,
        identity=ModelIdentity(
            checkpoint="tiny",
            lora=None,
            dtype="float32",
            generation_prompt="You draw.",
            interleave_prompt="You tell.",
        ),
        system_prompt_source=dict.fromkeys(Task, "test"),
        device="cpu",
        stop=stop,
    )


class _Counting:
    """Weights that remember what is read."""

    def __init__(self, source: WeightSource, reads: list[str]) -> None:
        self._source, self._reads = source, reads

    def read_into(self, name: str, rows: tuple[int, int] | None, target: Tensor) -> None:
        self._reads.append(name)
        self._source.read_into(name, rows, target)
