"""What the weights take."""

from __future__ import annotations

import math

import pytest

from sensebatch.checkpoint.tensors import TensorGroup, expected_tensors
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
