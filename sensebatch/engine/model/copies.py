"""Copies of host tensors to the device that nobody waits for. Knows neither streams nor sizes.

An ordinary copy from host memory blocks until everything before it is computed. Then the device has
nothing to do while the next kernels are launched.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on the device, in order with what is computed there.

    It goes through pinned memory, which torch keeps until it is copied.
    """
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)
