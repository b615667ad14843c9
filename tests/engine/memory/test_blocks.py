"""Blocks as bytes: parameters of several dtypes in one buffer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sensebatch.engine.memory.blocks import ALIGNMENT, Block, bind, layout_of, new_buffer
from sensebatch.engine.memory.host import CPU, HostStore
from sensebatch.engine.memory.lanes import CpuLane
from sensebatch.engine.memory.pool import Pool
from sensebatch.engine.memory.readers import Readers

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
