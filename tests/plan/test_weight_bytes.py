"""What the weights take."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from sensebatch.checkpoint.tensors import TensorGroup, expected_tensors
from sensebatch.jobs import Precision
from sensebatch.plan.computation import Computation
from sensebatch.plan.weight_bytes import weight_bytes
from sensebatch.units import GIB
from tests.golden_data import CONFIGS, golden_architecture
from tests.plan.loads import (
    ARCH,
    COMPUTATION,
)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("item_bytes", [2, 4])
def test_every_weight_is_counted_once(config: str, item_bytes: int) -> None:
    arch = golden_architecture(config)
    weights = weight_bytes(Computation(arch=arch, item_bytes=item_bytes))
    total = sum(math.prod(spec.shape) for spec in expected_tensors(arch).values())
    assert weights.blocks + weights.embeddings + weights.rest == total * item_bytes
    blocks = weights.num_generation + weights.num_understanding
    assert weights.blocks <= weights.block * blocks


def test_the_experts_of_the_8b_model_are_as_large_as_published() -> None:
    gib = {
        group: 2
        * sum(s.num_elements for s in expected_tensors(ARCH).values() if s.group is group)
        / GIB
        for group in TensorGroup
    }
    assert gib[TensorGroup.GENERATION] == pytest.approx(15.25, abs=0.01)
    assert gib[TensorGroup.UNDERSTANDING] == pytest.approx(15.13, abs=0.01)
    assert gib[TensorGroup.SHARED] == pytest.approx(2 * 1.16, abs=0.01)
    assert weight_bytes(COMPUTATION).block / GIB == pytest.approx(0.36, abs=0.01)


def test_blocks_of_bfloat16_that_text_goes_through_are_packed_in_host_memory() -> None:
    plain, packed = (weight_bytes(replace(COMPUTATION, packs=packs)) for packs in (False, True))
    assert (plain.packed_blocks, plain.unpacking) == (plain.blocks, 0)
    assert packed.blocks == plain.blocks
    saved = packed.blocks - packed.packed_blocks
    text = packed.blocks - packed.generation_layers
    assert saved == pytest.approx(text / 4, rel=0.03)
    assert packed.buffers(2, 3) - plain.buffers(2, 3) == packed.unpacking > 0
    quantised = weight_bytes(replace(COMPUTATION, packs=True, precision=Precision.INT8_ALL))
    head = ARCH.vocab_size * ARCH.hidden_size * 2
    assert quantised.blocks - quantised.packed_blocks == pytest.approx(head / 4, rel=0.03)
