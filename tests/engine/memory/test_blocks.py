"""Blocks as bytes: parameters of several dtypes in one buffer."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from sensebatch.engine.memory.blocks import ALIGNMENT, Block, bind, layout_of, new_buffer
from sensebatch.engine.memory.host import CPU, HostStore
from sensebatch.engine.memory.lanes import CpuLane
from sensebatch.engine.memory.pool import Pool
from sensebatch.engine.memory.readers import Readers
from sensebatch.errors import OutOfMemoryError

DTYPES = [torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.float16]


class Mixed(nn.Module):
    """One parameter of each dtype, of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        for place, dtype in enumerate(DTYPES):
            value = torch.empty(3 + place, 5, dtype=dtype, device="meta")
            self.register_parameter(f"p{place}", nn.Parameter(value, requires_grad=False))


def values_of(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        name: torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        for name, parameter in Mixed().named_parameters()
    }


def mixed_block(number: int) -> Block:
    module = Mixed()
    layout = layout_of(module)

    def write(name: str, value: Tensor, flat: Tensor) -> None:
        layout.views(flat)[name].copy_(value)

    parts = tuple(
        lambda flat, name=name, value=value: write(name, value, flat)
        for name, value in values_of(number).items()
    )
    return Block(name=f"block {number}", module=module, layout=layout, parts=parts)


def same_bytes(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )


def test_parameters_of_several_dtypes_lie_apart_and_aligned() -> None:
    layout = layout_of(Mixed())
    flat = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    views = layout.views(flat)
    assert [view.dtype for view in views.values()] == DTYPES
    for entry in layout.entries:
        assert entry.start % ALIGNMENT == 0
    for view in views.values():
        view.view(torch.uint8).add_(1)
    assert flat.max() == 1
    assert int(flat.sum()) == sum(view.nbytes for view in views.values())


def test_a_bound_module_computes_on_the_buffer() -> None:
    block = mixed_block(0)
    flat = new_buffer(block.layout.num_bytes, CPU)
    for part in block.parts:
        part(flat)
    shell = bind(block.module, block.layout, flat)
    for name, value in values_of(0).items():
        found = shell.get_parameter(name)
        assert same_bytes(found, value)
        assert found.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()


@pytest.mark.parametrize("kept", [0, 2, 5])
def test_mixed_blocks_come_through_the_ring_bit_by_bit(kept: int) -> None:
    blocks = [mixed_block(number) for number in range(5)]
    size = blocks[0].layout.num_bytes
    readers, lane = Readers(), CpuLane()
    host = HostStore(readers, pin=False)
    host.keep(blocks, (kept + 2) * size if kept < 5 else None, lane)
    assert host.kept_bytes == (kept + 2) * size if kept < 5 else 5 * size
    pool = Pool(new_buffer(3 * size, CPU), host, lane)
    pool.schedule(blocks, keep=True)
    for _ in range(3):
        for number, block in enumerate(blocks):
            with pool.lend(block) as module:
                for name, value in values_of(number).items():
                    assert same_bytes(module.get_parameter(name), value)
    host.close(lane)
    readers.close()


class CountingLane(CpuLane):
    """Counts the copies that bring a block."""

    def __init__(self) -> None:
        self.num_copies = 0

    def copy(self, target: Tensor, source: Tensor, after: object, done: object) -> None:
        self.num_copies += 1
        super().copy(target, source, after, done)


class LateLane(CpuLane):
    """Knows the copies that nobody has waited for."""

    def __init__(self) -> None:
        self.under_way: list[object] = []

    def new_mark(self) -> object:
        return object()

    def copy(self, target: Tensor, source: Tensor, after: object, done: object) -> None:
        self.under_way.append(done)
        super().copy(target, source, after, done)

    def finish(self, mark: object) -> None:
        self.under_way = [done for done in self.under_way if done is not mark]


