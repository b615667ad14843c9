"""Which placement of weights and caches fits a budget. Integers only, no torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.config import MemoryConfig
from sensebatch.errors import ConfigError
from sensebatch.plan.footprint import (
    Load,
    host_working_bytes,
    jobs_per_pass,
    working_bytes,
)
from sensebatch.plan.passes import ROWS
from sensebatch.plan.placement import Placement, Placements
from sensebatch.plan.weight_bytes import WeightBytes, weight_bytes
from sensebatch.units import GIB, MIB

RING = 2
"""Buffers that blocks pass through: one is computed with while the next is filled."""
NUM_STAGING = 2
"""Host buffers that blocks are read ahead into from the checkpoint's files."""
CUDA_TOKENS_PER_PASS = 8192
"""Image tokens in one denoising pass: enough to hide a layer's copy behind its computation."""
LOW_TOKENS_PER_PASS = ROWS
"""The same under `low`: what activations need memory for, however small a pass is."""
MODES = ("auto", "full", "fast", "balanced", "low")
HOST_SHARE = 0.7
"""Part of the free host memory that weights may take where no budget is given."""
HOST_MOST = 0.9
"""Part of it that a run may take altogether, if smaller batches can help."""
PROGRAM_BYTES = 1664 * MIB
"""Resident memory of a process that computes on a GPU, without weights and jobs."""
LOADING_BYTES = 1024 * MIB
"""The same while weights are loaded, before most libraries are."""


