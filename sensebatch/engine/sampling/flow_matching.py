"""Rectified flow from noise (t = 0) to image (t = 1): schedules, noise and velocity.

Knows neither the network nor guidance. Shape suffixes: N tokens of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SERIAL_NUMBERS = 1 << 14
"""How many numbers torch certainly computes with one thread."""
T_EPS = 0.02
"""Smallest divisor of the velocity. The published loops use it whatever the checkpoint says."""


def timesteps(num_steps: int, shift: float) -> Tensor:
    """Returns timesteps that rise from 0 to 1, shifted towards noise, float32 `[num_steps + 1]`.

    A shift of 1 also goes through 1 - (1 - t), as it does in the published schedule.

    Source: `_apply_time_schedule` of the SenseNova-U1 release, its standard schedule.
    """
    sigma = 1 - torch.linspace(0, 1, num_steps + 1)
    return 1 - shift * sigma / (1 + (shift - 1) * sigma)


def explicit_timesteps(between: Sequence[float]) -> Tensor:
    """Returns the schedule with these timesteps between 0 and 1, float32 `[len(between) + 2]`."""
    return torch.tensor([0.0, *between, 1.0])


def noise_scale(
    image_tokens: int, *, scale: float, mode: str, base_image_seq_len: int, max_value: float
) -> float:
    """Returns the standard deviation of the starting noise of an image.

    Args:
        image_tokens: Tokens of the image.
        scale: The checkpoint's `noise_scale`.
        mode: `resolution`, `dynamic` or `dynamic_sqrt`.
        base_image_seq_len: Tokens of an image whose noise has the checkpoint's scale.
        max_value: Upper bound of the scale.
    """
    scaled = scale * math.sqrt(image_tokens / base_image_seq_len)
    if mode == "dynamic_sqrt":
        scaled = math.sqrt(scaled)
    return min(scaled, max_value)


def initial_noise(
    height: int,
    width: int,
    scale: float,
    generator: torch.Generator,
    out: Tensor | None = None,
) -> Tensor:
    """Returns the starting noise of an image, float32 `[3, height, width]` on the CPU.

    It is drawn on the CPU whatever the device, so that a seed means the same image everywhere.

    Args:
        height: Height in pixels.
        width: Width in pixels.
        scale: Standard deviation.
        generator: The job's own; its later images continue where the earlier ones stopped.
        out: Memory that it is drawn into, float32 `[3 * height * width]`; None for new memory.
    """
    shape = (3, height, width)
    place = None if out is None else out.view(shape)
    noise = torch.randn(shape, generator=generator, out=place)
    # So few at a time that torch does not share them out among threads, each of which would keep a
    # processor busy for milliseconds after its share.
    for part in noise.view(-1).split(SERIAL_NUMBERS):
        part.mul_(scale)
    return noise


def velocity_from_image(x_Nx: Tensor, z_Nx: Tensor, t: float, out: Tensor | None = None) -> Tensor:
    """Returns the velocity that leads from z at t to the predicted image x at t = 1.

    Args:
        x_Nx: Predicted image.
        z_Nx: Noisy image.
        t: Timestep.
        out: Where the velocity is written; may be `x_Nx`.
    """
    difference = torch.sub(x_Nx, z_Nx, out=out)
    return torch.div(difference, max(1 - t, T_EPS), out=out)
