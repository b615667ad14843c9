"""Sources of weights: a checkpoint's files, or a fixed rule for synthetic ones.

Both write straight to a tensor's final place, so no weight is in host memory twice.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

from sensebatch.checkpoint.files import Checkpoint
from sensebatch.engine.weights.lora import Lora
from sensebatch.engine.weights.tensor_files import (
    FILE_DTYPES,
    convert,
    read_bytes,
    read_converted,
)
from sensebatch.errors import CheckpointError, StoppedError

SYNTHETIC_PERIOD = 1_048_583
"""Synthetic weights repeat after this many numbers: a prime, so that no two rows are equal."""


class WeightSource(Protocol):
    """Supplies checkpoint tensors by name, to several threads at a time."""

    def read_into(self, name: str, rows: tuple[int, int] | None, target: Tensor) -> None:
        """Writes a tensor, or its rows from start to end, into contiguous host memory.

        Raises:
            CheckpointError: The file became shorter or cannot be read, or a number is not finite.
        """


class FileWeights:
    """The weights of a checkpoint, read from its safetensors files.

    Args:
        checkpoint: Its headers, already checked.
        lora: Is merged into the weights as they are read.
    """

    def __init__(self, checkpoint: Checkpoint, lora: Lora | None = None) -> None:
        self._tensors = checkpoint.tensors
        self._lora = lora

    def read_into(self, name: str, rows: tuple[int, int] | None, target: Tensor) -> None:
        """See `WeightSource.read_into`."""
        tensor = self._tensors[name]
        first, end = (0, tensor.shape[0]) if rows is None else rows
        start = first * (tensor.nbytes // tensor.shape[0])
        if self._lora is not None and name in self._lora:
            weight = torch.empty((end - first, *tensor.shape[1:]), dtype=FILE_DTYPES[tensor.dtype])
            read_bytes(tensor, start, weight)
            target.copy_(self._lora.apply(name, weight, first_row=first))
        elif FILE_DTYPES[tensor.dtype] == target.dtype:
            read_bytes(tensor, start, target)
        else:
            read_converted(tensor, start, target)
        if not _is_finite(target):
            raise CheckpointError(
                f"{tensor.file}: {name}: expected numbers that are finite in "
                f"{str(target.dtype).removeprefix('torch.')}, found NaN or infinite ones"
            )


def _is_finite(weight: Tensor) -> bool:
    """Returns whether all numbers are finite, about as fast as they are read from memory."""
    # NaN and infinity survive a sum, which costs a hundredth of looking at each number. A sum of
    # finite numbers may become infinite as well.
    return bool(torch.isfinite(weight.sum())) or bool(torch.isfinite(weight).all())


class SyntheticWeights:
    """Synthetic weights of any architecture, from a fixed rule: for profiling, not for images.

    They are normal numbers from one table, at a place that follows from the tensor's name, scaled
    so that a matrix keeps the magnitude of its input. Norms are ones.

    Args:
        dtype: Dtype of the weights.
        lora: Is merged into the weights.
        wide: Names of those that are made in float32 and rounded, as if files held them so.
    """

    def __init__(
        self, dtype: torch.dtype, lora: Lora | None = None, wide: Collection[str] = ()
    ) -> None:
        self._lora = lora
        self._wide = wide
        generator = torch.Generator().manual_seed(0)
        self._normal = torch.randn(SYNTHETIC_PERIOD, generator=generator)
        self._dtype = dtype
        self._tables: dict[tuple[float, torch.dtype], Tensor] = {}
        self._lock = Lock()

    def read_into(self, name: str, rows: tuple[int, int] | None, target: Tensor) -> None:
        """See `WeightSource.read_into`."""
        if target.ndim == 1 and "norm" in name:
            target.fill_(1)
            return
        dtype = torch.float32 if name in self._wide else self._dtype
        fan_in = math.prod(target.shape[1:])
        scale = 0.02 if target.ndim == 1 or "embed_tokens" in name else fan_in**-0.5
        table = self._table(scale, dtype)
        first_row = 0 if rows is None else rows[0]
        first = zlib.crc32(name.encode()) + first_row * fan_in
        if dtype == target.dtype:
            _repeat(table, first, target.view(-1))
        else:
            convert(dtype, target, lambda start, part: _repeat(table, first + start, part))
        if self._lora is not None and name in self._lora:
            target.copy_(self._lora.apply(name, target, first_row=first_row))

    def _table(self, scale: float, dtype: torch.dtype) -> Tensor:
        """Returns the table at one scale, which is made once."""
        with self._lock:
            if (scale, dtype) not in self._tables:
                self._tables[scale, dtype] = (scale * self._normal).to(dtype)
            return self._tables[scale, dtype]


def _repeat(table: Tensor, first: int, target: Tensor) -> None:
    """Fills flat memory with a table's numbers, repeated from an index on."""
    # As bytes, which numpy copies at the speed of the memory; it has no bfloat16.
    source, flat = table.view(torch.uint8).numpy(), target.view(torch.uint8).numpy()
    place = first % table.numel() * table.element_size()
    done = 0
    while done < flat.size:
        count = min(source.size - place, flat.size - done)
        flat[done : done + count] = source[place : place + count]
        done, place = done + count, 0


class StoppableWeights:
    """Weights whose load a stop ends; once loaded, they are read whether it is set or not.

    Args:
        source: Supplies the weights.
        stop: Whether to stop loading.
    """

    def __init__(self, source: WeightSource, stop: Callable[[], bool]) -> None:
        self._source = source
        self._stop = stop
        self._is_loading = True

    def read_into(self, name: str, rows: tuple[int, int] | None, target: Tensor) -> None:
        """See `WeightSource.read_into`.

        Raises:
            StoppedError: The stop is set before the load has ended.
        """
        if self._is_loading and self._stop():
            raise StoppedError("the run was stopped while the weights were loaded")
        self._source.read_into(name, rows, target)

    def loaded(self) -> None:
        """Ends the load; weights that are streamed during a run ignore the stop."""
        self._is_loading = False
