"""Solvers of the flow from noise (t = 0) to image (t = 1): how a step follows from velocities.

A solver knows neither the network nor guidance: it integrates the velocity function that it is
given, evaluates it once a step, and keeps its state in float32. Everything about it is fixed
beforehand, so an image does not depend on what is drawn beside it. Shape suffixes: J jobs, N tokens
of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from sensebatch.engine.sampling.flow_matching import T_EPS
from sensebatch.jobs import Solver

Velocity: TypeAlias = Callable[[Tensor, int, float], Tensor]
"""(z_JNx, step index, t) -> v_JNx, a tensor of the caller's own"""

Integrate: TypeAlias = Callable[[Tensor, Sequence[float], Sequence[float], Velocity], Tensor]
"""(z_JNx, timesteps, lengths of the steps, velocity) -> z_JNx, changed in place"""


def integrate(z_JNx: Tensor, schedule: Tensor, velocity: Velocity, solver: Solver) -> Tensor:
    """Integrates from the schedule's first timestep to its last, in place, and returns `z_JNx`.

    Args:
        z_JNx: float32 noise as tokens; becomes the image, so that the noise takes no extra memory.
        schedule: Timesteps, float32 `[num_steps + 1]`.
        velocity: Returns the guided velocity of all jobs at a step.
        solver: How a step is taken.
    """
    steps = (schedule[1:] - schedule[:-1]).tolist()
    return SOLVERS[solver](z_JNx, schedule.tolist(), steps, velocity)


def euler(
    z_JNx: Tensor, times: Sequence[float], steps: Sequence[float], velocity: Velocity
) -> Tensor:
    """Takes every step with the velocity at its beginning: first order.

    Source: the sampling loop of the SenseNova-U1 release.
    """
    for index, step in enumerate(steps):
        z_JNx += step * velocity(z_JNx, index, times[index])
    return z_JNx


def adams_bashforth(
    z_JNx: Tensor, times: Sequence[float], steps: Sequence[float], velocity: Velocity
) -> Tensor:
    """Takes every step with the line through its velocity and the one before: second order.

    The first step is Euler's. Steps need not be equally long.

    Source: Adams-Bashforth with two steps, in its form for variable steps (Hairer, Nørsett and
    Wanner, Solving Ordinary Differential Equations I, III.5).
    """
    before: Tensor | None = None
    for index, step in enumerate(steps):
        v_JNx = velocity(z_JNx, index, times[index])
        if before is None:
            z_JNx += step * v_JNx
        else:
            share = step / (2 * steps[index - 1])
            z_JNx.add_(v_JNx, alpha=step * (1 + share)).add_(before, alpha=-step * share)
        before = v_JNx
    return z_JNx


def dpm_solver(
    z_JNx: Tensor, times: Sequence[float], steps: Sequence[float], velocity: Velocity
) -> Tensor:
    """Takes every step with the line through its predicted image and the one before.

    The line is drawn over the logarithm of t / (1 - t). The first two steps and one that ends at
    t = 1 are Euler's, because that logarithm is infinite at both ends.

    Source: DPM-Solver++ (2M), arXiv 2211.01095, with alpha = t and sigma = 1 - t.
    """
    before: Tensor | None = None
    for index, step in enumerate(steps):
        t, end = times[index], times[index + 1]
        v_JNx = velocity(z_JNx, index, t)
        # The image that the velocity leads to.
        x_JNx = z_JNx.add(v_JNx, alpha=max(1 - t, T_EPS))
        z_JNx.add_(v_JNx, alpha=step)
        if before is not None and index > 1 and end < 1:
            share = _log_ratio(t, end) / (2 * _log_ratio(times[index - 1], t))
            weight = share * step / max(1 - t, T_EPS)
            z_JNx.add_(x_JNx, alpha=weight).add_(before, alpha=-weight)
        before = x_JNx
        # The next step's evaluation has the memory of this velocity.
        del v_JNx, x_JNx
    return z_JNx


def _log_ratio(start: float, end: float) -> float:
    """Returns by how much the logarithm of t / (1 - t) grows, both ends between 0 and 1."""
    return math.log(end / (1 - end)) - math.log(start / (1 - start))


SOLVERS: Mapping[Solver, Integrate] = {
    Solver.EULER: euler,
    Solver.AB2: adams_bashforth,
    Solver.DPM2M: dpm_solver,
}
"""What integrates, by the name of the setting."""
