"""Reads tensors of safetensors files straight to their final place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from threading import local

import torch
from torch import Tensor

from sensebatch.checkpoint.files import TensorFile
from sensebatch.errors import CheckpointError

FILE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
MAX_READ_BYTES = 1 << 30
CONVERTED_BYTES = 1 << 20
"""How much of a tensor is read at a time where its numbers are converted: so little that they are
still in the processor's cache, and that threads take next to no memory for it."""
_OF_THREAD = local()


def read_tensor(tensor: TensorFile) -> Tensor:
    """Returns a tensor in its own dtype and in memory of its own.

    Raises:
        CheckpointError: The file has become shorter or cannot be read.
    """
    found = torch.empty(tensor.shape, dtype=FILE_DTYPES[tensor.dtype])
    read_bytes(tensor, 0, found)
    return found


def read_bytes(tensor: TensorFile, start: int, target: Tensor) -> None:
    """Fills contiguous memory with a tensor's bytes from `start` on, without another buffer.

    Raises:
        CheckpointError: The file has become shorter or cannot be read.
    """
    with _opened_at(tensor, start) as file:
        _fill(tensor, file, target)


def read_converted(tensor: TensorFile, start: int, target: Tensor) -> None:
    """Fills contiguous memory with a tensor's numbers from byte `start` on, in its own dtype.

    Raises:
        CheckpointError: The file has become shorter or cannot be read.
    """
    with _opened_at(tensor, start) as file:
        convert(FILE_DTYPES[tensor.dtype], target, lambda _, part: _fill(tensor, file, part))


def convert(dtype: torch.dtype, target: Tensor, write: Callable[[int, Tensor], None]) -> None:
    """Fills contiguous memory with numbers of another dtype, a little at a time.

    Args:
        dtype: What they are written in.
        target: Receives them, rounded to its own dtype.
        write: Writes the numbers from an index on; called from the first index to the last.
    """
    flat, room = target.view(-1), _room().view(dtype)
    for start in range(0, flat.numel(), room.numel()):
        rounded = flat[start : start + room.numel()]
        part = room[: rounded.numel()]
        write(start, part)
        rounded.copy_(part)


def _room() -> Tensor:
    """Returns the memory of this thread that numbers are converted from."""
    if not hasattr(_OF_THREAD, "room"):
        _OF_THREAD.room = torch.empty(CONVERTED_BYTES, dtype=torch.uint8)
    room: Tensor = _OF_THREAD.room
    return room


@contextmanager
def _opened_at(tensor: TensorFile, start: int) -> Iterator[FileIO]:
    """Yields a tensor's file at one of the tensor's bytes."""
    try:
        with tensor.file.open("rb", buffering=0) as file:
            file.seek(tensor.offset + start)
            yield file
    except OSError as error:
        raise CheckpointError(f"{tensor.file}: cannot be read: {error.strerror}") from error


def _fill(tensor: TensorFile, file: FileIO, target: Tensor) -> None:
    """Fills contiguous memory with the next bytes of a tensor's file."""
    view = target.view(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(view):
        count = file.readinto(view[done : done + MAX_READ_BYTES])
        if not count:
            raise CheckpointError(f"{tensor.file}: expected more bytes, found its end")
        done += count
