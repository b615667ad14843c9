"""Packed weights are three quarters of the bytes, and come out as they went in."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sensebatch.engine.memory import host as host_module
from sensebatch.engine.memory.blocks import Block, layout_of, new_buffer
from sensebatch.engine.memory.host import HostStore
from sensebatch.engine.memory.lanes import CpuLane
from sensebatch.engine.memory.packing import Packed, pack, split_exceptions, unpack
from sensebatch.engine.memory.pool import Pool
from sensebatch.engine.memory.readers import Readers
from sensebatch.errors import DeviceError
from sensebatch.plan import passes
from sensebatch.plan.passes import PACKED_SHARE
from tests.engine.test_kernels import interpreted

CPU = torch.device("cpu")


def new(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def packed_of(numbers: Tensor) -> Packed:
    found = pack(numbers.view(torch.uint8), CPU, new)
    assert found is not None
    return found


def weights(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.02 * torch.randn(count, generator=generator)).to(torch.bfloat16)


def unpacked(found: Packed) -> Tensor:
    target = torch.full((found.flat.numel() // 3 * 4,), 7, dtype=torch.uint8)
    unpack(found, target)
    return target.view(torch.bfloat16)


def test_weights_take_three_quarters_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "PACKING_CHUNK", 1 << 16)
    numbers = torch.cat((torch.ones(4000, dtype=torch.bfloat16), weights(400_000)))
    found = packed_of(numbers)
    assert 0.75 < found.nbytes / (2 * numbers.numel()) < 0.76
    assert torch.equal(unpacked(found).view(torch.int16), numbers.view(torch.int16))


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=16, max_size=400))
def test_any_bytes_come_back(content: bytes) -> None:
    raw = torch.frombuffer(bytearray(content[: len(content) // 16 * 16]), dtype=torch.uint8)
    found = pack(raw, CPU, new)
    assert found is not None
    target = torch.empty_like(raw)
    unpack(found, target)
    assert torch.equal(target, raw)


def test_what_is_not_worth_while_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pack(torch.zeros(6, dtype=torch.uint8), CPU, new) is None
    monkeypatch.setattr(passes, "MAX_EXCEPTION_BYTES", 600)
    even = torch.randint(0, 256, (4000,), dtype=torch.uint8, generator=torch.Generator())
    assert pack(even, CPU, new) is None
    assert pack(weights(2000).view(torch.uint8), CPU, new) is not None


@interpreted
def test_kernels_unpack_what_torch_does() -> None:
    from sensebatch.engine.memory.packing_kernels import restore_exceptions, unpack_chunk

    numbers = torch.cat((weights(5000), torch.tensor([0.0, -1e30, 3e-39], dtype=torch.bfloat16)))
    numbers = torch.cat((numbers, weights(5)))
    found = packed_of(numbers)
    target = torch.empty(numbers.numel(), dtype=torch.int16)
    ((first, flat),) = found.chunks()
    unpack_chunk(flat, target[first:], found.base)
    restore_exceptions(found.exceptions, target)
    assert torch.equal(target, numbers.view(torch.int16))
    places, values = split_exceptions(found.exceptions)
    assert len(places) == len(values) >= 3


class Layer(nn.Module):
    """A matrix and a norm."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in (("matrix", (600, 200)), ("norm", (200,))):
            value = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))


def layer_block(number: int, dtype: torch.dtype = torch.bfloat16) -> Block:
    module = Layer(dtype)
    layout = layout_of(module)

    def fill(flat: Tensor) -> None:
        for name, view in layout.views(flat).items():
            numbers = (
                weights(view.numel(), number) if name == "matrix" else torch.ones(view.numel())
            )
            view.copy_(numbers.view(view.shape))

    return Block(name=f"layer {number}", module=module, layout=layout, parts=(fill,))


@pytest.mark.parametrize("room", [None, 1_700_000])
def test_blocks_of_bfloat16_are_kept_packed_and_lent_as_they_were(room: int | None) -> None:
    blocks = [layer_block(number) for number in range(4)]
    blocks += [layer_block(number, torch.float32) for number in range(4, 7)]

    readers, lane = Readers(), CpuLane()
    host = HostStore(readers, pin=False, pack_on=CPU)
    host.keep(blocks, room, lane, packed=blocks)
    half, whole = blocks[0].layout.num_bytes, blocks[-1].layout.num_bytes
    assert [isinstance(host._kept.get(block), Packed) for block in blocks] == [True] * 4 + 3 * [
        False
    ]
    if room is None:
        assert 3 * half < host.kept_bytes - 3 * whole < 3.06 * half
    else:
        # Beside two buffers for what is read, only three of them would have fitted as they were.
        assert not set(blocks[4:]) & set(host._kept)
        assert 3 * half < host.kept_bytes - 2 * whole < 3.06 * half
        assert host.kept_bytes <= room < 2 * whole + 4 * half
    pool = Pool(new_buffer(3 * whole, CPU), host, lane)
    pool.schedule(blocks, keep=True)
    for _ in range(2):
        for block in blocks:
            expected = new_buffer(block.layout.num_bytes, CPU)
            block.parts[0](expected)
            with pool.lend(block) as module:
                for name, view in block.layout.views(expected).items():
                    assert torch.equal(module.get_parameter(name), view)
    host.close(lane)
    readers.close()


