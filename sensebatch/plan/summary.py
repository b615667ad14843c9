"""A plan as `sensebatch plan` prints it: what is run, and what it needs of memory and time.

Reads a checkpoint's headers alone, and knows no more of the machine than it is given, so that a
plan made on a laptop holds for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sensebatch.checkpoint.files import check_tensors, open_checkpoint
from sensebatch.checkpoint.hub import is_hub_id
from sensebatch.checkpoint.lora import read_lora
from sensebatch.checkpoint.system_prompts import resolve_system_prompts
from sensebatch.checkpoint.tensors import expected_tensors
from sensebatch.checkpoint.tokenizer import check_tokenizer
from sensebatch.config import SYNTHETIC_PREFIX, TINY_MODEL, MemoryConfig, RunConfig
from sensebatch.errors import CheckpointError, Problem
from sensebatch.jobs import VramMode
from sensebatch.plan.batches import GroupPlan, Plan
from sensebatch.plan.computation import Computation, gpu_computation
from sensebatch.plan.device import place
from sensebatch.plan.host import ENOUGH_BYTES
from sensebatch.plan.load import Load, group_load, plan_loads
from sensebatch.plan.long_prompts import LongPrompts
from sensebatch.plan.passes import RING
from sensebatch.plan.placement import Placement, Refusal
from sensebatch.plan.precision import check_settings
from sensebatch.plan.seconds import Clock, GroupSeconds, new_clock
from sensebatch.plan.weight_bytes import WeightBytes, weight_bytes
from sensebatch.plan.work import Machine


def plan_summary(plan: Plan) -> dict[str, Any]:
    """Returns the batches of a plan as `sensebatch plan --json` prints them.

    `images` counts the images to be made. How many an interleave job draws is known only
    afterwards; it counts with the most it may draw, and `images_exact` is then false.
    """
    return {
        "jobs": plan.num_jobs,
        "images": plan.max_images,
        "images_exact": all(group.images_exact for group in plan.groups),
        "batches": plan.num_batches,
        "groups": [_group_summary(group) for group in plan.groups],
    }


def _group_summary(plan: GroupPlan) -> dict[str, Any]:
    group, drawing = plan.group, plan.group.drawing
    return {
        "task": group.task.value,
        "width": None if drawing is None else drawing.resolution.width,
        "height": None if drawing is None else drawing.resolution.height,
        "num_steps": None if drawing is None else drawing.num_steps,
        "timestep_shift": None if drawing is None else drawing.timestep_shift,
        "think": group.think,
        "level": plan.level,
        "branches": list(group.branches),
        "jobs": plan.num_jobs,
        "batches": plan.num_batches,
        "batch_size": plan.batch_size,
        "images": plan.max_images,
        "images_exact": plan.images_exact,
        "image_tokens": plan.max_image_tokens,
    }


def is_local(model: str) -> bool:
    """Returns whether a model's files are on this machine if they are anywhere.

    Those of a Hub id may have to be fetched.
    """
    if model == TINY_MODEL or model.startswith(SYNTHETIC_PREFIX) or not is_hub_id(model):
        return True
    return Path(model).is_dir()


def long_prompts(
    config: RunConfig, machine: Machine | None, warn: Callable[[Problem], None]
) -> LongPrompts:
    """Returns what looks out for long prompts, with what is known of their costs."""
    arch = None
    if is_local(config.model.model):
        # What is wrong with a checkpoint is for others to say.
        with suppress(CheckpointError):
            arch = open_checkpoint(config.model.model, config.model.revision).architecture
    return LongPrompts(warn, arch, None if machine is None else machine.speeds)


def memory_summary(
    plan: Plan, config: RunConfig, machine: Machine | None
) -> list[dict[str, Any]] | None:
    """Returns what each mode needs, or only the one that a mode, a budget or the GPU leaves.

    Args:
        plan: Its groups decide what passes need.
        config: Model, dtype, mode and budgets.
        machine: The GPU to plan for; None where none is known.

    Returns:
        For each placement the mode, why, and bytes and seconds of the run and of each group; see
        docs/memory.md. None where the model is a Hub id, whose files may have to be fetched, and
        for a CPU, where host and device are the same memory.

    Raises:
        CheckpointError: A run would refuse the model's files or the LoRA.
        ConfigError: The budget or the GPU is too small, or no device has the precision with the
            other settings.
    """
    check_settings(config.model)
    model = config.model.model
    if not is_local(model):
        return None
    checkpoint = open_checkpoint(model, config.model.revision)
    check_tensors(checkpoint)
    check_tokenizer(checkpoint.path)
    if config.model.lora_path is not None:
        read_lora(Path(config.model.lora_path), expected_tensors(checkpoint.architecture))
    if config.model.device == "cpu":
        return None
    prompts = resolve_system_prompts(checkpoint, config.model.system_prompt_file)
    computation = gpu_computation(checkpoint.architecture, config.model)
    loads = plan_loads(plan, system_prompt_bytes=prompts.longest_bytes)
    backend = _attention_backend(config.model.attn_backend, machine, loads)
    summary = _Summary(
        computation=computation,
        weights=weight_bytes(computation),
        loads=loads,
        groups=[
            group_load(group, system_prompt_bytes=prompts.longest_bytes) for group in plan.groups
        ],
        num_jobs=[group.num_jobs for group in plan.groups],
        machine=machine,
        clock=None if machine is None else _new_clock(computation, machine, backend),
        attn_backend=backend,
    )
    memory = config.memory
    if memory.vram_mode is not VramMode.AUTO or memory.vram_budget_bytes is not None or machine:
        return [summary.of(memory)]
    modes = [mode for mode in VramMode if mode is not VramMode.AUTO]
    return [summary.of(replace(memory, vram_mode=mode)) for mode in modes]


def _attention_backend(asked: str, machine: Machine | None, loads: Sequence[Load]) -> str | None:
    """Returns the attention backend that a run would use; None where it is not known."""
    if asked != "auto":
        return asked
    if machine is None or machine.attention is None:
        return None
    return next(iter(machine.attention.ranking(loads)), None)


def _new_clock(computation: Computation, machine: Machine, backend: str | None) -> Clock | None:
    speeds = machine.attention
    if speeds is None or backend is None:
        return new_clock(computation, machine.speeds)
    return new_clock(computation, machine.speeds, partial(speeds.speed, backend))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Summary:
    """Sums up placements of the same groups."""

    computation: Computation
    weights: WeightBytes
    loads: Sequence[Load]
    """Those that memory is planned for."""
    groups: Sequence[Load]
    """Those of the plan's groups, level by level."""
    num_jobs: Sequence[int]
    """Jobs of each of these groups."""
    machine: Machine | None
    clock: Clock | None
    attn_backend: str | None
    """What attends the images; None where that is not known."""

    def of(self, memory: MemoryConfig) -> dict[str, Any]:
        """Returns what a placement needs, for the run and each of its groups.

        Raises:
            ConfigError: There is none that fits.
        """
        named = memory.vram_mode is not VramMode.AUTO
        placements = place(
            self.computation,
            memory=memory,
            loads=self.loads,
            # A mode that was asked for by name is shown, whatever this machine has.
            device_free=None if named or self.machine is None else self.machine.free_bytes,
            host_free=ENOUGH_BYTES,
        )
        leanest, seconds, groups = placements.leanest, [], []
        for load, num_jobs in zip(self.groups, self.num_jobs, strict=True):
            of_group = [r for r in placements.refused if r.group == load.group]
            refused = {refusal.demand for refusal in of_group}
            # The group may have other jobs at another level.
            num_refused = sum(count for demand, count in load.demands if demand in refused)
            if num_refused == num_jobs:
                groups.append(_refused_group(of_group, num_jobs))
                continue
            placement = placements.of(load.group)
            load = load.without(refused) or load
            if self.clock is not None:
                seconds.append(self.clock.group_seconds(load, num_jobs - num_refused, placement))
            group = self._group(load, placement, seconds[-1] if seconds else None)
            groups.append(
                {**group, "refused_jobs": num_refused, "refused_demands": _demands(of_group)}
            )
        total = GroupSeconds(
            images=sum(own.images for own in seconds), text=sum(own.text for own in seconds)
        )
        return {
            "vram_mode": leanest.mode.value,
            "reason": leanest.reason,
            "device_bytes": placements.peak_bytes,
            "host_bytes": placements.host_bytes,
            "file_bytes": self._file_bytes(leanest),
            "seconds": _seconds(total if seconds else None),
            "attn_backend": self.attn_backend,
            "refusals": list(placements.refusals()),
            "groups": groups,
        }

    def _group(
        self, load: Load, placement: Placement, seconds: GroupSeconds | None
    ) -> dict[str, Any]:
        load = placement.fitted(load)
        return {
            "vram_mode": placement.mode.value,
            "reason": placement.reason,
            "batch_size": load.batch_size,
            "jobs_per_pass": load.jobs_per_pass(placement.tokens_per_pass),
            "kept_layers": self.weights.layers_kept(placement.num_buffers, RING),
            "text_batches": placement.text_batches,
            "device_bytes": placement.peak_bytes,
            "host_bytes": placement.host_bytes,
            "seconds": _seconds(seconds),
        }

    def _file_bytes(self, placement: Placement) -> int:
        """Returns the bytes of blocks that host memory has no room for."""
        if placement.num_buffers is None or placement.host_block_bytes is None:
            return 0
        weights = self.weights
        missing = max(weights.packed_blocks - placement.host_block_bytes, 0)
        return missing * weights.blocks // weights.packed_blocks


def _refused_group(refusals: Sequence[Refusal], num_jobs: int) -> dict[str, Any]:
    """Returns what is said of a group of which no job fits."""
    return {
        "vram_mode": None,
        "reason": refusals[0].message,
        "batch_size": 0,
        "jobs_per_pass": 0,
        "kept_layers": 0,
        "text_batches": 0,
        "device_bytes": min(refusal.needed_bytes for refusal in refusals),
        "host_bytes": 0,
        "seconds": None,
        "refused_jobs": num_jobs,
        "refused_demands": _demands(refusals),
    }


def _demands(refusals: Sequence[Refusal]) -> list[dict[str, int]]:
    return [one._asdict() for one in dict.fromkeys(refusal.demand for refusal in refusals)]


def _seconds(seconds: GroupSeconds | None) -> dict[str, float] | None:
    return None if seconds is None else {"images": seconds.images, "text": seconds.text}
