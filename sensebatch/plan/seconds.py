"""How long groups of jobs take at least, pass by pass, with a placement on a machine. No torch.

Follows the engine: which passes a batch makes, and which blocks they find on the device. A block
that is streamed is copied beside the computation, so a pass takes the longer of the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.plan.device import RING
from sensebatch.plan.footprint import Load, jobs_per_pass
from sensebatch.plan.passes import MAX_PREFILL_TOKENS
from sensebatch.plan.placement import Placement
from sensebatch.plan.weight_bytes import weight_bytes
from sensebatch.plan.work import (
    Sizes,
    Speeds,
    Work,
    denoising_work,
    network_sizes,
    understanding_work,
)

UNDERSTANDING, GENERATION = "understanding", "generation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """What the passes of a phase go through."""

    expert: str
    count: int
    num_bytes: int
    """Of all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """The blocks of each kind of pass."""

    prompts: Blocks
    text: Blocks
    """With the vocabulary head."""
    pictures: Blocks


def pass_orders(arch: Architecture, sizes: Sizes, item_bytes: int) -> Orders:
    """Returns what passes of a network go through."""
    weights = weight_bytes(arch, item_bytes)
    return Orders(
        prompts=Blocks(
            expert=UNDERSTANDING,
            count=arch.num_layers,
            num_bytes=sizes.understanding * item_bytes,
        ),
        text=Blocks(
            expert=UNDERSTANDING,
            count=weights.num_understanding,
            num_bytes=(sizes.understanding + sizes.head) * item_bytes,
        ),
        pictures=Blocks(
            expert=GENERATION,
            count=weights.num_generation,
            num_bytes=sizes.generation * item_bytes,
        ),
    )


class Passes:
    """Sums the seconds of passes, following which blocks are on the device when.

    Args:
        orders: What they go through.
        num_buffers: Of `Placement`: device buffers of one block, None where each has its own.
        speeds: Of the machine.
    """

    def __init__(self, orders: Orders, num_buffers: int | None, speeds: Speeds) -> None:
        whole = orders.text.count + orders.pictures.count
        enough = num_buffers is None or num_buffers >= whole
        self._num_buffers = None if enough else num_buffers
        self._speeds = speeds
        self._kept = {UNDERSTANDING: 0, GENERATION: 0}
        self.seconds = 0.0
        self.copied_bytes = 0.0

    def add(self, blocks: Blocks, work: Work, num_passes: int = 1, *, keep: bool) -> None:
        """Counts passes of one kind.

        Args:
            blocks: What each goes through.
            work: Of one pass.
            num_passes: How many.
            keep: Whether blocks stay as far as there is room for them; the first pass then
                brings those as well. Otherwise what the other expert keeps stays.
        """
        computed = work.seconds(self._speeds)
        for count in (min(num_passes, 1), max(num_passes - 1, 0)):
            copied = self._missing_bytes(blocks)
            if count and keep:
                self._keep(blocks)
            self.copied_bytes += count * copied
            self.seconds += count * max(computed, copied / self._speeds.copy_bytes_per_s)

    def _missing_bytes(self, blocks: Blocks) -> float:
        """Returns what a pass has copied to the device."""
        if self._num_buffers is None:
            return 0.0
        kept = min(self._kept[blocks.expert], blocks.count)
        return (1 - kept / blocks.count) * blocks.num_bytes

    def _keep(self, blocks: Blocks) -> None:
        """Gives blocks the room there is, and the other expert what is left of it."""
        if self._num_buffers is None:
            return
        fits = blocks.count <= self._num_buffers
        room = self._num_buffers if fits else self._num_buffers - RING
        kept = min(blocks.count, room)
        other = GENERATION if blocks.expert == UNDERSTANDING else UNDERSTANDING
        self._kept = {blocks.expert: kept, other: min(self._kept[other], room - kept)}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSeconds:
    """The least time of a group's jobs."""

    pictures: float
    """Of prompts and pictures, without any text that the model writes."""
    text: float
    """What comes on top if every job writes as much text as it may."""


