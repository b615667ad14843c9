"""A LoRA file, merged into the weights while they are loaded. Knows no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sensebatch.checkpoint.tensors import TensorSpec
from sensebatch.errors import CheckpointError

PREFIX = "diffusion_model."
"""What all keys of a file may begin with."""

NUM_LISTED = 5
"""How many keys an error names."""

_ROLES = {".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Delta:
    """The low-rank change of one weight."""

    down_RI: torch.Tensor
    up_OR: torch.Tensor
    alpha: float

    def apply(self, weight: torch.Tensor, first_row: int) -> torch.Tensor:
        scale = self.alpha / self.down_RI.shape[0]
        up_OR = self.up_OR[first_row : first_row + weight.shape[0]]
        change = up_OR.to(weight.device) @ self.down_RI.to(weight.device)
        return (weight.float() + scale * change).to(weight.dtype)


class Lora:
    """The changes of a LoRA file by weight; `apply` each weight once, at load.

    R = rank, I and O = the weight's inputs and outputs.
    """

    def __init__(self, deltas: Mapping[str, _Delta]) -> None:
        self._deltas = dict(deltas)
        self._unused = set(deltas)

    @classmethod
    def open(cls, file: Path, expected: Mapping[str, TensorSpec]) -> Lora:
        """Reads a file and checks that every key of it changes a weight.

        Args:
            file: Safetensors with `<parameter path>.lora_down.weight`, `.lora_up.weight` and
                `.alpha`, either all or none under `diffusion_model.`.
            expected: The checkpoint's tensors, from `expected_tensors`.

        Raises:
            CheckpointError: The file cannot be read, only some keys have the prefix, a key is of
                another form, names no weight, lacks its counterpart, or has the wrong shape.
        """
        tensors = _read(file)
        by_weight: dict[str, dict[str, torch.Tensor]] = {}
        unknown = []
        for key in tensors:
            path, role = _split(key)
            if role is None or f"{path}.weight" not in expected:
                unknown.append(key)
            else:
                by_weight.setdefault(f"{path}.weight", {})[role] = tensors[key]
        if unknown:
            listed = ", ".join(sorted(unknown)[:NUM_LISTED])
            raise CheckpointError(
                f"{file}: {len(unknown)} keys fit no weight of the checkpoint: {listed}"
            )
        return cls(
            {
                name: _delta(file, name, parts, expected[name].shape)
                for name, parts in by_weight.items()
            }
        )

    def __contains__(self, name: str) -> bool:
        return name in self._deltas

    def apply(self, name: str, weight: torch.Tensor, *, first_row: int = 0) -> torch.Tensor:
        """Returns a weight with its change added in float32 and rounded to its own dtype.

        A weight that the file does not change is returned as it is.

        Args:
            name: Of the whole weight.
            weight: All its rows, or some of them.
            first_row: Which row of the whole the first of them is.
        """
        if name not in self._deltas:
            return weight
        self._unused.discard(name)
        return self._deltas[name].apply(weight, first_row)

    def unused(self) -> list[str]:
        """Returns the weights that the file changes and `apply` has not been called with."""
        return sorted(self._unused)


def _read(file: Path) -> dict[str, torch.Tensor]:
    """Returns the file's tensors by key without the prefix."""
    try:
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: expected a LoRA in safetensors: {error}") from error
    if not tensors:
        raise CheckpointError(f"{file}: expected a LoRA, found no tensors")
    bare = sorted(key for key in tensors if not key.startswith(PREFIX))
    if bare and len(bare) < len(tensors):
        raise CheckpointError(
            f"{file}: expected {PREFIX} before all keys or none, found {len(bare)} of "
            f"{len(tensors)} without it: {', '.join(bare[:NUM_LISTED])}"
        )
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def _split(key: str) -> tuple[str, str | None]:
    """Returns a key's parameter path and which part of the change it is, if any."""
    for ending, role in _ROLES.items():
        if key.endswith(ending):
            return key.removesuffix(ending), role
    return key, None


def _delta(
    file: Path, name: str, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]
) -> _Delta:
    path = name.removesuffix(".weight")
    for ending, role in _ROLES.items():
        if role not in parts:
            raise CheckpointError(f"{file}: {path}{ending}: expected, not found")
    down, up, alpha = (parts[role].float() for role in ("down", "up", "alpha"))
    if alpha.numel() != 1 or not torch.isfinite(alpha).all():
        raise CheckpointError(
            f"{file}: {path}.alpha: expected one finite number, found {alpha.tolist()}"
        )
    fits = down.ndim == up.ndim == len(shape) == 2 and (
        down.shape[1] == shape[1] and up.shape[0] == shape[0] and 0 < down.shape[0] == up.shape[1]
    )
    if not fits:
        raise CheckpointError(
            f"{file}: {path}: expected lora_up [{shape[0]}, rank] and lora_down "
            f"[rank, {shape[-1]}] for a weight of {list(shape)}, found {list(up.shape)} and "
            f"{list(down.shape)}"
        )
    return _Delta(down_RI=down, up_OR=up, alpha=float(alpha))
