"""The time arithmetic expects as many copied blocks as memory copies."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from sensebatch.engine.memory.lanes import CpuLane
from sensebatch.engine.weights.loader import NetworkLoader
from sensebatch.plan.computation import Computation
from sensebatch.plan.passes import RING
from sensebatch.plan.seconds import Blocks, Pass, Passes, pass_orders
from sensebatch.plan.work import Speeds, network_sizes, understanding_work
from tests.engine.weights.test_residency import make_placement
from tests.golden_data import golden_architecture

ARCH = replace(golden_architecture("dense_fm"), num_layers=9)
SPEEDS = Speeds(
    copy_bytes_per_s=1.0, gemm_flop_per_s=1.0, attention_flop_per_s=1.0, memory_bytes_per_s=1.0
)
Lend = Callable[[int], AbstractContextManager[nn.Module]]


class NoWeights:
    """A weight source that leaves memory as it is."""

    def read_into(self, name: str, rows: tuple[int, int] | None, target: Tensor) -> None:
        pass


def counted_blocks(num_buffers: int, text_passes: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Returns the blocks that memory copies for a second batch like the first."""
    loader = NetworkLoader(
        arch=ARCH, source=NoWeights(), device=torch.device("cpu"), dtype=torch.float32
    )
    network, residency = loader.load(make_placement(num_buffers))
    copy = Mock()
    monkeypatch.setattr(CpuLane, "copy", copy)

    def go_through(lend: Lend, count: int) -> None:
        for index in range(count):
            with lend(index):
                pass

    def batch() -> None:
        residency.prefill(decodes=text_passes > 0)
        go_through(network.understanding.lend, ARCH.num_layers)
        if text_passes:
            go_through(network.lm_head.lend, len(network.lm_head.parts))
            residency.decode()
        for _ in range(text_passes):
            go_through(network.understanding.lend, ARCH.num_layers)
            go_through(network.lm_head.lend, len(network.lm_head.parts))
        residency.denoise()
        for _ in range(20):
            go_through(network.generation.lend, ARCH.num_layers)

    batch()
    copy.reset_mock()
    batch()
    return copy.call_count


def expected_blocks(num_buffers: int, text_passes: int) -> float:
    """Returns the blocks that the arithmetic expects for the same."""
    computation = Computation(arch=ARCH, item_bytes=4)
    orders = pass_orders(computation)
    seconds = understanding_work(computation, network_sizes(ARCH), [(1, 0)]).seconds(SPEEDS)

    def in_blocks(blocks: Blocks) -> Blocks:
        return replace(blocks, copied_bytes=blocks.count)

    passes = Passes(orders, num_buffers, SPEEDS.copy_bytes_per_s)
    for _ in range(2):
        passes.copied_bytes = 0.0
        prompts = orders.text if text_passes else orders.prompts
        passes.add(Pass(blocks=in_blocks(prompts), seconds=seconds, keeps=False))
        for blocks, count in ((orders.text, text_passes), (orders.images, 20)):
            passes.add(Pass(blocks=in_blocks(blocks), seconds=seconds, count=count, keeps=True))
    return passes.copied_bytes


@pytest.mark.parametrize("num_buffers", [2, 3, 6, 9, 11, 13, 15, 17])
@pytest.mark.parametrize("text_passes", [0, 30])
def test_blocks_copied_are_those_expected(
    num_buffers: int, text_passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = counted_blocks(num_buffers, text_passes, monkeypatch)
    # Each of a batch's phases copies ahead, and may lose, as much as the ring holds.
    assert counted == pytest.approx(expected_blocks(num_buffers, text_passes), abs=3 * RING)


def test_nothing_is_copied_where_all_blocks_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    assert counted_blocks(19, 30, monkeypatch) == expected_blocks(19, 30) == 0
