"""Draws one picture for each of several jobs together, behind the prefixes they have cached.

Shape suffixes: J jobs, B evaluations of a step (one for each job and branch), N tokens of an
image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.contract import Progress
from sensebatch.engine.model.kv_cache import KVCache
from sensebatch.engine.model.network import ImagePositions
from sensebatch.engine.model.patchify import image_to_tokens, tokens_to_image
from sensebatch.engine.runner import Runner
from sensebatch.engine.sampling.flow_matching import (
    euler,
    initial_noise,
    noise_scale,
    timesteps,
    velocity_from_image,
)
from sensebatch.engine.sampling.guidance import Guidance
from sensebatch.resolutions import Resolution


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """One picture to be drawn."""

    guidance: Guidance
    caches: Mapping[str, KVCache]
    """The cached prefix of each of the guidance's branches."""
    noise: Tensor
    """float32 `[3, height, width]`, already scaled."""


def image_noise_scale(arch: Architecture, resolution: Resolution) -> float:
    """Returns the standard deviation of the noise a picture of this size starts from."""
    return noise_scale(
        resolution.image_tokens,
        scale=arch.noise_scale,
        mode=arch.noise_scale_mode,
        base_image_seq_len=arch.noise_scale_base_image_seq_len,
        max_value=arch.noise_scale_max_value,
    )


def draw_noise(arch: Architecture, resolution: Resolution, generator: torch.Generator) -> Tensor:
    """Returns a picture's starting noise, float32 `[3, height, width]` on the CPU."""
    scale = image_noise_scale(arch, resolution)
    return initial_noise(resolution.height, resolution.width, scale, generator)


def denoise(
    runner: Runner,
    drawings: Sequence[Drawing],
    resolution: Resolution,
    *,
    num_steps: int,
    timestep_shift: float,
) -> Tensor:
    """Returns the finished pictures, float32 `[J, 3, height, width]`, not clamped.

    Every step evaluates all branches of the jobs of a pass together; a job whose guidance rests
    at a timestep takes part with its conditional branch alone.

    Args:
        runner: The network; its limits say how many jobs share a pass.
        drawings: One for each job.
        resolution: Of every picture.
        num_steps: Euler steps.
        timestep_shift: Of the schedule.
    """
    at_a_time = max(runner.limits.image_tokens // resolution.image_tokens, 1)
    with runner.denoising():
        return torch.cat(
            [
                _denoise_together(
                    runner,
                    drawings[start : start + at_a_time],
                    resolution,
                    num_steps=num_steps,
                    timestep_shift=timestep_shift,
                )
                for start in range(0, len(drawings), at_a_time)
            ]
        )


def _denoise_together(
    runner: Runner,
    drawings: Sequence[Drawing],
    resolution: Resolution,
    *,
    num_steps: int,
    timestep_shift: float,
) -> Tensor:
    """`denoise` for the jobs of one pass."""
    device = runner.network.device
    schedule = timesteps(num_steps, timestep_shift)
    conditions = runner.network.condition(
        schedule[:-1].to(device), image_noise_scale(runner.network.arch, resolution)
    )
    of_all = {id(cache): cache for drawing in drawings for cache in drawing.caches.values()}
    fetched = {key: cache.on(device) for key, cache in of_all.items()}
    shared: dict[tuple[tuple[str, ...], ...], ImagePositions] = {}

    def velocity(z_JNx: Tensor, step: int, t: float) -> Tensor:
        branches = tuple(drawing.guidance.branches_at(t) for drawing in drawings)
        rows = [job for job, names in enumerate(branches) for _ in names]
        caches = [
            fetched[id(drawing.caches[name])]
            for drawing, names in zip(drawings, branches, strict=True)
            for name in names
        ]
        if branches not in shared:
            shared[branches] = runner.network.image_positions(caches, resolution)
        x_BNx = runner.network.predict_image(
            z_JNx, conditions[step], caches, shared[branches], runner.attention, rows
        )
        predicted = iter(x_BNx)
        guided = []
        for drawing, names, z_Nx in zip(drawings, branches, z_JNx, strict=True):
            velocities = {name: velocity_from_image(next(predicted), z_Nx, t) for name in names}
            guided.append(drawing.guidance.combine(velocities, step, t))
        runner.num_denoise_steps += 1
        runner.progress(Progress(phase="denoise", step=step + 1, num_steps=num_steps))
        return torch.stack(guided)

    # Laid out on the device, which takes a CPU a tenth of a second for each large picture.
    noise = [image_to_tokens(drawing.noise.to(device)[None]) for drawing in drawings]
    z_JNx = euler(torch.cat(noise), schedule, velocity)
    return tokens_to_image(z_JNx, resolution.height, resolution.width)
