"""What a run continues with where a placement turned out not to fit. Integers only, no torch."""

from __future__ import annotations

from dataclasses import replace

from sensebatch.jobs import GroupKey, VramMode
from sensebatch.plan.computation import Computation
from sensebatch.plan.device import fast_buffers
from sensebatch.plan.passes import RING
from sensebatch.plan.placement import Placement, Placements
from sensebatch.plan.weight_bytes import WeightBytes, weight_bytes


def leaner(computation: Computation, placements: Placements, group: GroupKey) -> Placements | None:
    """Returns what to continue with after a job alone did not fit; None if nothing can be given up.

    First fewer weights stay on the device, half of the buffers each time; then the group's jobs
    are drawn one by one. Other groups keep as many blocks less, since they lack that memory too.

    Args:
        computation: The network, and how it is computed.
        placements: Those of the run.
        group: The job's group.
    """
    weights = weight_bytes(computation)
    before = placements.of(group)
    if before.num_buffers is None:
        return replace(
            placements,
            groups={key: _streamed(weights, p) for key, p in placements.groups.items()},
            leanest=_streamed(weights, placements.leanest),
        )
    if before.num_buffers > RING:
        freed = before.num_buffers - max(before.num_buffers // 2, RING)

        def less(placement: Placement) -> Placement:
            assert placement.num_buffers is not None
            return _keeping(weights, placement, max(placement.num_buffers - freed, RING))

        return replace(
            placements,
            groups={key: less(p) for key, p in placements.groups.items()},
            leanest=less(placements.leanest),
        )
    if before.tokens_per_pass == 1:
        return None
    reason = "memory ran out: one job at a time"
    return placements.replacing(
        group, replace(before, mode=VramMode.LOW, tokens_per_pass=1, reason=reason)
    )


def keeping(computation: Computation, placement: Placement, num_buffers: int) -> Placement:
    """Returns a streamed placement with as many buffers as there was memory for.

    Args:
        computation: The network, and how it is computed.
        placement: The group's, which says how many there were to be.
        num_buffers: How many there are.
    """
    return _keeping(weight_bytes(computation), placement, num_buffers)


def _streamed(weights: WeightBytes, placement: Placement) -> Placement:
    """Returns a placement of all weights with only as many as others can be streamed beside."""
    num_buffers = fast_buffers(weights, writes=True)
    held = weights.buffers(RING, num_buffers - RING)
    room = placement.host_block_bytes
    blocks = weights.packed_blocks if room is None else min(weights.packed_blocks, room)
    return replace(
        placement,
        mode=VramMode.FAST,
        num_buffers=num_buffers,
        embed_on_device=False,
        park_caches=True,
        ahead_bytes=0,
        room_bytes=None,
        device_bytes=placement.device_bytes - weights.blocks - weights.embeddings + held,
        host_bytes=placement.host_bytes + weights.embeddings + blocks,
        reason=_reason(num_buffers),
    )


def _keeping(weights: WeightBytes, placement: Placement, num_buffers: int) -> Placement:
    assert placement.num_buffers is not None
    all_stay = weights.layers_kept(num_buffers, RING) == weights.num_generation
    mode = VramMode.FAST if all_stay else VramMode.BALANCED
    freed = (placement.num_buffers - num_buffers) * weights.kept_block
    return replace(
        placement,
        mode=placement.mode if placement.mode is VramMode.LOW else mode,
        num_buffers=num_buffers,
        text_batches=1,
        text_bytes=None,
        device_bytes=placement.device_bytes - freed,
        reason=_reason(num_buffers),
    )


def _reason(num_buffers: int) -> str:
    return f"memory ran out: {num_buffers} blocks of weights stay on the device"
