from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sensebatch.checkpoint.files import open_checkpoint
from sensebatch.config import MemoryConfig
from sensebatch.engine.device.memory import plan_placements
from sensebatch.errors import ConfigError
from sensebatch.jobs import VramMode
from sensebatch.plan.computation import Computation
from sensebatch.plan.device import place
from sensebatch.resolutions import Resolution
from sensebatch.units import GIB, MIB
from tests.plan.loads import make_load, with_drawing


@pytest.mark.parametrize("limit", [{}, {"vram_budget_bytes": GIB}, {"vram_mode": VramMode.LOW}])
def test_a_host_budget_is_not_enforced_on_a_cpu(limit: dict[str, Any]) -> None:
    """It is not compared with what a program with the CUDA libraries takes either."""
    computation = Computation(arch=open_checkpoint("tiny").architecture, item_bytes=4)
    loads = [with_drawing(make_load(prompt=20), resolution=Resolution(height=128, width=128))]
    without = MemoryConfig(**limit)
    memory = replace(without, host_budget_bytes=100 * MIB)
    device = torch.device("cpu")
    placements = plan_placements(computation, memory=memory, device=device, loads=loads)
    expected = plan_placements(computation, memory=without, device=device, loads=loads)
    for group, placement in placements.groups.items():
        assert placement.mode == expected.groups[group].mode
        assert placement.batch_size == expected.groups[group].batch_size
    if limit:
        with pytest.raises(ConfigError, match="expected cpu to be at least"):
            place(computation, memory=memory, loads=loads, device_free=None, host_free=200 * GIB)