class Clock:
    """Tells how long jobs take at least with one placement on one machine.

    Args:
        arch: The network's shape.
        placement: Where its weights are.
        item_bytes: Of a number.
        speeds: Of the machine.
    """

    def __init__(
        self, arch: Architecture, placement: Placement, item_bytes: int, speeds: Speeds
    ) -> None:
        self._arch = arch
        self._placement = placement
        self._item_bytes = item_bytes
        self._speeds = speeds
        self._sizes = network_sizes(arch)
        self._orders = pass_orders(arch, self._sizes, item_bytes)

    def group_seconds(self, load: Load, num_jobs: int) -> GroupSeconds:
        """Returns the least time of a group; bringing the first weights is not counted.

        Args:
            load: The group's most demanding job, which all others count as.
            num_jobs: Of the group, cut into batches of `load.batch_size`, or of as many as fit.
        """
        load = self._placement.fitted(load)
        silent = self._seconds(load, num_jobs, text_tokens=0)
        talking = self._seconds(load, num_jobs, text_tokens=load.text_tokens)
        return GroupSeconds(pictures=silent, text=max(talking - silent, 0.0))

    def _seconds(self, load: Load, num_jobs: int, text_tokens: int) -> float:
        passes = Passes(self._orders, self._placement.num_buffers, self._speeds)
        # This one finds the device empty; those that count find what one before them left.
        self._add_batch(passes, load, load.batch_size, text_tokens)
        seconds = 0.0
        for jobs, num_batches in _parts(num_jobs, load.batch_size):
            passes.seconds = 0.0
            self._add_batch(passes, load, jobs, text_tokens)
            seconds += num_batches * passes.seconds
        return seconds

    def _add_batch(self, passes: Passes, load: Load, jobs: int, text_tokens: int) -> None:
        tokens = load.group.resolution.image_tokens
        growing = jobs * sum(branch != "uncond" for branch in load.group.branches)
        writes, reads_back = load.text_tokens > 0, load.drawn_tokens > 0
        num_pictures = load.drawn_tokens // (tokens + 2) + 1
        # The system turn is there: only the first batch of a run computes it.
        known = load.system_tokens
        new = load.prompt_tokens - known
        self._add_prompts(passes, new, known, growing, logits=jobs * writes)
        prefix = load.prompt_tokens
        for picture in range(num_pictures):
            written = (text_tokens + picture) // num_pictures
            self._add_text(passes, jobs, prefix, written)
            prefix += written
            if reads_back:
                # The token that begins a picture is a pass of its own.
                self._add_prompts(passes, 1, prefix, growing, logits=0)
                prefix += 1
            self._add_pictures(passes, load, jobs, prefix)
            if picture + 1 < num_pictures:
                self._add_prompts(passes, tokens + 1, prefix, growing, logits=jobs)
                prefix += tokens + 1

    def _add_prompts(
        self, passes: Passes, new: int, cached: int, sequences: int, *, logits: int
    ) -> None:
        """Counts passes over prompts, so many together as one holds.

        Args:
            passes: What is added to.
            new: Tokens of each sequence.
            cached: Tokens before them.
            sequences: How many.
            logits: Sequences that a token is chosen for, behind the last pass.
        """
        together = max(MAX_PREFILL_TOKENS // max(new, 1), 1)
        blocks = self._orders.text if logits else self._orders.prompts
        for start in range(0, sequences, together):
            last = start + together >= sequences
            work = understanding_work(
                self._arch,
                self._sizes,
                [(new, cached)] * min(together, sequences - start),
                self._item_bytes,
                logits=logits if last else 0,
            )
            passes.add(blocks if last else self._orders.prompts, work, keep=False)

    def _add_text(self, passes: Passes, jobs: int, cached: int, written: int) -> None:
        # Sequences grow evenly, so that all passes together take as long as so many middle ones.
        spans = [(1, cached + written // 2)] * jobs
        work = understanding_work(self._arch, self._sizes, spans, self._item_bytes, logits=jobs)
        passes.add(self._orders.text, work, written, keep=True)

    def _add_pictures(self, passes: Passes, load: Load, jobs: int, prefix: int) -> None:
        group = load.group
        prefixes = [0 if branch == "uncond" else prefix for branch in group.branches]
        tokens = group.resolution.image_tokens
        for count, num_passes in _parts(jobs, jobs_per_pass(load, self._placement.tokens_per_pass)):
            work = denoising_work(
                self._arch, self._sizes, tokens, count, prefixes * count, self._item_bytes
            )
            passes.add(self._orders.pictures, work, num_passes * group.num_steps, keep=True)


def _parts(total: int, most: int) -> Iterator[tuple[int, int]]:
    """Yields (size, how often) of the parts that a number is cut into."""
    often, rest = divmod(total, most)
    if often:
        yield most, often
    if rest:
        yield rest, 1
