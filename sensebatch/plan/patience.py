"""How long a worker may say nothing before it counts as dead. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sensebatch.jobs import GroupKey, VramMode
from sensebatch.plan.load import Load
from sensebatch.plan.passes import RING
from sensebatch.plan.placement import Placement
from sensebatch.plan.seconds import Clock
from sensebatch.plan.work import Speeds

SLOWNESS = 20.0
"""How many times longer than its batch should take a worker may say nothing."""
LEAST_S = 600.0
"""The least patience: kernels are compiled, and weights come from a slow disk."""
UNKNOWN_S, CPU_UNKNOWN_S = 600.0, 6 * 3600.0
"""Patience where nothing is known of a batch. A worker speaks after every step, which takes seconds
on the slowest GPU; on a CPU a step of a large model takes minutes, and prompts with images more."""

STREAMED = Placement(
    mode=VramMode.LOW,
    num_buffers=RING,
    embed_on_device=False,
    tokens_per_pass=1,
    park_caches=True,
    host_block_bytes=None,
    device_bytes=0,
    host_bytes=0,
    reason="every weight is copied for every image",
)
"""Where weights are while a batch takes the longest."""


def patience_s(*known_s: float | None, on_cpu: bool) -> float:
    """Returns how long a worker may say nothing.

    Args:
        known_s: What its batch should take, by each of those who may know it: the plan, for a GPU
            that was measured, and earlier batches of the same task.
        on_cpu: Whether it computes on a CPU.
    """
    found = [seconds for seconds in known_s if seconds is not None]
    if not found:
        return CPU_UNKNOWN_S if on_cpu else UNKNOWN_S
    return max(LEAST_S, SLOWNESS * max(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredGpu:
    """A GPU that `sensebatch doctor` has measured."""

    name: str
    speeds: Speeds


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSeconds:
    """What the plan says that batches take, at worst."""

    gpu: str
    """The name of the GPU that it holds for."""
    clock: Clock | None
    """None where the network computes with numbers that were not measured."""
    loads: Mapping[GroupKey, Load]

    def of(self, device: str, group: GroupKey, num_jobs: int) -> float | None:
        """Returns the least seconds of a batch with everything streamed; None if not known."""
        load = self.loads.get(group)
        if self.clock is None or load is None or device != self.gpu:
            return None
        seconds = self.clock.group_seconds(replace(load, batch_size=num_jobs), num_jobs, STREAMED)
        return seconds.images + seconds.text
