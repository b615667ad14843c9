"""What the memory modes would need for a plan: arithmetic on a checkpoint's headers.

Knows nothing of the machine it runs on, so that a plan made on a laptop holds for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.checkpoint.files import open_checkpoint
from sensebatch.config import SYNTHETIC_PREFIX, TINY_MODEL, MemoryConfig, RunConfig
from sensebatch.plan import Plan, group_load
from sensebatch.vram import MODES, Load, jobs_per_pass, place

ITEM_BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a weight; auto as on a GPU."""
ENOUGH_BYTES = 1 << 50
"""Host memory where no budget is given: as much as the weights need."""


def memory_summary(plan: Plan, config: RunConfig) -> list[dict[str, Any]] | None:
    """Returns what each mode needs, or the one that a mode or budget leaves.

    Args:
        plan: Its groups decide what passes need.
        config: Model, dtype, mode and budgets.

    Returns:
        None where the model is a Hub id, whose files may have to be fetched first.

    Raises:
        CheckpointError: The model's files cannot be read.
        ConfigError: The budget is too small.
    """
    model = config.model.model
    local = model == TINY_MODEL or model.startswith(SYNTHETIC_PREFIX)
    if not local and not Path(model).expanduser().is_dir():
        return None
    arch = open_checkpoint(model, config.model.revision).architecture
    item_bytes = ITEM_BYTES[config.model.dtype]
    loads = [group_load(group) for group in plan.groups]
    memory = config.memory
    if memory.vram_mode != "auto" or memory.vram_budget_bytes is not None:
        return [_placed(arch, memory, loads, item_bytes)]
    modes = [mode for mode in MODES if mode != "auto"]
    return [_placed(arch, replace(memory, vram_mode=mode), loads, item_bytes) for mode in modes]


def _placed(
    arch: Architecture, memory: MemoryConfig, loads: Sequence[Load], item_bytes: int
) -> dict[str, Any]:
    placement = place(
        arch,
        memory,
        list(loads),
        item_bytes=item_bytes,
        device_free=None,
        host_free=ENOUGH_BYTES,
    )
    return {
        "vram_mode": placement.mode,
        "device_bytes": placement.device_bytes,
        "host_bytes": placement.host_bytes,
        "jobs_per_pass": [jobs_per_pass(load, placement.tokens_per_pass) for load in loads],
    }
