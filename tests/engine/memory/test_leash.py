"""The host launches no more layers than a leash allows before the device has come to them."""

from __future__ import annotations

from typing import Any

import pytest

from sensebatch.engine.memory.lanes import CpuLane, Leash
from tests.engine.test_engine import generate, load, make_config, make_job


class SlowLane(CpuLane):
    """A device that comes to a mark once somebody waits for it."""

    def __init__(self) -> None:
        self.set: list[object] = []
        self.furthest = 0

    def new_mark(self) -> object:
        return object()

    def computed(self, mark: object) -> None:
        self.set.append(mark)
        self.furthest = max(self.furthest, len(self.set))

    def finish(self, mark: object) -> None:
        if mark in self.set:
            del self.set[: self.set.index(mark) + 1]


@pytest.mark.parametrize("length", [1, 3])
def test_the_host_is_no_further_ahead_than_its_leash(length: int) -> None:
    lane = SlowLane()
    leash = Leash(lane, length)
    for _ in range(10):
        leash.hold()
    assert lane.furthest == length


def test_the_layers_that_draw_are_on_a_leash(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []
    monkeypatch.setattr(Leash, "hold", lambda leash: held.append(leash))
    engine = load(make_config("full"))
    generate(engine, make_job("a"))
    num_layers, num_steps = engine._loader.arch.num_layers, 2
    # Prompts are not: they are launched behind a step, and end with it.
    assert len(held) == num_layers * num_steps
