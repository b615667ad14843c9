"""Blocks that are read again each time: what ends while others are under way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Event, Thread

import torch
from torch import Tensor, nn

from sensebatch.engine.memory.blocks import Block, layout_of, new_buffer
from sensebatch.engine.memory.host import CPU, HostStore
from sensebatch.engine.memory.lanes import CpuLane
from sensebatch.engine.memory.readers import Readers

NUM_BYTES = 512


def block(name: str, read: Callable[[Tensor], None]) -> Block:
    module = nn.Module()
    weight = torch.empty(NUM_BYTES, dtype=torch.uint8, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return Block(name=name, module=module, layout=layout_of(module), parts=(read,))


def test_closing_waits_for_no_copy_that_it_cancelled() -> None:
    """A copy that is begun while those before it are cancelled comes to an end as well."""
    begun, go_on = [Event() for _ in range(4)], Event()

    def read(number: int, _: Tensor) -> None:
        begun[number].set()
        assert number > 1 or go_on.wait(30)

    blocks = [block(f"block {number}", partial(read, number)) for number in range(4)]
    readers, lane = Readers(), CpuLane()
    host = HostStore(readers, pin=False)
    host.keep(blocks, 0, lane)
    target = new_buffer(NUM_BYTES, CPU)
    first, second, third, _ = [host.copy(one, target, lane, None, None) for one in blocks]
    assert begun[0].wait(30)
    assert third is not None

    def begin_the_last(_: object) -> None:
        go_on.set()
        assert begun[3].wait(30)

    third.add_done_callback(begin_the_last)
    closing = Thread(target=host.close, args=(lane,))
    closing.start()
    closing.join(10)
    hung = closing.is_alive()
    if hung:
        third.set_running_or_notify_cancel()
        closing.join()
    readers.close()
    assert third.cancelled()
    assert first is not None
    assert second is not None
    assert first.exception() is second.exception() is None
    assert not hung
