"""What the arithmetic of memory and time knows of a network. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.config import ModelConfig
from sensebatch.jobs import Precision

GPU_ITEM_BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a number by the dtype's name; auto as on a GPU."""
PACKED_DTYPES = ("auto", "bfloat16")
"""Dtypes whose numbers can be packed; auto as on a GPU."""
TILE_SIDE = 16
"""Rows and columns of the smallest tile that can be multiplied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Computation:
    """A network's shape, and how its numbers are stored and computed with."""

    arch: Architecture
    item_bytes: int
    """Bytes of a weight, an activation or a cached number."""
    precision: Precision | None = None
    """How the decoder layers' matrices are stored if that is in 8 bits; None for the dtype."""
    fused: bool = False
    """Whether chains of small operations are one kernel each."""
    packs: bool = False
    """Whether blocks of bfloat16 that text goes through are packed in host memory."""

    def wide(self, numbers: int) -> int:
        """Returns how many numbers of its own take the memory of so many of four bytes."""
        return -(-4 * numbers // self.item_bytes)


def is_tileable(arch: Architecture) -> bool:
    """Returns whether the kernels' tiles fit the heads of a network and its sparse blocks."""
    heads = (arch.num_heads, arch.num_kv_heads, arch.head_dim)
    moes = [moe for moe in (arch.understanding_moe, arch.generation_moe) if moe is not None]
    sides = [arch.hidden_size, *(moe.intermediate_size for moe in moes)] if moes else []
    return (
        arch.head_dim >= TILE_SIDE
        and all(side & (side - 1) == 0 for side in heads)
        and all(side % TILE_SIDE == 0 for side in sides)
    )


def gpu_computation(arch: Architecture, model: ModelConfig) -> Computation:
    """Returns how a GPU would compute with the model's settings, whatever this machine has."""
    return Computation(
        arch=arch,
        item_bytes=GPU_ITEM_BYTES[model.dtype],
        precision=model.quantised,
        fused=model.compile and is_tileable(arch),
        packs=model.compile and is_tileable(arch) and model.dtype in PACKED_DTYPES,
    )
