"""Draws one image for each of several jobs together, after the prefixes they have cached.

Shape suffixes: J jobs, B evaluations of a step (one for each job and branch), N tokens of an
image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.contract import Phase, Progress
from sensebatch.engine.model.copies import to_device
from sensebatch.engine.model.kv_cache import KVCache
from sensebatch.engine.model.network import ImagePositions
from sensebatch.engine.model.patchify import image_to_tokens, tokens_to_image
from sensebatch.engine.model.transformer import Middle
from sensebatch.engine.runner import Runner
from sensebatch.engine.sampling.flow_matching import (
    T_EPS,
    explicit_timesteps,
    initial_noise,
    noise_scale,
    timesteps,
    velocity_from_image,
)
from sensebatch.engine.sampling.guidance import COND, Guidance
from sensebatch.engine.sampling.solvers import Velocity, integrate
from sensebatch.engine.tasks.noise import Starting
from sensebatch.jobs import Drawing
from sensebatch.resolutions import TOKEN_NUMBERS, Resolution
from sensebatch.tasks import Branch


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """One image to be drawn: what guides it, and the noise it starts from."""

    guidance: Guidance
    caches: Mapping[Branch, KVCache]
    """The cached prefix of each of the guidance's branches."""
    noise: Starting


def image_noise_scale(arch: Architecture, resolution: Resolution) -> float:
    """Returns the standard deviation of the noise that an image of this size starts from."""
    return noise_scale(
        resolution.image_tokens,
        scale=arch.noise_scale,
        mode=arch.noise_scale_mode,
        base_image_seq_len=arch.noise_scale_base_image_seq_len,
        max_value=arch.noise_scale_max_value,
    )


def draw_noise(
    arch: Architecture,
    resolution: Resolution,
    generator: torch.Generator,
    out: Tensor | None = None,
) -> Tensor:
    """Returns an image's starting noise, float32 `[3, height, width]` on the CPU.

    It lies in `out` where that is given, float32 `[3 * height * width]`.
    """
    scale = image_noise_scale(arch, resolution)
    return initial_noise(resolution.height, resolution.width, scale, generator, out)


def passes(runner: Runner, num_jobs: int, resolution: Resolution) -> list[slice]:
    """Returns which jobs are drawn together, pass by pass, as the runner's limits say."""
    at_a_time = runner.limits.together(resolution)
    return [
        slice(start, min(start + at_a_time, num_jobs)) for start in range(0, num_jobs, at_a_time)
    ]


def denoise(
    runner: Runner,
    canvases: Sequence[Canvas],
    *,
    drawing: Drawing,
    place: tuple[int, int] = (0, 1),
) -> Tensor:
    """Returns the finished images of a pass, float32 `[J, 3, height, width]`, not clamped.

    Every step evaluates all branches of the jobs together; a job whose guidance rests at a
    timestep takes part with its conditional branch alone.

    Args:
        runner: The network.
        canvases: One for each job of the pass.
        drawing: The size of every image, the schedule and the solver.
        place: Index of the pass in its batch, and how many passes the batch has; for progress.
    """
    schedule = drawing_schedule(drawing)
    resolution, num_steps = drawing.resolution, drawing.num_steps
    with runner.denoising():
        # First, so that a GPU copies it while the host prepares the steps.
        noise = _noise(runner, canvases, resolution)
        velocity = _guided_velocity(runner, canvases, drawing, schedule)
        number, count = place

        def reported(z_JNx: Tensor, step: int, t: float) -> Tensor:
            v_JNx = velocity(z_JNx, step, t)
            runner.observe(step, v_JNx)
            runner.num_denoise_steps += 1
            done, all_steps = number * num_steps + step + 1, count * num_steps
            runner.pause(Progress(phase=Phase.DENOISE, step=done, num_steps=all_steps))
            return v_JNx

        z_JNx = integrate(noise, schedule, reported, drawing.solver)
        return tokens_to_image(z_JNx, resolution.height, resolution.width)


def drawing_schedule(drawing: Drawing) -> Tensor:
    """Returns the timesteps of an image from 0 to 1, float32 `[num_steps + 1]`."""
    if drawing.timesteps:
        return explicit_timesteps(drawing.timesteps)
    return timesteps(drawing.num_steps, drawing.timestep_shift)


