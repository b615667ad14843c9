"""How long groups of jobs take at least, pass by pass, with a placement on a machine. No torch.

Follows the engine: which passes a batch makes, and which blocks they find on the device. A block
that is streamed is copied beside the computation, so a pass takes the longer of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from sensebatch.checkpoint.tensors import TensorGroup
from sensebatch.jobs import Drawing
from sensebatch.plan.computation import Computation
from sensebatch.plan.footprint import cache_bytes
from sensebatch.plan.load import Load
from sensebatch.plan.passes import LONG_RUN, MAX_PREFILL_TOKENS, RING, middle_layers
from sensebatch.plan.placement import Placement
from sensebatch.plan.weight_bytes import in_host, weight_bytes
from sensebatch.plan.work import (
    MEASURED_ITEM_BYTES,
    Speeds,
    denoising_work,
    network_sizes,
    understanding_work,
)
from sensebatch.tasks import Branch


class Expert(StrEnum):
    """One of the network's two experts, as the owner of blocks."""

    UNDERSTANDING = "understanding"
    GENERATION = "generation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The blocks that the passes of a phase go through."""

    expert: Expert
    count: int
    num_bytes: int
    """All of them together, on the device."""
    copied_bytes: int
    """The same on the way to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """The blocks of each kind of pass."""

    prompts: Blocks
    text: Blocks
    """With the vocabulary head."""
    images: Blocks


def pass_orders(computation: Computation) -> Orders:
    """Returns what the passes of a network go through."""
    arch, weights = computation.arch, weight_bytes(computation)
    head = arch.vocab_size * arch.hidden_size * computation.item_bytes
    text, images = weights.understanding_layers, weights.generation_layers
    copied = in_host(computation, TensorGroup.UNDERSTANDING, text)
    return Orders(
        prompts=Blocks(
            expert=Expert.UNDERSTANDING,
            count=arch.num_layers,
            num_bytes=text,
            copied_bytes=copied,
        ),
        text=Blocks(
            expert=Expert.UNDERSTANDING,
            count=weights.num_understanding,
            num_bytes=text + head,
            copied_bytes=copied + in_host(computation, None, head),
        ),
        images=Blocks(
            expert=Expert.GENERATION,
            count=weights.num_generation,
            num_bytes=images,
            copied_bytes=in_host(computation, TensorGroup.GENERATION, images),
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Passes of one kind, one after the other."""

    blocks: Blocks
    """What each goes through."""
    seconds: float
    """Least time of computing one of them."""
    count: int = 1
    keeps: bool
    """Whether blocks stay as far as there is room for them; the first pass then brings those as
    well. Otherwise what the other expert keeps stays."""