def wild_block(number: int) -> Block:
    """Returns a block whose numbers are of all sizes, so that it cannot be packed."""
    block = layer_block(number)

    def fill(flat: Tensor) -> None:
        generator = torch.Generator().manual_seed(number)
        flat.view(torch.int16).random_(-(1 << 15), 1 << 15, generator=generator)

    return replace(block, parts=(fill,))


@pytest.mark.parametrize("wild", [{}, {0}, {3}, {1, 4}, {5}, {0, 1, 2, 3, 4, 5}])
@pytest.mark.parametrize("spare", [0.0, 0.3, 2.5])
def test_blocks_that_cannot_be_packed_stay_within_the_budget(
    monkeypatch: pytest.MonkeyPatch, wild: set[int], spare: float
) -> None:
    monkeypatch.setattr(passes, "MAX_EXCEPTION_BYTES", 1 << 12)
    blocks = [wild_block(n) if n in wild else layer_block(n) for n in range(6)]
    size = blocks[0].layout.num_bytes
    # Those that can be packed take a little more than is expected of layers of full size.
    room = int(size * (6 * PACKED_SHARE + 0.05 + spare))
    readers, lane = Readers(), CpuLane()
    host = HostStore(readers, pin=False, pack_on=CPU)
    host.keep(blocks, room, lane, packed=blocks)
    assert host.kept_bytes <= room
    assert len(host._kept) == 6 or host.kept_bytes > room - 1.01 * size
    if not wild:
        assert len(host._kept) == 6
    pool = Pool(new_buffer(3 * size, CPU), host, lane)
    pool.schedule(blocks, keep=True)
    for block in blocks:
        expected = new_buffer(size, CPU)
        block.parts[0](expected)
        with pool.lend(block) as module:
            for name, view in block.layout.views(expected).items():
                found = module.get_parameter(name).view(torch.int16)
                assert torch.equal(found, view.view(torch.int16))
    host.close(lane)
    readers.close()


def test_blocks_that_cannot_be_packed_leave_what_they_were_read_into(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is as large as the largest block, and what a device unpacks is compared there."""
    monkeypatch.setattr(passes, "MAX_EXCEPTION_BYTES", 1 << 12)
    # One at a time, so that the last one is read into what the first was packed from.
    monkeypatch.setattr(host_module, "NUM_KEEPERS", 1)
    large = [layer_block(0, torch.float32), layer_block(1), wild_block(2)]
    readers = Readers()
    host = HostStore(readers, pin=False, pack_on=CPU)
    host.keep(large, None, CpuLane(), packed=large)
    packed, whole = host._kept[large[1]], host._kept[large[2]]
    assert isinstance(packed, Packed)
    assert isinstance(whole, Tensor)
    assert whole.untyped_storage().nbytes() == large[2].layout.num_bytes
    expected = new_buffer(whole.nbytes, CPU)
    large[2].parts[0](expected)
    assert torch.equal(whole, expected)
    readers.close()


class WrongLane(CpuLane):
    """A device whose kernel gets a number wrong."""

    def unpack(self, target: Tensor, source: Packed, after: object, done: object) -> None:
        super().unpack(target, source, after, done)
        target[0] += 1


def test_a_device_that_unpacks_other_weights_is_not_used() -> None:
    readers = Readers()
    host = HostStore(readers, pin=False, pack_on=CPU)
    blocks = [layer_block(number) for number in range(3)]
    with pytest.raises(DeviceError, match=r"cpu unpacks other weights .* --no-compile"):
        host.keep(blocks, None, WrongLane(), packed=blocks)
    readers.close()


class ScribblingLane(CpuLane):
    """A device with something else after the last tensor of a block."""

    def unpack(self, target: Tensor, source: Packed, after: object, done: object) -> None:
        super().unpack(target, source, after, done)
        target[-1] += 1


def test_what_lies_between_tensors_does_not_count() -> None:
    blocks = [layer_block(number) for number in range(3)]
    entries = blocks[0].layout.entries
    assert sum(2 * math.prod(entry.shape) for entry in entries) < blocks[0].layout.num_bytes
    readers = Readers()
    host = HostStore(readers, pin=False, pack_on=CPU)
    host.keep(blocks, None, ScribblingLane(), packed=blocks)
    readers.close()
