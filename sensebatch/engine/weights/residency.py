"""Decides where the network's weights are during each phase of a batch.

Cuts the network into blocks (decoder layers and parts of the vocabulary head) that `memory` moves,
puts everything else on the device for good, and prepares the blocks that a phase goes through.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.engine.device.memory import empty_cache, translated_out_of_memory
from sensebatch.engine.memory.blocks import Block, Entry, Layout, layout_of, new_buffer
from sensebatch.engine.memory.host import CPU, HostStore
from sensebatch.engine.memory.lanes import Lane, Leash, lane_for
from sensebatch.engine.memory.pool import Pool
from sensebatch.engine.memory.readers import Readers
from sensebatch.engine.memory.shared import SharedBuffers
from sensebatch.engine.model.network import Network
from sensebatch.engine.model.quantized import BY_DTYPE, quantise_rows, scale_of
from sensebatch.engine.model.state_dict_adapter import Slot, checkpoint_slots
from sensebatch.engine.weights.sources import WeightSource
from sensebatch.errors import OutOfMemoryError
from sensebatch.plan.passes import RING
from sensebatch.plan.placement import Placement

EMBEDDING_PREFIX = "embed_tokens."
BLOCK_PREFIXES = ("understanding.layers.", "generation.layers.", "lm_head.parts.")
LEASH = 8
"""Layers of the generation expert that the host may be ahead of the device. Of the small images of
a large batch, each takes about a hundred launches."""
EMBEDDINGS = "embeddings"
"""What token embeddings are called where they are shared."""
PART_BYTES = 16 << 20
"""About how much of a tensor one thread reads at a time."""
CACHED_BYTES = 1 << 20
"""About how much of a tensor is quantised at a time."""

Pieces = list[tuple[str, Slot]]
"""The (checkpoint tensor, slot) pairs of one parameter."""


class Residency:
    """Moves the network's weights.

    Args:
        network: Has its parameters on the meta device, in their final dtypes; they are given memory
            here.
        source: Supplies the weights.
        placement: How much memory they take.
        device: The device that the network computes on.
        shared: What weights in host memory lie in if other processes stream them too; None for
            memory of this process.
        packs: Whether blocks of bfloat16 that text goes through are packed in host memory. Images
            are computed for longer than their weights take to come.

    Raises:
        CheckpointError: A file cannot be read.
        DeviceError: The device unpacks other weights than were packed.
        OutOfMemoryError: The host has less memory than planned.
        StoppedError: A stop was set while another process read the weights.
    """

    def __init__(
        self,
        network: Network,
        source: WeightSource,
        placement: Placement,
        device: torch.device,
        shared: SharedBuffers | None = None,
        *,
        packs: bool = False,
    ) -> None:
        self._device = device
        pieces = _pieces_by_parameter(network.arch)
        self._understanding = _blocks(network, "understanding.layers", pieces, source)
        self._generation = _blocks(network, "generation.layers", pieces, source)
        self._head = _blocks(network, "lm_head.parts", pieces, source)
        blocks = [*self._generation, *self._understanding, *self._head]
        self._whole = placement.num_buffers is None
        self._embed_on_device = placement.embed_on_device
        lane = lane_for(device)
        self._readers = Readers()
        _load_rest(
            network, pieces, source, self._readers, placement.embed_on_device, device, shared
        )
        self._host = HostStore(
            self._readers,
            pin=device.type == "cuda",
            shared=shared,
            pack_on=device if packs and shared is None else None,
        )
        self._host.keep(
            blocks,
            0 if self._whole else placement.host_block_bytes,
            lane,
            packed=frozenset([*self._understanding, *self._head]),
        )
        # What was packed, and a block that was unpacked, lay where no two blocks would fit.
        empty_cache(device)
        self._pool = self._new_pool(blocks, placement.num_buffers, lane)
        lent = self._load_all(blocks, lane) if self._whole else None
        network.understanding.lend = self._lender(self._understanding, lent)
        network.generation.lend = _on(Leash(lane, LEASH), self._lender(self._generation, lent))
        network.lm_head.lend = self._lender(self._head, lent)

    def _new_pool(self, blocks: Sequence[Block], num_buffers: int | None, lane: Lane) -> Pool:
        """Returns device memory for blocks: so many buffers; None for all that they need."""
        if num_buffers is None:
            sizes = [block.layout.num_bytes for block in blocks]
            return Pool(new_buffer(sum(sizes), self._device), self._host, lane, sizes)
        self._num_buffers = num_buffers
        memory = new_buffer(self._buffer_bytes(num_buffers), self._device)
        return Pool(memory, self._host, lane)

    @property
    def is_whole(self) -> bool:
        """Whether every block has a device buffer for good and none is in host memory."""
        return self._whole

    def suits(self, placement: Placement) -> bool:
        """Returns whether the weights lie where a placement has them, or would after a `resize`."""
        if self._embed_on_device != placement.embed_on_device:
            return False
        if self._whole or placement.num_buffers is None:
            return self._whole and placement.num_buffers is None
        room = placement.host_block_bytes
        return room is None or self.host_bytes <= room

    @property
    def keeps_text(self) -> bool:
        """Whether weights for decoding stay where they are from their first use in a phase."""
        return self._whole or self._pool.keeps_all

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory in blocks."""
        return self._host.kept_bytes

    def prefill(self, *, decodes: bool) -> None:
        """Prepares for one pass of prompts, with logits after it if text is decoded."""
        self._schedule([*self._understanding, *(self._head if decodes else [])], keep=False)

    def decode(self) -> None:
        """Prepares for many passes of the understanding expert with logits."""
        self._schedule([*self._understanding, *self._head], keep=True)

    def denoise(self) -> None:
        """Prepares for many passes of the generation expert."""
        self._schedule(self._generation, keep=True)

    def resize(self, num_buffers: int, *, within: bool = False) -> int:
        """Keeps fewer or more blocks on the device, if they are in host memory as well.

        Args:
            num_buffers: How many buffers there are to be.
            within: Whether fewer buffers may lie in the memory of those before. It then goes back
                to the system together with them, and to the caches of this process before.

        Returns:
            The buffers there are now: as many as before if there is no memory for as many.

        Raises:
            OutOfMemoryError: There is no memory for as many as before either, or there was none.
        """
        if self._buffer_bytes(num_buffers) == self._pool.num_bytes:
            self._num_buffers = num_buffers
            return num_buffers
        before = self._pool.num_bytes
        self._pool.release()
        if not within or self._buffer_bytes(num_buffers) > before:
            # Otherwise the new memory could be a part of the old, which could then not be freed.
            empty_cache(self._device)
        try:
            memory = self._new_memory(self._buffer_bytes(num_buffers))
        except OutOfMemoryError:
            if not before:
                # There was none left last time either.
                raise
            memory = self._new_memory(before)
        else:
            self._num_buffers = num_buffers
        self._pool.give(memory)
        return self._num_buffers

    @contextmanager
    def lending(self) -> Iterator[Callable[[int], None]]:
        """Gives up device memory, but for the ring, while the context is open.

        It is a function that keeps as many blocks for decoding as fit so many bytes. Blocks are in
        host memory as well, or read again.
        """
        before = self._num_buffers
        text = [*self._understanding, *self._head]
        largest = max(block.layout.num_bytes for block in text)
        ring = self._buffer_bytes(RING)
        of_layer = self._buffer_bytes(RING + 1) - ring
        enough = -(-max(len(text) * largest - ring, 0) // of_layer)

        def fill(num_bytes: int) -> None:
            self.resize(RING + min(num_bytes // of_layer, enough), within=True)
            self.decode()

        try:
            yield fill
        finally:
            self.resize(before)

    def _new_memory(self, num_bytes: int) -> Tensor:
        with translated_out_of_memory(f"{num_bytes >> 20} MiB of weights did not fit"):
            return new_buffer(num_bytes, self._device)

    def _buffer_bytes(self, num_buffers: int) -> int:
        """Returns the device memory for blocks: a ring for all, the rest for generation layers."""
        generation = max(block.layout.num_bytes for block in self._generation)
        others = (block.layout.num_bytes for block in (*self._understanding, *self._head))
        kept = max(num_buffers - RING, 0)
        return kept * generation + RING * max(generation, *others)

    def _schedule(self, order: Sequence[Block], *, keep: bool) -> None:
        if not self._whole:
            self._pool.schedule(order, keep=keep)

    def _lender(
        self, blocks: Sequence[Block], lent: Mapping[Block, nn.Module] | None
    ) -> Callable[[int], AbstractContextManager[nn.Module]]:
        if lent is None:
            return lambda index: self._pool.lend(blocks[index])
        modules = [lent[block] for block in blocks]
        return lambda index: nullcontext(modules[index])

    def _load_all(self, blocks: Sequence[Block], lane: Lane) -> dict[Block, nn.Module]:
        """Gives every block a buffer of its own size, for good."""
        self._pool.schedule(blocks, keep=True)
        lent = {}
        try:
            for block in blocks:
                with self._pool.lend(block) as module:
                    lent[block] = module
        finally:
            self._host.close(lane)
            self._readers.close()
        return lent


def _on(
    leash: Leash, lend: Callable[[int], AbstractContextManager[nn.Module]]
) -> Callable[[int], AbstractContextManager[nn.Module]]:
    """Returns what lends blocks one after the other, no further ahead than a leash allows."""

    def held(index: int) -> AbstractContextManager[nn.Module]:
        leash.hold()
        return lend(index)

    return held


def _pieces_by_parameter(arch: Architecture) -> dict[str, Pieces]:
    pieces: dict[str, Pieces] = defaultdict(list)
    for name, slots in checkpoint_slots(arch).items():
        for slot in slots:
            pieces[slot.parameter].append((name, slot))
    return pieces


def _blocks(
    network: Network, prefix: str, pieces: Mapping[str, Pieces], source: WeightSource
) -> list[Block]:
    """Returns a block for each module of a list in the network."""
    dtype = network.dtype
    blocks = []
    for index, module in enumerate(network.get_submodule(prefix).children()):
        name = f"{prefix}.{index}"
        layout = layout_of(module)
        parts = [
            part
            for entry in layout.entries
            for tensor, slot in pieces.get(f"{name}.{entry.name}", ())
            for part in _parts(layout, entry, tensor, slot, source, dtype)
        ]
        blocks.append(Block(name=name, module=module, layout=layout, parts=tuple(parts)))
    return blocks


def _parts(
    layout: Layout,
    entry: Entry,
    tensor: str,
    slot: Slot,
    source: WeightSource,
    dtype: torch.dtype,
) -> Iterator[Callable[[Tensor], None]]:
    """Yields functions that each read some rows of a checkpoint tensor into its slot."""
    shape = slot.view({slot.parameter: torch.empty(entry.shape, device="meta")}).shape
    first = 0 if slot.rows is None else slot.rows[0]
    at_a_time = max(PART_BYTES // (math.prod(shape[1:]) * dtype.itemsize), 1)
    for start in range(0, shape[0], at_a_time):
        rows = range(start, min(start + at_a_time, shape[0]))
        if entry.dtype in BY_DTYPE:
            scales = next(e for e in layout.entries if e.name == scale_of(entry.name))
            yield partial(_quantise_rows, (entry, scales), tensor, slot, first, rows, source, dtype)
        else:
            yield partial(_read_rows, entry, tensor, slot, first, rows, source)


def _read_rows(
    entry: Entry,
    tensor: str,
    slot: Slot,
    first: int,
    rows: range,
    source: WeightSource,
    flat: Tensor,
) -> None:
    """Reads rows of a slot; its first row is the tensor's row `first`."""
    target = slot.view({slot.parameter: entry.view(flat)})[rows.start : rows.stop]
    source.read_into(tensor, (first + rows.start, first + rows.stop), target)


def _quantise_rows(
    entries: tuple[Entry, Entry],
    tensor: str,
    slot: Slot,
    first: int,
    rows: range,
    source: WeightSource,
    dtype: torch.dtype,
    flat: Tensor,
) -> None:
    """Reads rows as `dtype` and quantises them into a parameter and its scales."""
    weight, scale = (slot.view({slot.parameter: entry.view(flat)}) for entry in entries)
    # So few at a time that they stay in the processor's cache between operations.
    at_a_time = max(CACHED_BYTES // (weight.shape[1] * dtype.itemsize), 1)
    room = torch.empty(min(at_a_time, len(rows)), weight.shape[1], dtype=dtype)
    for start in rows[::at_a_time]:
        end = min(start + at_a_time, rows.stop)
        values = room[: end - start]
        source.read_into(tensor, (first + start, first + end), values)
        quantised, scales = quantise_rows(values, BY_DTYPE[weight.dtype])
        weight[start:end] = quantised
        scale[start:end] = scales[:, 0]


def _load_rest(
    network: Network,
    pieces: Mapping[str, Pieces],
    source: WeightSource,
    readers: Readers,
    embed_on_device: bool,
    device: torch.device,
    shared: SharedBuffers | None,
) -> None:
    """Gives parameters outside the blocks their memory: on the device, except embeddings."""
    for name, parameter in list(network.named_parameters()):
        if name.startswith(BLOCK_PREFIXES):
            continue
        entry = Entry(name, parameter.dtype, tuple(parameter.shape), 0)
        layout = Layout((entry,), parameter.nbytes)
        parts = [
            part
            for tensor, slot in pieces[name]
            for part in _parts(layout, entry, tensor, slot, source, parameter.dtype)
        ]
        stays = not embed_on_device and name.startswith(EMBEDDING_PREFIX)
        value = entry.view(_read(layout, parts, readers, shared if stays else None))
        if not stays:
            value = value.to(device)
        owner, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))


def _read(
    layout: Layout,
    parts: Sequence[Callable[[Tensor], None]],
    readers: Readers,
    shared: SharedBuffers | None,
) -> Tensor:
    """Returns token embeddings, or another parameter, in host memory that may be shared."""

    def fill(flat: Tensor) -> None:
        readers.run(partial(part, flat) for part in parts)

    if shared is None:
        flat = new_buffer(layout.num_bytes, CPU)
        fill(flat)
        return flat
    sizes = {EMBEDDINGS: layout.num_bytes}
    buffers = shared.get(EMBEDDINGS, sizes, lambda buffers: fill(buffers[EMBEDDINGS]))
    return buffers[EMBEDDINGS]