class Passes:
    """Sums the seconds of passes, and follows which blocks are on the device when.

    Args:
        orders: What they go through.
        num_buffers: See `Placement`.
        copy_bytes_per_s: See `Speeds`.
    """

    def __init__(self, orders: Orders, num_buffers: int | None, copy_bytes_per_s: float) -> None:
        whole = orders.text.count + orders.images.count
        enough = num_buffers is None or num_buffers >= whole
        self._num_buffers = None if enough else num_buffers
        self._copy_bytes_per_s = copy_bytes_per_s
        self._kept = {Expert.UNDERSTANDING: 0, Expert.GENERATION: 0}
        self.seconds = 0.0
        self.copied_bytes = 0.0

    def add(self, passes: Pass) -> None:
        """Counts passes of one kind."""
        if self._num_buffers is None:
            self.seconds += passes.count * passes.seconds
            return
        self._count(passes, min(passes.count, 1))
        self.follow(passes)
        self._count(passes, max(passes.count - 1, 0))

    def follow(self, passes: Pass) -> None:
        """Leaves blocks on the device as passes do, and counts nothing."""
        if self._num_buffers is not None and passes.keeps and passes.count:
            self._keep(passes.blocks, self._num_buffers)

    def _count(self, passes: Pass, count: int) -> None:
        """Counts passes that find the same blocks on the device; the others are copied to it."""
        blocks = passes.blocks
        kept = min(self._kept[blocks.expert], blocks.count)
        copied = (1 - kept / blocks.count) * blocks.copied_bytes
        self.copied_bytes += count * copied
        self.seconds += count * max(passes.seconds, copied / self._copy_bytes_per_s)

    def _keep(self, blocks: Blocks, num_buffers: int) -> None:
        """Gives blocks the room there is, and the other expert what is left of it."""
        room = num_buffers if blocks.count <= num_buffers else num_buffers - RING
        kept = min(blocks.count, room)
        for expert, before in self._kept.items():
            self._kept[expert] = kept if expert is blocks.expert else min(before, room - kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSeconds:
    """The least time of a group's jobs."""

    images: float
    """Prompts and images, without any text that the model writes."""
    text: float
    """What comes on top if every job writes as much text as it may."""


class Clock:
    """Says how long jobs take at least on one machine.

    Args:
        computation: The network, and how it is computed.
        speeds: What the machine reaches at most.
        attention: Returns what the run's attention backend reaches for an image of so many tokens;
            None where that was not measured.
    """

    def __init__(
        self,
        computation: Computation,
        speeds: Speeds,
        attention: Callable[[int], float | None] = lambda _: None,
    ) -> None:
        self._computation = computation
        self._speeds = speeds
        self._attention = attention
        self._sizes = network_sizes(computation.arch)
        self._orders = pass_orders(computation)

    def group_seconds(self, load: Load, num_jobs: int, placement: Placement) -> GroupSeconds:
        """Returns the least time of a group; bringing the first weights is not counted.

        Args:
            load: The group's most demanding job, which all others count as.
            num_jobs: Jobs of the group, cut into batches of `load.batch_size`, or as many as fit.
            placement: Where weights and caches are.
        """
        load = placement.fitted(load)
        silent = self._seconds(load, num_jobs, placement, text_tokens=0)
        if not load.text_tokens:
            return GroupSeconds(images=silent, text=0.0)
        talking = self._seconds(load, num_jobs, placement, text_tokens=load.text_tokens)
        return GroupSeconds(images=silent, text=max(talking - silent, 0.0))

    def _seconds(
        self, load: Load, num_jobs: int, placement: Placement, *, text_tokens: int
    ) -> float:
        if text_tokens and placement.text_bytes is not None:
            silent = self._seconds(load, num_jobs, placement, text_tokens=0)
            return silent + self._together(load, num_jobs, placement)
        passes = Passes(self._orders, placement.num_buffers, self._speeds.copy_bytes_per_s)
        tokens = placement.tokens_per_pass
        batch = list(self._batch(load, load.batch_size, tokens, text_tokens))
        # The first batch finds the device empty; those that count find what one before them left.
        for one in batch:
            passes.follow(one)
        seconds = 0.0
        for jobs, num_batches in _parts(num_jobs, load.batch_size):
            passes.seconds = 0.0
            is_full = jobs == load.batch_size
            for one in batch if is_full else self._batch(load, jobs, tokens, text_tokens):
                passes.add(one)
            seconds += num_batches * passes.seconds
        return seconds

    def _together(self, load: Load, num_jobs: int, placement: Placement) -> float:
        """Returns the least time of texts that several batches write together before they draw.

        Their caches grow evenly, and so do the weights beside them that are copied at every token.
        """
        assert placement.text_bytes is not None
        total = 0.0
        for jobs, often in _parts(num_jobs, placement.text_batches * load.batch_size):
            cached = load.prompt_tokens + load.text_tokens // 2
            spans = [(1, cached)] * min(jobs, load.batch_size)
            work = understanding_work(self._computation, self._sizes, spans, logits=len(spans))
            # Those for whose caches there is no room wait for the others.
            fitting = placement.text_bytes // cache_bytes(self._computation, cached)
            decoded = min(jobs, max(fitting, min(jobs, load.batch_size)))
            computed = -(-decoded // load.batch_size) * work.seconds(self._speeds)
            room = placement.text_bytes - cache_bytes(self._computation, decoded * cached)
            text = self._orders.text
            copied = max(1 - max(room, 0) / text.num_bytes, 0) * text.copied_bytes
            step = max(computed, copied / self._speeds.copy_bytes_per_s)
            total += often * load.text_tokens * step * jobs / decoded
        return total

    def _batch(
        self, load: Load, jobs: int, tokens_per_pass: int, text_tokens: int
    ) -> Iterator[Pass]:
        """Yields the passes of a batch."""
        tokens, growing = load.image_tokens, jobs * load.num_growing
        writes, reads_back = load.text_tokens > 0, load.drawn_tokens > 0
        num_images = load.drawn_tokens // (tokens + 2) + 1
        # The system turn is there: only the first batch of a run computes it.
        known = load.system_tokens
        new = load.prompt_tokens - known
        yield from self._prompts(new, known, growing, logits=jobs * writes)
        prefix = load.prompt_tokens
        for image in range(num_images):
            written = (text_tokens + image) // num_images
            if written:
                yield self._text(jobs, prefix, written)
                prefix += written
            if reads_back:
                # The token that begins an image is a pass of its own.
                yield from self._prompts(1, prefix, growing, logits=0)
                prefix += 1
            yield from self._images(load, jobs, tokens_per_pass, prefix)
            if image + 1 < num_images:
                yield from self._prompts(tokens + 1, prefix, growing, logits=jobs)
                prefix += tokens + 1

    def _prompts(self, new: int, cached: int, sequences: int, *, logits: int) -> Iterator[Pass]:
        """Yields passes over prompts, each with as many as it holds.

        Args:
            new: New tokens of each sequence.
            cached: Tokens before them.
            sequences: How many.
            logits: Sequences that a token is chosen for after the last pass.
        """
        together = max(MAX_PREFILL_TOKENS // max(new, 1), 1)
        for start in range(0, sequences, together):
            is_last = start + together >= sequences
            work = understanding_work(
                self._computation,
                self._sizes,
                [(new, cached)] * min(together, sequences - start),
                logits=logits if is_last else 0,
            )
            blocks = self._orders.text if logits and is_last else self._orders.prompts
            yield Pass(blocks=blocks, seconds=work.seconds(self._speeds), keeps=False)

    def _text(self, jobs: int, cached: int, written: int) -> Pass:
        # Sequences grow evenly, so all passes together take as long as so many middle ones.
        spans = [(1, cached + written // 2)] * jobs
        work = understanding_work(self._computation, self._sizes, spans, logits=jobs)
        seconds = work.seconds(self._speeds)
        return Pass(blocks=self._orders.text, seconds=seconds, count=written, keeps=True)

    def _images(self, load: Load, jobs: int, tokens_per_pass: int, prefix: int) -> Iterator[Pass]:
        drawing = load.group.drawing
        if drawing is None:
            return
        prefixes = [0 if branch is Branch.UNCOND else prefix for branch in drawing.branches]
        speeds, reached = self._speeds, self._attention(load.image_tokens)
        if reached is not None and load.image_tokens >= LONG_RUN:
            speeds = replace(speeds, attention_flop_per_s=reached)
        for count, num_passes in _parts(jobs, load.jobs_per_pass(tokens_per_pass)):
            for seen, share, steps in _steps(self._computation, drawing, prefixes, prefix):
                work = denoising_work(
                    self._computation,
                    self._sizes,
                    tokens=load.image_tokens,
                    images=count,
                    prefixes=seen * count,
                    share=share,
                )
                blocks = self._orders.images
                yield Pass(
                    blocks=replace(blocks, copied_bytes=round(share * blocks.copied_bytes)),
                    seconds=work.seconds(speeds),
                    count=num_passes * steps,
                    keeps=share == 1,
                )


def _steps(
    computation: Computation, drawing: Drawing, guided: list[int], prefix: int
) -> Iterator[tuple[list[int], float, int]]:
    """Yields (prefixes seen, share of the layers, steps) of the steps of each kind.

    Args:
        computation: The network, and how it is computed.
        drawing: Says how many steps there are of each.
        guided: The prefixes of all branches.
        prefix: That of the conditional one.
    """
    num_layers = computation.arch.num_layers
    ends = 1 - len(middle_layers(num_layers)) / num_layers
    whole, num_guided = drawing.num_whole_steps, drawing.num_guided_steps
    if drawing.layer_stride == 1:
        yield guided, 1.0, num_guided
        yield [prefix], 1.0, drawing.num_steps - num_guided
    else:
        yield guided, 1.0, whole
        yield guided, ends, num_guided - whole
        yield [prefix], ends, drawing.num_steps - num_guided


def new_clock(
    computation: Computation,
    speeds: Speeds,
    attention: Callable[[int], float | None] = lambda _: None,
) -> Clock | None:
    """Returns the clock of a machine; see `Clock`.

    It is None where a network computes with other numbers than speeds are measured with.
    """
    stored = None if computation.precision is None else computation.precision.stored
    measured = stored is None or stored in speeds.quantised_flop_per_s
    if computation.item_bytes != MEASURED_ITEM_BYTES or not measured:
        return None
    return Clock(computation, speeds, attention)


def _parts(total: int, most: int) -> Iterator[tuple[int, int]]:
    """Yields (size, how often) of the parts that a number is cut into."""
    often, rest = divmod(total, most)
    if often:
        yield most, often
    if rest:
        yield rest, 1
