"""What a run takes of host memory, and how weights and jobs share it. Integers only, no torch.

A run's workers on one host share the weights that are streamed from it; everything else each of
them has for itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from sensebatch.plan.computation import Computation
from sensebatch.plan.footprint import cache_bytes
from sensebatch.plan.load import Load
from sensebatch.plan.passes import NUM_STAGING, PAGE_BYTES, prefixes_wait
from sensebatch.plan.weight_bytes import WeightBytes
from sensebatch.resolutions import TOKEN_NUMBERS
from sensebatch.units import MIB

ENOUGH_BYTES = 1 << 50
"""Host memory to plan with where that of this machine does not matter."""
WEIGHT_SHARE = 0.7
"""The part of free host memory that weights may take where no budget is given."""
RUN_SHARE = 0.9
"""The part of it that a run may take altogether, if smaller batches can help."""
PROGRAM_BYTES = 1664 * MIB
"""Resident memory of a process that computes on a GPU, without weights and jobs."""
LOADING_BYTES = 1088 * MIB
"""The same while weights are loaded, before most libraries are; after kernels were compiled."""


def host_working_bytes(
    computation: Computation,
    load: Load,
    tokens_per_pass: int,
    *,
    parked: bool,
    text_batches: int = 1,
    text_waits: bool = False,
) -> int:
    """Returns what a group's batch takes of host memory besides weights and the program.

    These are what was prepared of it, prefixes that wait, images that are kept until their file is
    written (of two passes of single images; of interleave jobs one of each, which are written with
    a copy of all of them twice), and pixels on their way to the disk.

    Args:
        computation: The network, and how it is computed.
        load: The group's.
        tokens_per_pass: Most image tokens of a denoising pass.
        parked: Whether prefixes wait where they are not needed together.
        text_batches: Batches whose texts are written together; all of them are prepared.
        text_waits: Whether whatever was written waits until it is needed.
    """
    jobs = load.jobs_per_pass(tokens_per_pass)
    image = TOKEN_NUMBERS * load.image_tokens
    kept = 4 * image * (3 * load.batch_size if load.drawn_tokens else 2 * jobs)
    drawn = image + TOKEN_NUMBERS * load.drawn_tokens
    images = prepared_bytes(load) + load.batch_size * 2 * drawn + kept
    images += (text_batches - 1) * prepared_bytes(load)
    if text_waits:
        # The last page of each is half full on average.
        images += text_batches * load.batch_size * PAGE_BYTES // 2
    if not text_waits and (not parked or not prefixes_wait(load.batch_size, jobs)):
        return images
    return images + text_batches * cache_bytes(computation, load.prefix_tokens * load.batch_size)


def prepared_bytes(load: Load) -> int:
    """Returns the bytes of a batch's noise and input images, which are made one batch ahead."""
    return load.batch_size * 4 * TOKEN_NUMBERS * (load.image_tokens + load.prompt_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """Shares host memory out between weights and jobs."""

    weights: WeightBytes
    free_bytes: int
    process_bytes: int | None
    """The user's budget for all processes of the run on this host; None where none was given."""
    is_apart: bool
    """Whether the device has memory of its own."""
    num_workers: int = 1
    """How many processes there are."""

    def holds(self, working: int, *, streams: bool) -> bool:
        """Returns whether a batch leaves weights the memory they need, or had better have.

        Args:
            working: `host_working_bytes` of the batch, and `prepared_bytes` of the next.
            streams: Whether blocks come from host memory rather than stay on the device.
        """
        if not streams and (self.process_bytes is None or not self.is_apart):
            return True
        if self.process_bytes is not None:
            return self.least_bytes(working, streams=streams) <= self.process_bytes
        weights = min(self._blocks + self.weights.embeddings, self._free_for_weights)
        return weights + self.num_workers * working <= self._free_for_run

    def least_bytes(self, working: int, *, streams: bool) -> int:
        """Returns the smallest budget that would do."""
        if streams:
            return self._besides(working) + self._least_weights
        return max(self._besides(working), self._passing_through)

    def block_bytes(self, working: int) -> int:
        """Returns what is left for blocks beside the run's most demanding batch."""
        left = min(self._free_for_weights, self._free_for_run - self.num_workers * working)
        if self.process_bytes is not None:
            left = self.process_bytes - self._besides(working)
            if self.process_bytes < self._loading + self.weights.embeddings + self._blocks:
                # With one block less, staging buffers take the place of what blocks are packed in.
                left = min(left, self._blocks + self.weights.embeddings - 1)
        # Embeddings are looked up in host memory, whatever is left for blocks.
        left -= self.weights.embeddings
        if left < self._blocks:
            # Each process takes its own staging buffers out of this, but not those of the others.
            left -= (self.num_workers - 1) * self._staging
        return max(left, 0)

    def peak_bytes(self, working: int, blocks: int, *, streams: bool) -> int:
        """Returns the expected peak of all processes together.

        Args:
            working: See `holds`.
            blocks: What `block_bytes` returns.
            streams: See `holds`.
        """
        if not streams:
            return max(self._besides(working), self._passing_through)
        kept = self._blocks
        if kept <= blocks:
            besides = max(self._besides(working), self._loading)
        else:
            others = (self.num_workers - 1) * self._staging
            kept = max(blocks, self._staging) + others
            besides = self._besides(working)
        return besides + self.weights.embeddings + kept

    def _besides(self, working: int) -> int:
        """Returns what the processes take besides weights."""
        return self.num_workers * (PROGRAM_BYTES + working)

    @property
    def _loading(self) -> int:
        """What the processes take besides weights while all blocks are read, and packed."""
        packing = self.weights.packing if self.num_workers == 1 else 0
        return self.num_workers * LOADING_BYTES + packing

    @property
    def _passing_through(self) -> int:
        """What they take while weights go to the device for good: embeddings, or then blocks."""
        passing = max(self.weights.embeddings, self._staging)
        return self.num_workers * (LOADING_BYTES + passing)

    @property
    def _blocks(self) -> int:
        """All blocks, as they are kept; those that processes share are not packed."""
        return self.weights.packed_blocks if self.num_workers == 1 else self.weights.blocks

    @property
    def _free_for_weights(self) -> int:
        return int(self.free_bytes * WEIGHT_SHARE)

    @property
    def _free_for_run(self) -> int:
        return int(self.free_bytes * RUN_SHARE)

    @property
    def _staging(self) -> int:
        return NUM_STAGING * self.weights.block

    @property
    def _least_weights(self) -> int:
        """Weights that are streamed take at least this much."""
        return self.weights.embeddings + self.num_workers * self._staging
