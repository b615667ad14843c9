"""What a run goes on with where a placement turned out not to fit. Integers only, no torch."""

from __future__ import annotations

from dataclasses import replace

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.vram import RING, Placement, fast_buffers
from sensebatch.weights import weight_bytes


def leaner(
    arch: Architecture, placement: Placement, item_bytes: int, precision: str | None = None
) -> Placement | None:
    """Returns what to go on with where a placement turned out not to fit; None if nothing is left.

    First fewer weights stay on the device, half of the buffers each time, then jobs are drawn one
    by one.
    """
    weights = weight_bytes(arch, item_bytes, precision)
    embeddings = weights.embeddings if placement.embed_on_device else 0
    if placement.num_buffers is None:
        num_buffers = fast_buffers(weights, writes=True)
        saved = weights.blocks - weights.buffers(RING, num_buffers - RING) + embeddings
        host = placement.host_bytes + weights.blocks + weights.embeddings
    elif placement.num_buffers > RING:
        num_buffers = max(placement.num_buffers // 2, RING)
        saved = weights.buffers(RING, placement.num_buffers - RING) - weights.buffers(
            RING, num_buffers - RING
        )
        host = placement.host_bytes
    elif placement.tokens_per_pass > 1:
        return replace(
            placement, mode="low", tokens_per_pass=1, reason="memory ran out: one job at a time"
        )
    else:
        return None
    return replace(
        placement,
        mode="fast" if num_buffers >= weights.buffers_for_pictures(RING) else "balanced",
        num_buffers=num_buffers,
        embed_on_device=False,
        park_caches=True,
        device_bytes=placement.device_bytes - saved,
        host_bytes=host,
        reason=f"memory ran out: {num_buffers} blocks of weights stay on the device",
    )


def at_most(placement: Placement, most: Placement) -> Placement:
    """Returns a placement that keeps no more weights on the device, and draws no more jobs
    together, than one of `leaner`.

    Args:
        placement: Of some group.
        most: What memory was enough for.
    """
    assert most.num_buffers is not None
    buffers, tokens = placement.num_buffers, placement.tokens_per_pass
    fewer = buffers is None or buffers > most.num_buffers
    if not fewer and tokens <= most.tokens_per_pass:
        return placement
    mode = most.mode if fewer or most.mode == "low" else placement.mode
    return replace(
        most,
        mode=mode,
        num_buffers=most.num_buffers if fewer else buffers,
        tokens_per_pass=min(tokens, most.tokens_per_pass),
        batch_size=placement.batch_size,
    )
