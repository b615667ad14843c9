"""What the arithmetic of memory and time knows of a network. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.config import ModelConfig
from sensebatch.jobs import Precision

GPU_ITEM_BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a number by the dtype's name; auto as on a GPU."""


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


def is_tileable(arch: Architecture) -> bool:
    """Returns whether the kernels' tiles fit the heads of a network."""
    sides = (arch.num_heads, arch.num_kv_heads, arch.head_dim)
    return arch.head_dim >= 16 and all(side & (side - 1) == 0 for side in sides)


def gpu_computation(arch: Architecture, model: ModelConfig) -> Computation:
    """Returns how a GPU would compute with the model's settings, whatever this machine has."""
    return Computation(
        arch=arch,
        item_bytes=GPU_ITEM_BYTES[model.dtype],
        precision=model.quantised,
        fused=model.compile and is_tileable(arch),
    )
