"""The bytes of a network's weights, by what they are for and how they are stored. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.checkpoint.tensors import (
    TensorGroup,
    TensorSpec,
    expected_tensors,
    head_part_rows,
)
from sensebatch.plan.computation import Computation
from sensebatch.plan.passes import NUM_PACKED, PACKED_SHARE, unpacking_bytes

SCALE_BYTES = 4
"""A float32: the scale of a row of 8-bit numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBytes:
    """The bytes of a network's weights, by what they are for."""

    block: int
    """The largest decoder layer or part of the vocabulary head: the size of a ring buffer."""
    kept_block: int
    """The largest layer of the generation expert: the size of every other buffer."""
    text_block: int
    """The largest layer of the understanding expert or part of the vocabulary head."""
    num_generation: int
    """Blocks of the generation expert."""
    num_understanding: int
    """Blocks of the understanding expert, the vocabulary head included."""
    blocks: int
    """All blocks together."""
    packed_blocks: int
    """The same in host memory that one process has to itself."""
    unpacking: int
    """Device memory that packed blocks pass through; 0 if none are packed."""
    packing: int
    """Host memory that blocks are read into before they are packed; 0 if none are."""
    understanding_layers: int
    """The decoder layers of the understanding expert."""
    generation_layers: int
    """Those of the generation expert."""
    embeddings: int
    """The table of token embeddings."""
    rest: int
    """Everything that always stays on the device."""

    def buffers(self, ring: int, kept: int) -> int:
        """Returns the bytes of device buffers: a ring for any block, others for kept layers.

        What packed blocks pass through on their way to them is counted as well.
        """
        return ring * self.block + kept * self.kept_block + self.unpacking

    def buffers_for_images(self, ring: int) -> int:
        """Returns how many buffers keep the generation expert, the ring included."""
        return ring + self.num_generation

    def buffers_for_text(self, ring: int) -> int:
        """Returns how many buffers keep the understanding expert and the vocabulary head.

        The ring's memory is used for them as well; there is at least the ring.
        """
        missing = self.num_understanding * self.text_block - ring * self.block
        return ring + max(-(-missing // self.kept_block), 0)

    def layers_kept(self, num_buffers: int | None, ring: int) -> int:
        """Returns how many generation layers stay while images are drawn.

        Args:
            num_buffers: On the device; None where every block has its own.
            ring: How many of them are for blocks that do not stay.
        """
        if num_buffers is None or num_buffers >= self.num_generation:
            return self.num_generation
        return num_buffers - ring


def weight_bytes(computation: Computation) -> WeightBytes:
    """Returns the bytes of a network's weights.

    It goes through every tensor, so it is called once for a run and not once for a group.
    """
    arch, item_bytes = computation.arch, computation.item_bytes
    vocabulary = arch.vocab_size * arch.hidden_size
    layers: dict[tuple[TensorGroup, int], int] = defaultdict(int)
    rest = 0
    for name, spec in expected_tensors(arch).items():
        if spec.layer is not None:
            layers[spec.group, spec.layer] += _stored_bytes(computation, name, spec)
        elif spec.group is not TensorGroup.SHARED:
            rest += spec.num_elements * item_bytes
    parts = head_part_rows(arch)
    kept = max(size for (group, _), size in layers.items() if group is TensorGroup.GENERATION)
    part = parts[0] * arch.hidden_size * item_bytes
    largest = max(*layers.values(), part)
    text = max(size for (group, _), size in layers.items() if group is TensorGroup.UNDERSTANDING)
    head = vocabulary * item_bytes
    experts = [
        (group, _of_group(layers, group))
        for group in (TensorGroup.UNDERSTANDING, TensorGroup.GENERATION)
    ]
    packed = in_host(computation, None, head)
    packed += sum(in_host(computation, group, size) for group, size in experts)
    return WeightBytes(
        packed_blocks=packed,
        unpacking=unpacking_bytes() if computation.packs else 0,
        packing=NUM_PACKED * largest if computation.packs else 0,
        block=largest,
        kept_block=kept,
        text_block=max(text, part),
        num_generation=arch.num_layers,
        num_understanding=arch.num_layers + len(parts),
        blocks=sum(layers.values()) + vocabulary * item_bytes,
        understanding_layers=_of_group(layers, TensorGroup.UNDERSTANDING),
        generation_layers=_of_group(layers, TensorGroup.GENERATION),
        embeddings=vocabulary * item_bytes,
        rest=rest,
    )


def in_host(computation: Computation, group: TensorGroup | None, num_bytes: int) -> int:
    """Returns the bytes that blocks take in host memory, and on their way to the device.

    Args:
        computation: The network, and how it is stored.
        group: The expert that they are layers of; None for the vocabulary head.
        num_bytes: Theirs on the device.
    """
    is_packed = group is None or (
        group is TensorGroup.UNDERSTANDING and not is_quantised(computation, group)
    )
    if not computation.packs or not is_packed:
        return num_bytes
    return int(num_bytes * PACKED_SHARE)


def _of_group(layers: Mapping[tuple[TensorGroup, int], int], group: TensorGroup) -> int:
    return sum(size for (of, _), size in layers.items() if of is group)


def _stored_bytes(computation: Computation, name: str, spec: TensorSpec) -> int:
    """Returns the bytes of a decoder layer's tensor, with its scales where it is quantised."""
    quantised = is_quantised(computation, spec.group)
    if not quantised or not may_be_quantised(computation.arch, name, spec):
        return spec.num_elements * computation.item_bytes
    return spec.num_elements + spec.shape[0] * SCALE_BYTES


def is_quantised(computation: Computation, group: TensorGroup) -> bool:
    """Returns whether the layers of an expert are quantised."""
    precision = computation.precision
    if precision is None:
        return False
    generation = group is TensorGroup.GENERATION
    return (precision.stored if generation else precision.stored_for_text) is not None


def may_be_quantised(arch: Architecture, name: str, spec: TensorSpec) -> bool:
    """Returns whether a tensor of a decoder layer is a matrix that precisions quantise."""
    generation = spec.group is TensorGroup.GENERATION
    moe = arch.generation_moe if generation else arch.understanding_moe
    assert spec.layer is not None
    sparse = moe is not None and moe.sparse_layers[spec.layer] and ".mlp" in name
    return not sparse and len(spec.shape) > 1