class Plain(nn.Module):
    """One matrix of bytes."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        value = torch.empty(num_bytes, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(value, requires_grad=False)


def plain_block(number: int, num_bytes: int) -> Block:
    module = Plain(num_bytes)

    def fill(flat: torch.Tensor) -> None:
        flat.fill_(number)

    return Block(
        name=f"block {number}",
        module=module,
        layout=layout_of(module),
        parts=(fill,),
    )


@contextmanager
def pool_of(blocks: Sequence[Block], num_bytes: int, lane: CpuLane) -> Iterator[Pool]:
    """Gives a pool of so much memory for blocks that the host keeps."""
    readers = Readers()
    host = HostStore(readers, pin=False)
    host.keep(blocks, None, lane)
    yield Pool(new_buffer(num_bytes, CPU), host, lane)
    readers.close()


def go_through(pool: Pool, blocks: Sequence[Block]) -> None:
    """Makes a pass, and looks at every weight that is lent."""
    for block in blocks:
        with pool.lend(block) as module:
            assert (module.get_parameter("weight") == int(block.name.split()[1])).all()


def test_small_blocks_share_what_large_ones_are_streamed_through() -> None:
    large = [plain_block(number, 1024) for number in range(6)]
    small = [plain_block(number, 512) for number in range(10, 18)]
    lane = CountingLane()
    with pool_of([*large, *small], 5 * 1024, lane) as pool:

        def num_copies(blocks: list[Block], *, keep: bool) -> int:
            """Returns the copies that a phase of three passes, or of one, makes."""
            lane.num_copies = 0
            pool.schedule(blocks, keep=keep)
            for _ in range(3 if keep else 1):
                go_through(pool, blocks)
            return lane.num_copies

        # Ten small buffers: each block has one.
        assert num_copies(small, keep=True) == 8
        assert num_copies(small, keep=True) == 0
        # The ring of large ones ends the memory: it takes that of the last two or four buffers.
        assert num_copies(large, keep=False) >= 6
        assert 2 <= num_copies(small, keep=True) <= 4
        # Three large ones are kept, the others go through the ring.
        assert num_copies(large, keep=True) >= 3 + 3 * 3
        assert num_copies(small, keep=True) == 8


def test_a_few_large_blocks_do_not_take_the_room_of_many_small_ones() -> None:
    """As the parts of the vocabulary head among layers of eight bits."""
    layers = [plain_block(number, 512) for number in range(8)]
    head = [plain_block(number, 1024) for number in range(10, 12)]
    lane = CountingLane()
    with pool_of([*layers, *head], 2 * 1024 + 6 * 512 + 100, lane) as pool:
        pool.schedule([*layers, *head], keep=True)
        go_through(pool, [*layers, *head])
        lane.num_copies = 0
        for _ in range(3):
            go_through(pool, [*layers, *head])
        # Six layers stay; two of them and the head go through the ring.
        assert lane.num_copies == 3 * 4
        assert not pool.keeps_all
        pool.schedule(layers, keep=True)
        go_through(pool, layers)
        lane.num_copies = 0
        go_through(pool, layers)
        assert (lane.num_copies, pool.keeps_all) == (0, True)


def test_what_was_copied_ahead_for_an_earlier_order_makes_way_at_once() -> None:
    first, second = (
        [plain_block(number, 1024) for number in numbers] for numbers in (range(4), range(4, 8))
    )
    lane = CountingLane()
    with pool_of([*first, *second], 2 * 1024, lane) as pool:
        for order in (first, second):
            pool.schedule(order, keep=False)
            lane.num_copies = 0
            with pool.lend(order[0]):
                # The block itself, and the next one beside the computation.
                assert lane.num_copies == 2


def test_a_block_that_is_lent_is_not_replaced_by_the_one_that_is_to_stay_there() -> None:
    """Where a block comes to a pass, others stay than before, and in buffers that are in use."""
    blocks = [plain_block(number, 1024) for number in range(8)]
    with pool_of(blocks, 6 * 1024, CpuLane()) as pool:
        for order in (blocks[:7], blocks):
            pool.schedule(order, keep=True)
            go_through(pool, order)


def test_memory_is_freed_once_every_copy_into_it_is_done() -> None:
    large = [plain_block(number, 1024) for number in range(4)]
    small = [plain_block(number, 512) for number in range(10, 14)]
    lane = LateLane()
    with pool_of([*large, *small], 4 * 1024, lane) as pool:
        pool.schedule(large, keep=True)
        with pool.lend(large[0]):
            pass
        # Takes the memory that large blocks are still copied to.
        pool.schedule(small, keep=True)
        assert lane.under_way
        pool.release()
        assert not lane.under_way


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE"), reason="torch allocates, and raises its own"
)
def test_memory_that_the_host_does_not_have_is_named_in_gib() -> None:
    with pytest.raises(OutOfMemoryError, match=r"the host has no 1048576\.00 GiB for weights: "):
        new_buffer(1 << 50, CPU)
