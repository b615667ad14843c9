"""What the memory modes would need for a plan, and how long it would take at least.

Arithmetic on a checkpoint's headers. It knows of the machine no more than `sensebatch doctor` has
measured, so that a plan made on a laptop holds for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.checkpoint.files import Checkpoint, open_checkpoint
from sensebatch.checkpoint.system_prompts import resolve_system_prompts
from sensebatch.cli.speed_cache import MachineSpeeds
from sensebatch.config import SYNTHETIC_PREFIX, TINY_MODEL, MemoryConfig, ModelConfig, RunConfig
from sensebatch.plan.batches import Plan, group_load
from sensebatch.plan.device import MODES, RING, place
from sensebatch.plan.footprint import Load, jobs_per_pass
from sensebatch.plan.placement import Placement
from sensebatch.plan.seconds import Clock, GroupSeconds
from sensebatch.plan.weight_bytes import WeightBytes, weight_bytes
from sensebatch.plan.work import MEASURED_ITEM_BYTES

ITEM_BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a weight; auto as on a GPU."""
ENOUGH_BYTES = 1 << 50
"""Host memory where no budget is given: as much as the weights need."""


def memory_summary(
    plan: Plan, config: RunConfig, machine: MachineSpeeds | None
) -> list[dict[str, Any]] | None:
    """Returns what each mode needs, or the one that a mode, a budget or the GPU leaves.

    Args:
        plan: Its groups decide what passes need.
        config: Model, dtype, mode and budgets.
        machine: The GPU to plan for; None where none is known.

    Returns:
        For each placement the mode, why, and for the run and each group of it bytes and seconds;
        see docs/memory.md. None where the model is a Hub id, whose files may have to be fetched,
        and for a CPU, where host and device are the same memory.

    Raises:
        CheckpointError: The model's files cannot be read.
        ConfigError: The budget or the GPU is too small.
    """
    model = config.model.model
    local = model == TINY_MODEL or model.startswith(SYNTHETIC_PREFIX)
    if config.model.device == "cpu" or not (local or Path(model).expanduser().is_dir()):
        return None
    checkpoint = open_checkpoint(model, config.model.revision)
    longest = _system_prompt_bytes(checkpoint, config.model)
    run = _Run(
        arch=checkpoint.architecture,
        loads=[group_load(group, system_prompt_bytes=longest) for group in plan.groups],
        num_jobs=[group.num_jobs for group in plan.groups],
        item_bytes=ITEM_BYTES[config.model.dtype],
        precision=config.model.quantised,
        fused=config.model.compile,
        machine=machine,
    )
    memory = config.memory
    if memory.vram_mode != "auto" or memory.vram_budget_bytes is not None or machine is not None:
        return [run.placed(memory)]
    modes = [mode for mode in MODES if mode != "auto"]
    return [run.placed(replace(memory, vram_mode=mode)) for mode in modes]


def _system_prompt_bytes(checkpoint: Checkpoint, model: ModelConfig) -> int:
    """Returns the length of the longer system prompt, as the run will find it."""
    file = model.system_prompt_file
    return resolve_system_prompts(checkpoint, None if file is None else Path(file)).longest_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What is to be run, as the arithmetic wants it."""

    arch: Architecture
    loads: Sequence[Load]
    num_jobs: Sequence[int]
    """Of each load's group."""
    item_bytes: int
    precision: str | None
    fused: bool
    """Whether chains of small operations are kernels, as on a GPU."""
    machine: MachineSpeeds | None

    def placed(self, memory: MemoryConfig) -> dict[str, Any]:
        """Returns what a placement needs, for the run and each of its groups.

        Raises:
            ConfigError: There is none.
        """
        named = memory.vram_mode != "auto"
        placements = place(
            self.arch,
            memory,
            list(self.loads),
            item_bytes=self.item_bytes,
            precision=self.precision,
            fused=self.fused,
            # A mode that was asked for by name is shown, whatever this machine has.
            device_free=None if named or self.machine is None else self.machine.free_bytes,
            host_free=ENOUGH_BYTES,
        )
        groups = [
            self._group(load, num_jobs, placements.of(load.group))
            for load, num_jobs in zip(self.loads, self.num_jobs, strict=True)
        ]
        leanest = placements.leanest
        return {
            "vram_mode": leanest.mode,
            "reason": leanest.reason,
            "device_bytes": placements.device_bytes,
            "host_bytes": max(
                (group["host_bytes"] for group in groups), default=leanest.host_bytes
            ),
            "file_bytes": self._file_bytes(leanest),
            "seconds": _total([group["seconds"] for group in groups]),
            "groups": groups,
        }

    def _file_bytes(self, placement: Placement) -> int:
        """Returns the bytes of blocks that host memory has no room for."""
        if placement.num_buffers is None or placement.host_budget_bytes is None:
            return 0
        return max(self._weights.blocks - placement.host_budget_bytes, 0)

    @property
    def _weights(self) -> WeightBytes:
        return weight_bytes(self.arch, self.item_bytes, self.precision)

    def _group(self, load: Load, num_jobs: int, placement: Placement) -> dict[str, Any]:
        load = placement.fitted(load)
        seconds = self._seconds(load, num_jobs, placement)
        return {
            "vram_mode": placement.mode,
            "reason": placement.reason,
            "batch_size": load.batch_size,
            "jobs_per_pass": jobs_per_pass(load, placement.tokens_per_pass),
            "kept_layers": self._weights.layers_kept(placement.num_buffers, RING),
            "device_bytes": placement.device_bytes,
            "host_bytes": placement.host_bytes,
            "seconds": None if seconds is None else asdict(seconds),
        }

    def _seconds(self, load: Load, num_jobs: int, placement: Placement) -> GroupSeconds | None:
        measured = self.item_bytes == MEASURED_ITEM_BYTES and self.precision is None
        if self.machine is None or not measured:
            return None
        clock = Clock(self.arch, placement, self.item_bytes, self.machine.speeds)
        return clock.group_seconds(load, num_jobs)


def _total(seconds: Sequence[dict[str, float] | None]) -> dict[str, float] | None:
    known = [of_group for of_group in seconds if of_group is not None]
    if len(known) < len(seconds) or not known:
        return None
    return {name: sum(of_group[name] for of_group in known) for name in known[0]}
