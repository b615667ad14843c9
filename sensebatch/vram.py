"""Which placement of weights and caches fits a budget. Integers only, no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.config import MemoryConfig
from sensebatch.errors import ConfigError
from sensebatch.footprint import GIB, Load, working_bytes
from sensebatch.weights import WeightBytes, weight_bytes

RING = 2
"""Buffers that blocks pass through: one is computed with while the next is filled."""
NUM_STAGING = 2
"""Host buffers that blocks are read ahead into from the checkpoint's files."""
CUDA_TOKENS_PER_PASS = 8192
"""Image tokens in one denoising pass: enough to hide a layer's copy behind its computation."""
MODES = ("auto", "full", "fast", "balanced", "low")
HOST_SHARE = 0.7
"""Part of the free host memory that weights may take where no budget is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where weights and caches are, and how many jobs share a pass."""

    mode: str
    num_buffers: int | None
    """Device buffers: a ring for blocks of any kind, the others as large as a generation layer;
    None gives every block its own."""
    embed_on_device: bool
    tokens_per_pass: int
    """Most image tokens in one denoising pass; one job always fits."""
    park_caches: bool
    """Whether prefixes of waiting jobs are kept in host memory."""
    host_budget_bytes: int | None
    """Host memory for weights; None for as much as they need."""
    device_bytes: int
    """Expected peak on the device."""
    host_bytes: int
    """Host memory that weights are expected to take."""
    reason: str
    """Why this one, for the person who reads it."""


def place(
    arch: Architecture,
    memory: MemoryConfig,
    loads: list[Load],
    *,
    item_bytes: int,
    device_free: int | None,
    host_free: int,
    precision: str | None = None,
    fused: bool = False,
) -> Placement:
    """Returns the fastest placement that fits, or the one that was asked for.

    Args:
        arch: The network's shape.
        memory: Mode and budgets.
        loads: Of every group of the run.
        item_bytes: Of a number.
        device_free: Bytes the device has free; None where the host is the device.
        host_free: Bytes the host has free.
        precision: `fp8` or `fp8-all` for linear layers in float8.
        fused: Whether chains of small operations are kernels.

    Raises:
        ConfigError: It cannot fit; the message says the smallest budget that would.
    """
    if memory.vram_mode not in MODES:
        raise ConfigError(f"vram_mode: expected {', '.join(MODES)}, found {memory.vram_mode!r}")
    host = memory.host_budget_bytes
    host = int(host_free * HOST_SHARE) if host is None else host
    weights = weight_bytes(arch, item_bytes, precision)
    working = partial(
        working_bytes, arch, loads, item_bytes=item_bytes, precision=precision, fused=fused
    )
    writes = any(load.text_tokens for load in loads)
    candidates = _candidates(weights, working, host, _fast_buffers(weights, writes=writes))
    budget = memory.vram_budget_bytes
    if memory.vram_mode != "auto":
        chosen = candidates[memory.vram_mode]
        reason = f"asked for vram_mode {memory.vram_mode}"
        limit = budget if budget is not None else device_free
        if limit is not None and chosen.device_bytes > limit:
            raise _too_small(candidates, memory.vram_mode, limit)
        return replace(chosen, reason=reason)
    limit = budget if budget is not None else device_free
    if limit is None:
        return replace(candidates["full"], reason="the host is the device")
    return _within(weights, candidates, limit, asked=budget is not None)


def _fast_buffers(weights: WeightBytes, *, writes: bool) -> int:
    """Returns how many buffers spare denoising all copies, and decoding too where there is any."""
    pictures = weights.buffers_for_pictures(RING)
    return max(pictures, weights.buffers_for_text(RING)) if writes else pictures


def _candidates(
    weights: WeightBytes, working: Callable[..., int], host: int, fast_buffers: int
) -> dict[str, Placement]:
    most = CUDA_TOKENS_PER_PASS
    shapes = {
        "full": (None, True, most),
        "fast": (fast_buffers, False, most),
        "balanced": (RING, False, most),
        "low": (RING, False, 1),
    }
    return {
        mode: _placement(weights, working, mode, buffers, embed, tokens, host)
        for mode, (buffers, embed, tokens) in shapes.items()
    }


def _placement(
    weights: WeightBytes,
    working: Callable[..., int],
    mode: str,
    num_buffers: int | None,
    embed: bool,
    tokens_per_pass: int,
    host: int,
) -> Placement:
    blocks = weights.blocks if num_buffers is None else weights.buffers(RING, num_buffers - RING)
    device = blocks + weights.rest + (weights.embeddings if embed else 0)
    parked = num_buffers is not None
    staging = NUM_STAGING * weights.block
    if not embed:
        # They are looked up in host memory, whatever is left for blocks.
        host = max(host - weights.embeddings, 0)
    kept = weights.blocks if weights.blocks <= host else max(host - staging, 0) + staging
    return Placement(
        mode=mode,
        num_buffers=num_buffers,
        embed_on_device=embed,
        tokens_per_pass=tokens_per_pass,
        park_caches=parked,
        host_budget_bytes=host,
        device_bytes=device + working(tokens_per_pass, parked=parked),
        host_bytes=0 if num_buffers is None else kept + (0 if embed else weights.embeddings),
        reason="",
    )


def _within(
    weights: WeightBytes,
    candidates: dict[str, Placement],
    limit: int,
    *,
    asked: bool,
) -> Placement:
    """Returns the fastest placement under a limit: what is left over holds weights."""
    what = f"{'a budget of' if asked else 'free device memory of'} {limit / GIB:.1f} GiB"
    if candidates["full"].device_bytes <= limit:
        return replace(candidates["full"], reason=f"all weights fit {what}")
    for base in ("balanced", "low"):
        lean = candidates[base]
        if lean.device_bytes > limit:
            continue
        extra = (limit - lean.device_bytes) // weights.kept_block
        num_buffers = RING + extra
        kept = min(extra, weights.num_generation)
        return replace(
            lean,
            mode="fast" if kept == weights.num_generation else base,
            num_buffers=num_buffers,
            device_bytes=lean.device_bytes + extra * weights.kept_block,
            reason=f"{what} holds {kept} of {weights.num_generation} generation layers; "
            "the others are streamed",
        )
    raise _too_small(candidates, "auto", limit)


def _too_small(candidates: dict[str, Placement], mode: str, limit: int) -> ConfigError:
    asked = candidates["low" if mode == "auto" else mode]
    hint = f"; vram_mode low needs {candidates['low'].device_bytes / GIB:.1f} GiB"
    hint = "" if mode in ("auto", "low") else hint
    return ConfigError(
        f"vram_budget: expected at least {asked.device_bytes / GIB:.1f} GiB for the largest jobs "
        f"of this run, found {limit / GIB:.1f} GiB{hint}"
    )


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
        num_buffers = _fast_buffers(weights, writes=True)
        saved = weights.blocks - weights.buffers(RING, num_buffers - RING) + embeddings
        host = weights.blocks + weights.embeddings
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
