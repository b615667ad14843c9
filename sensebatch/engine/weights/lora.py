"""The changes of a LoRA, merged into weights while they are loaded. Knows no network.

R = rank, I and O = inputs and outputs of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sensebatch.checkpoint.lora import LoraPair, read_lora
from sensebatch.checkpoint.tensors import TensorSpec
from sensebatch.engine.weights.tensor_files import read_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """The low-rank change of one weight."""

    down_RI: Tensor
    up_OR: Tensor
    scale: float

    def apply(self, weight: Tensor, first_row: int) -> Tensor:
        up_OR = self.up_OR[first_row : first_row + weight.shape[0]]
        change = up_OR.to(weight.device) @ self.down_RI.to(weight.device)
        return (weight.float() + self.scale * change).to(weight.dtype)


class Lora:
    """The changes of a LoRA by weight; `apply` each weight once, at load.

    Args:
        pairs: Of `checkpoint.lora.read_lora`.

    Raises:
        CheckpointError: The file can no longer be read.
    """

    def __init__(self, pairs: Mapping[str, LoraPair]) -> None:
        self._changes = {
            weight: _Change(
                down_RI=read_tensor(pair.down).float(),
                up_OR=read_tensor(pair.up).float(),
                scale=pair.scale,
            )
            for weight, pair in pairs.items()
        }

    @classmethod
    def open(cls, path: Path, expected: Mapping[str, TensorSpec]) -> Lora:
        """Reads a LoRA; see `checkpoint.lora.read_lora` for what it may be and what is an error."""
        return cls(read_lora(path, expected).pairs)

    def __contains__(self, name: str) -> bool:
        return name in self._changes

    def apply(self, name: str, weight: Tensor, *, first_row: int = 0) -> Tensor:
        """Returns a weight with its change added in float32 and rounded to its own dtype.

        A weight that the LoRA does not change is returned as it is.

        Args:
            name: The checkpoint's name of the whole weight.
            weight: All its rows, or some of them.
            first_row: Which row of the whole the first of them is.
        """
        if name not in self._changes:
            return weight
        return self._changes[name].apply(weight, first_row)
