"""What the arithmetic of memory and time says of a case, from its manifest and options alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.checkpoint.files import open_checkpoint
from sensebatch.checkpoint.system_prompts import resolve_system_prompts
from sensebatch.checkpoint.tensors import expected_tensors
from sensebatch.jobs import GroupKey
from sensebatch.manifest.read import read_manifest
from sensebatch.plan.batches import GroupPlan, make_plan, plan_entry
from sensebatch.plan.computation import Computation, gpu_computation
from sensebatch.plan.device import place
from sensebatch.plan.host import ENOUGH_BYTES
from sensebatch.plan.load import Load, plan_loads
from sensebatch.plan.placement import Placements
from sensebatch.plan.seconds import new_clock
from sensebatch.plan.work import Speeds
from sensebatch.profile.rows import Row
from sensebatch.profile.suites import Case, Scale
from sensebatch.settings import resolve_settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """A case as the arithmetic sees it."""

    computation: Computation
    groups: Sequence[GroupPlan]
    loads: Sequence[Load]
    """One for each group."""
    placements: Placements
    """Where weights are put for each group, and how much memory the case is expected to take."""

    def limits(self, speeds: Speeds, *, with_text: bool) -> tuple[float, float | None] | None:
        """Returns the least seconds of the case, and of one denoising step of one image, if it
        draws any.

        Args:
            speeds: What the machine reaches at most.
            with_text: Whether every job writes as much text as it may.

        Returns:
            None where the case computes with other numbers than speeds are measured with.
        """
        clock = new_clock(self.computation, speeds)
        if clock is None:
            return None
        total = step = 0.0
        for group, load in zip(self.groups, self.loads, strict=True):
            placement = self.placements.of(load.group)
            seconds = clock.group_seconds(load, group.num_jobs, placement)
            total += seconds.images + (seconds.text if with_text else 0.0)
            if load.group.drawing is None:
                continue
            # What a run of twice as many steps takes on top is these steps and nothing else.
            longer = replace(load, group=_twice_the_steps(load.group))
            longer_seconds = clock.group_seconds(longer, group.num_jobs, placement)
            step += longer_seconds.images - seconds.images
        steps = sum(
            group.max_images * group.group.drawing.num_steps
            for group in self.groups
            if group.group.drawing is not None
        )
        return total, step / steps if steps else None


def _twice_the_steps(group: GroupKey) -> GroupKey:
    drawing = group.drawing
    assert drawing is not None
    return replace(group, drawing=replace(drawing, num_steps=2 * drawing.num_steps))


def expectation(
    case: Case, model: str, manifest: Path, dtype: str, *, num_workers: int = 1
) -> Expectation:
    """Returns a case as the arithmetic sees it.

    Args:
        case: With its options.
        model: As `sensebatch run --model` takes it.
        manifest: The case's.
        dtype: The dtype of weights and activations, by name.
        num_workers: How many workers of one host run it.

    Raises:
        ConfigError: The case does not fit its budget.
    """
    config = resolve_settings(flags={"model.model": model} | case.flags)
    checkpoint = open_checkpoint(model)
    plan = make_plan((plan_entry(job) for job in read_manifest(manifest, config)), config.memory)
    longest = resolve_system_prompts(checkpoint).longest_bytes
    loads = plan_loads(plan, system_prompt_bytes=longest)
    # As on a GPU: a CPU's memory is not measured.
    model_config = replace(config.model, dtype=dtype)
    computation = gpu_computation(checkpoint.architecture, model_config)
    placements = place(
        computation,
        memory=config.memory,
        loads=loads,
        device_free=None,
        host_free=ENOUGH_BYTES,
        num_workers=num_workers,
    )
    return Expectation(
        computation=computation,
        groups=plan.groups,
        loads=loads,
        placements=placements,
    )


def cpu_weight_bytes(architecture: Architecture) -> int:
    """Returns the bytes of a network's weights on a CPU, which computes in float32."""
    return 4 * sum(spec.num_elements for spec in expected_tensors(architecture).values())


def with_expectation(
    row: Row, case: Case, scale: Scale, manifest: Path, speeds: Mapping[str, Speeds]
) -> Row:
    """Returns a row with the bytes and the least seconds of the arithmetic.

    Bytes are left out where another placement was used than is expected, seconds where no speeds
    are known of the device or other work was done than is counted.

    Args:
        row: With the figures of the case's run.
        case: With its options.
        scale: How large it is.
        manifest: The case's.
        speeds: What GPUs reach at most, by their names.
    """
    assert row.dtype is not None
    expected = expectation(case, row.model, manifest, row.dtype)
    if row.vram_mode != expected.placements.leanest.mode:
        return row
    row = replace(row, expected_peak_bytes=expected.placements.peak_bytes)
    of_device = speeds.get(row.device or "")
    if of_device is None or row.images != case.max_images:
        return row
    limits = expected.limits(of_device, with_text=scale.scripted)
    return row if limits is None else replace(row, limit_s=limits[0], limit_step_s=limits[1])