def place(
    arch: Architecture,
    memory: MemoryConfig,
    loads: Sequence[Load],
    *,
    item_bytes: int,
    device_free: int | None,
    host_free: int,
    precision: str | None = None,
    fused: bool = False,
) -> Placements:
    """Returns for each group the fastest placement that fits, or the one that was asked for.

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
    budget = memory.vram_budget_bytes
    weights = weight_bytes(arch, item_bytes, precision)
    host = _Host(
        weights=weights,
        working=partial(host_working_bytes, arch, item_bytes=item_bytes),
        free=host_free,
        budget=memory.host_budget_bytes,
        apart=device_free is not None or budget is not None,
    )
    planner = _Planner(
        weights=weights,
        working=partial(
            working_bytes, arch, item_bytes=item_bytes, precision=precision, fused=fused
        ),
        host=host,
        limit=device_free if budget is None else budget,
        asked=budget is not None,
    )
    wanted: Sequence[Load | None] = loads or [None]
    placed = host.settled(planner.run(memory.vram_mode, wanted), wanted)
    return Placements(
        groups={load.group: p for load, p in zip(loads, placed, strict=False)},
        leanest=min(placed, key=_how_much_stays),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planner:
    """Weighs the placements of groups against what a device has."""

    weights: WeightBytes
    working: Callable[..., int]
    """`working_bytes`, from the loads on."""
    host: _Host
    limit: int | None
    """Device memory; None for any amount."""
    asked: bool
    """Whether the limit is a budget that was asked for."""

    def run(self, mode: str, loads: Sequence[Load | None]) -> list[Placement]:
        """Returns the placement of each load; None stands for weights without jobs.

        Raises:
            ConfigError: One cannot fit.
        """
        if self.limit is not None:
            self._check(mode, loads, self.limit)
        if mode != "auto":
            reason = f"asked for vram_mode {mode}"
            return [replace(self._largest(load, mode), reason=reason) for load in loads]
        if self.limit is None:
            reason = "the host is the device"
            return [replace(self._candidate(load, "full"), reason=reason) for load in loads]
        whole = [self._whole(load) for load in loads]
        if all(self._fits(placement) for placement in whole):
            reason = f"all weights fit {self._what(self.limit)}"
            return [replace(placement, reason=reason) for placement in whole]
        return [self._streamed(load, self.limit) for load in loads]

    def _check(self, mode: str, loads: Sequence[Load | None], limit: int) -> None:
        asked = "low" if mode == "auto" else mode
        needed = [
            (self._candidate(load and replace(load, batch_size=1), asked).device_bytes, load)
            for load in loads
        ]
        least, load = max(needed, key=lambda need: need[0])
        if least > limit:
            what = "vram_budget" if self.asked else "free device memory"
            hint = "" if asked == "low" else "; vram_mode low needs less"
            raise ConfigError(
                f"{what}: expected at least {_least(least)} for {_name(load)}, found "
                f"{limit / GIB:.2f} GiB{hint}"
            )

    def _fits(self, placement: Placement, spare: int = 0) -> bool:
        return self.limit is None or placement.device_bytes + spare <= self.limit

    def _what(self, limit: int) -> str:
        return f"{'a budget of' if self.asked else 'free device memory of'} {limit / GIB:.1f} GiB"

    def _whole(self, load: Load | None) -> Placement:
        """Returns a group's placement with all weights, which may not fit.

        Its batch is no smaller than a pass; of texts, no less than half of those that could be
        decoded together.
        """
        least = 1
        if load is not None:
            half = -(-load.batch_size // 2)
            least = half if load.text_tokens else jobs_per_pass(load, CUDA_TOKENS_PER_PASS)
        return self._largest(load, "full", least)

    def _streamed(self, load: Load | None, limit: int) -> Placement:
        """Returns a group's placement under a limit: what its jobs leave over holds weights.

        Of a group that writes, the batch is so large that the weights for text stay, if that can
        be: a token would have to wait for the others. Else smaller batches come before the
        passes of `low`, as long as two jobs can share one.
        """
        lean = None
        if load is not None and load.text_tokens:
            spare = (fast_buffers(self.weights, writes=True) - RING) * self.weights.kept_block
            lean = self._largest(load, "balanced", spare=spare)
            lean = lean if self._fits(lean, spare) else None
        if lean is None:
            lean = self._largest(load, "balanced", least=2)
        if not self._fits(lean):
            lean = self._largest(load, "low")
        extra = (limit - lean.device_bytes) // self.weights.kept_block
        # Buffers for every block would hold no more than those for all but one.
        extra = min(extra, self.weights.num_generation + self.weights.num_understanding - RING - 1)
        kept = self.weights.layers_kept(RING + extra, RING)
        layers = self.weights.num_generation
        stays = "all" if kept == layers else f"{kept} of {layers}"
        return replace(
            lean,
            mode="fast" if kept == layers else lean.mode,
            num_buffers=RING + extra,
            device_bytes=lean.device_bytes + extra * self.weights.kept_block,
            reason=f"{self._what(limit)} holds {stays} generation layers, the others are streamed",
        )

    def _largest(
        self, load: Load | None, mode: str, least: int = 1, *, spare: int = 0
    ) -> Placement:
        """Returns a mode's placement for the largest batch that fits.

        Args:
            load: Of the group.
            mode: By name.
            least: Fewest jobs that are tried to fit the device, of more; they may not.
            spare: Bytes of the device that are to be left.
        """
        if load is None:
            return self._candidate(None, mode)
        sizes = _batch_sizes(load)
        for size in sizes:
            tried = replace(load, batch_size=size)
            placement = self._candidate(tried, mode)
            fits = self._fits(placement, spare) or size <= least
            if fits and self.host.holds(tried, placement):
                break
        placement = self._candidate(replace(load, batch_size=min(size, load.batch_size)), mode)
        return placement if size == sizes[0] else replace(placement, batch_size=size)

    def _candidate(self, load: Load | None, mode: str) -> Placement:
        """Returns what a mode means for a group."""
        weights = self.weights
        writes = load is not None and load.text_tokens > 0
        num_buffers = {"full": None, "fast": fast_buffers(weights, writes=writes)}.get(mode, RING)
        parked = num_buffers is not None
        tokens_per_pass = LOW_TOKENS_PER_PASS if mode == "low" else CUDA_TOKENS_PER_PASS
        if num_buffers is None:
            device = weights.blocks + weights.embeddings
        else:
            device = weights.buffers(RING, num_buffers - RING)
        loads = [] if load is None else [load]
        return Placement(
            mode=mode,
            num_buffers=num_buffers,
            embed_on_device=not parked,
            tokens_per_pass=tokens_per_pass,
            park_caches=parked,
            host_budget_bytes=None,
            device_bytes=device
            + weights.rest
            + self.working(loads, tokens_per_pass, parked=parked),
            host_bytes=0,
            reason="",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Host:
    """Shares host memory out between weights and jobs."""

    weights: WeightBytes
    working: Callable[..., int]
    """`host_working_bytes`, from the load on."""
    free: int
    budget: int | None
    """What was asked for, for the whole process."""
    apart: bool
    """Whether the device has memory of its own."""

    def holds(self, load: Load, placement: Placement) -> bool:
        """Returns whether a batch leaves weights the memory they need at least, or had better."""
        working = self._working(load, placement)
        if placement.num_buffers is None:
            capped = self.budget is not None and self.apart
            return not capped or PROGRAM_BYTES + working <= (self.budget or 0)
        if self.budget is not None:
            return PROGRAM_BYTES + working + self._least <= self.budget
        kept = min(self.weights.blocks + self.weights.embeddings, int(self.free * HOST_SHARE))
        return kept + working <= int(self.free * HOST_MOST)

    def settled(
        self, placements: Sequence[Placement], loads: Sequence[Load | None]
    ) -> list[Placement]:
        """Returns placements with what is left for weights, which is the same for all groups.

        Raises:
            ConfigError: The budget is too small.
        """
        working = [
            0 if load is None else self._working(placement.fitted(load), placement)
            for load, placement in zip(loads, placements, strict=True)
        ]
        whole = placements[0].num_buffers is None
        room = int(self.free * HOST_SHARE)
        if self.budget is not None:
            beside = PROGRAM_BYTES + max(working)
            room = self.budget - beside
            least = beside if whole else beside + self._least
            if self.budget < least and (self.apart or not whole):
                largest = loads[working.index(max(working))]
                raise ConfigError(
                    f"max_memory: expected cpu to be at least {_least(least)} for "
                    f"{_name(largest)}, found {self.budget / GIB:.2f} GiB"
                )
        # Embeddings are looked up in host memory, whatever is left for blocks.
        blocks = max(room - self.weights.embeddings, 0)
        kept = self.weights.blocks if self.weights.blocks <= blocks else max(blocks, self._staging)
        # With all weights on the device the program is largest while embeddings pass through.
        held = 0 if whole else self.weights.embeddings + kept
        loading = LOADING_BYTES + self.weights.embeddings
        return [
            replace(
                placement,
                # Also of weights that stay on the device until memory runs out there.
                host_budget_bytes=blocks,
                host_bytes=max(PROGRAM_BYTES + held + own, loading),
            )
            for placement, own in zip(placements, working, strict=True)
        ]

    @property
    def _staging(self) -> int:
        return NUM_STAGING * self.weights.block

    @property
    def _least(self) -> int:
        """Of weights that are streamed."""
        return self.weights.embeddings + self._staging

    def _working(self, load: Load, placement: Placement) -> int:
        return self.working(load, placement.tokens_per_pass, parked=placement.park_caches)


def _batch_sizes(load: Load) -> list[int]:
    """Returns the sizes to try: as many jobs as are wanted, half of them, and so on to one.

    Sizes come as wanted whatever is left to be run, so that a run that goes on cuts its batches
    as before; only those are left out of which the next would hold all there are.
    """
    sizes = [load.wanted_jobs or load.batch_size]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    while len(sizes) > 1 and sizes[1] >= load.batch_size:
        sizes.pop(0)
    return sizes


def _least(num_bytes: int) -> str:
    """Returns an amount that is enough if it is typed."""
    return f"{math.ceil(num_bytes / GIB * 100) / 100:.2f} GiB"


def _name(load: Load | None) -> str:
    """Returns what people call a group."""
    if load is None:
        return "the weights"
    thinks = " with thinking" if load.group.think else ""
    return f"{load.group.task.value} {load.group.resolution}{thinks}"


def _how_much_stays(placement: Placement) -> tuple[int, int]:
    """Orders placements by the weights that stay on the device, then by what jobs leave."""
    buffers = placement.num_buffers
    return sys.maxsize if buffers is None else buffers, -placement.device_bytes


def fast_buffers(weights: WeightBytes, *, writes: bool) -> int:
    """Returns how many buffers spare denoising all copies, and decoding too where there is any."""
    pictures = weights.buffers_for_pictures(RING)
    return max(pictures, weights.buffers_for_text(RING)) if writes else pictures
