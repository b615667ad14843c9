"""Reads tensors of safetensors files straight to their final place."""

from __future__ import annotations

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
    view = target.view(-1).view(torch.uint8).numpy().data
    try:
        with tensor.file.open("rb", buffering=0) as file:
            file.seek(tensor.offset + start)
            done = 0
            while done < len(view):
                count = file.readinto(view[done : done + MAX_READ_BYTES])
                if not count:
                    raise CheckpointError(f"{tensor.file}: expected more bytes, found its end")
                done += count
    except OSError as error:
        raise CheckpointError(f"{tensor.file}: cannot be read: {error.strerror}") from error
