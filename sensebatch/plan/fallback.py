"""What a run goes on with where a placement turned out not to fit. Integers only, no torch."""

from __future__ import annotations

from dataclasses import replace

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.jobs import GroupKey
from sensebatch.plan.device import RING, fast_buffers
from sensebatch.plan.placement import Placement, Placements
from sensebatch.plan.weight_bytes import WeightBytes, weight_bytes


def leaner(
    arch: Architecture,
    placements: Placements,
    group: GroupKey,
    item_bytes: int,
    precision: str | None = None,
) -> Placements | None:
    """Returns what to go on with where a job alone did not fit; None if nothing is left to give up.

    First fewer weights stay on the device, half of the buffers each time, then jobs of the group
    are drawn one by one. Other groups keep as many blocks less: that memory is gone for them too.

    Args:
        arch: The network's shape.
        placements: Of the run.
        group: The job's.
        item_bytes: Of a number.
        precision: `fp8` or `fp8-all` for linear layers in float8.
    """
    weights = weight_bytes(arch, item_bytes, precision)
    before = placements.of(group)
    if before.num_buffers is None:
        return Placements(
            groups={key: _streamed(weights, p) for key, p in placements.groups.items()},
            leanest=_streamed(weights, placements.leanest),
        )
    if before.num_buffers > RING:
        freed = before.num_buffers - max(before.num_buffers // 2, RING)

        def less(placement: Placement) -> Placement:
            assert placement.num_buffers is not None
            return _keeping(weights, placement, max(placement.num_buffers - freed, RING))

        return Placements(
            groups={key: less(p) for key, p in placements.groups.items()},
            leanest=less(placements.leanest),
        )
    if before.tokens_per_pass == 1:
        return None
    reason = "memory ran out: one job at a time"
    return placements.replacing(
        group, replace(before, mode="low", tokens_per_pass=1, reason=reason)
    )


def _streamed(weights: WeightBytes, placement: Placement) -> Placement:
    """Returns a placement of all weights without those that others can be streamed beside."""
    num_buffers = fast_buffers(weights, writes=True)
    held = weights.buffers(RING, num_buffers - RING)
    room = placement.host_budget_bytes
    blocks = weights.blocks if room is None else min(weights.blocks, room)
    return replace(
        placement,
        mode="fast",
        num_buffers=num_buffers,
        embed_on_device=False,
        park_caches=True,
        device_bytes=placement.device_bytes - weights.blocks - weights.embeddings + held,
        host_bytes=placement.host_bytes + weights.embeddings + blocks,
        reason=_reason(num_buffers),
    )


def keeping(
    arch: Architecture,
    placement: Placement,
    num_buffers: int,
    item_bytes: int,
    precision: str | None = None,
) -> Placement:
    """Returns a streamed placement with other buffers than it was to have.

    Args:
        arch: The network's shape.
        placement: Of a group.
        num_buffers: That memory was enough for.
        item_bytes: Of a number.
        precision: See `leaner`.
    """
    return _keeping(weight_bytes(arch, item_bytes, precision), placement, num_buffers)


def _keeping(weights: WeightBytes, placement: Placement, num_buffers: int) -> Placement:
    assert placement.num_buffers is not None
    all_stay = weights.layers_kept(num_buffers, RING) == weights.num_generation
    mode = "fast" if all_stay else "balanced"
    return replace(
        placement,
        mode=placement.mode if placement.mode == "low" else mode,
        num_buffers=num_buffers,
        device_bytes=placement.device_bytes
        - (placement.num_buffers - num_buffers) * weights.kept_block,
        reason=_reason(num_buffers),
    )


def _reason(num_buffers: int) -> str:
    return f"memory ran out: {num_buffers} blocks of weights stay on the device"