def _noise(runner: Runner, canvases: Sequence[Canvas], resolution: Resolution) -> Tensor:
    """Returns the starting noise of all jobs as tokens."""
    device = runner.network.device
    shape = (len(canvases), resolution.image_tokens, TOKEN_NUMBERS)
    z_JNx = torch.empty(shape, dtype=torch.float32, device=device)
    for z_Nx, canvas in zip(z_JNx, canvases, strict=True):
        # Laid out on the device: a CPU takes a tenth of a second for each large image.
        z_Nx.copy_(image_to_tokens(canvas.noise.to(device)[None])[0])
    return z_JNx


class _Predictions:
    """Predicts the images of all jobs of a pass, step by step and branch by branch."""

    def __init__(
        self, runner: Runner, canvases: Sequence[Canvas], drawing: Drawing, schedule: Tensor
    ) -> None:
        network = runner.network
        self._runner, self._canvases, self._resolution = runner, canvases, drawing.resolution
        self._middle = Middle() if drawing.layer_stride > 1 else None
        self._is_kept = [
            drawing.layer_stride > 1 and drawing.is_whole(step) for step in range(len(schedule) - 1)
        ]
        self._conditions = network.condition(
            to_device(schedule[:-1], network.device),
            image_noise_scale(network.arch, drawing.resolution),
        )
        of_all = {id(cache): cache for canvas in canvases for cache in canvas.caches.values()}
        self._fetched = {key: cache.brought() for key, cache in of_all.items()}
        self._positions: dict[tuple[tuple[Branch, ...], ...], ImagePositions] = {}

    def at(
        self, z_JNx: Tensor, step: int, needed: Sequence[tuple[Branch, ...]]
    ) -> list[dict[Branch, Tensor]]:
        """Returns the predicted image of each branch that each job needs."""
        is_kept, canvases = self._is_kept[step], self._canvases
        # What the layers add is kept of every branch, whether guidance rests or not.
        branches = tuple(canvas.guidance.branches for canvas in canvases) if is_kept else (*needed,)
        evaluations = [(job, name) for job, names in enumerate(branches) for name in names]
        caches = [self._fetched[id(canvases[job].caches[name])] for job, name in evaluations]
        network = self._runner.network
        if branches not in self._positions:
            self._positions[branches] = network.image_positions(caches, self._resolution)
        if self._middle is not None:
            self._middle.again = None if is_kept else _kept_numbers(canvases, evaluations)
        predicted = network.predict_image(
            z_JNx,
            self._conditions[step],
            caches,
            self._positions[branches],
            self._runner.attention,
            [job for job, _ in evaluations],
            middle=self._middle,
        )
        found: list[dict[Branch, Tensor]] = [{} for _ in canvases]
        for (job, name), x_Nx in zip(evaluations, predicted, strict=True):
            if name in needed[job]:
                found[job][name] = x_Nx
        return found


def _kept_numbers(
    canvases: Sequence[Canvas], evaluations: Sequence[tuple[int, Branch]]
) -> list[int]:
    """Returns the numbers of evaluations among those of all branches of all jobs."""
    every = [(job, name) for job, one in enumerate(canvases) for name in one.guidance.branches]
    return [every.index(one) for one in evaluations]


def _guided_velocity(
    runner: Runner, canvases: Sequence[Canvas], drawing: Drawing, schedule: Tensor
) -> Velocity:
    """Returns what computes the velocity of all jobs of a pass at a step."""
    predictions = _Predictions(runner, canvases, drawing, schedule)
    times = schedule[:-1].tolist()
    evaluations = [canvas.guidance.evaluations(times) for canvas in canvases]
    effects: dict[int, Tensor] = {}

    def velocity(z_JNx: Tensor, step: int, t: float) -> Tensor:
        needed = [of_job[step].branches for of_job in evaluations]
        predicted = predictions.at(z_JNx, step, needed)
        v_JNx = torch.empty_like(z_JNx)
        remaining = max(1 - t, T_EPS)
        for job, (canvas, z_Nx, v_Nx) in enumerate(zip(canvases, z_JNx, v_JNx, strict=True)):
            evaluated = evaluations[job][step]
            velocities = {
                name: velocity_from_image(x_Nx, z_Nx, t, out=x_Nx)
                for name, x_Nx in predicted[job].items()
            }
            v_Nx.copy_(canvas.guidance.combine(velocities, step))
            if evaluated.keeps_effect:
                effects[job] = (v_Nx - velocities[COND]).mul_(remaining)
            elif evaluated.uses_effect:
                v_Nx.add_(effects[job], alpha=1 / remaining)
        return v_JNx

    return velocity
