"""Classifier-free guidance: which branches a step needs, and how they become one velocity.

One job at a time; numbers only. Shape suffixes: N tokens of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sensebatch.jobs import CfgNorm, Sampling
from sensebatch.tasks import Branch, Task

COND, IMG_COND, UNCOND = Branch.COND, Branch.IMG_COND, Branch.UNCOND
NORM_EPS = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a step of one job evaluates."""

    branches: tuple[Branch, ...]
    keeps_effect: bool
    """Whether the effect of guidance on the predicted image is used again by later steps."""
    uses_effect: bool
    """Whether the effect that was kept last is added to the conditional velocity."""


class Guidance:
    """The guidance rule of one job.

    Args:
        task: Its row says which branches there are and whether the interval is closed.
        sampling: Scales, rescaling and interval.
    """

    def __init__(self, task: Task, sampling: Sampling) -> None:
        drawing = task.spec.drawing
        assert drawing is not None, task
        self._rule = drawing.guidance
        self._scale = sampling.cfg_scale
        self._image_scale = sampling.img_cfg_scale
        self._norm = sampling.cfg_norm
        self._stride = sampling.guidance_stride
        # Schedules are float32, so an end that is meant to lie on a timestep must be rounded alike.
        low, high = (float(np.float32(end)) for end in sampling.cfg_interval)
        self._interval = low, high
        self.branches = self._rule.branches(sampling.cfg_scale, sampling.img_cfg_scale)
        """Every branch that some step may need."""

    def active(self, t: float) -> bool:
        """Whether guidance is applied at timestep t, a number of float32."""
        low, high = self._interval
        if len(self.branches) == 1:
            return False
        if self._rule.closed:
            return low <= t <= high
        return low < t < high or low == 0

    def evaluations(self, times: Sequence[float]) -> list[Evaluation]:
        """Returns what each step evaluates and whether it uses the effect of guidance again.

        Args:
            times: The timestep of each step.
        """
        steps, num_guided = [], 0
        for index, t in enumerate(times):
            active = self.active(t)
            fresh = active and num_guided % self._stride == 0
            # The step at which `cfg_zero_star` stands still has no effect to use again.
            stands = index == 0 and self._norm is CfgNorm.CFG_ZERO_STAR
            num_guided += active and not stands
            steps.append(
                Evaluation(
                    branches=self.branches if fresh else (COND,),
                    keeps_effect=fresh and self._stride > 1,
                    uses_effect=active and not fresh,
                )
            )
        return steps

    def combine(self, velocities: Mapping[Branch, Tensor], step: int) -> Tensor:
        """Returns the velocity `[N, 3072]` from those of all branches, all float32.

        Args:
            velocities: Velocity of each branch that the step evaluates.
            step: The index of the step; `cfg_zero_star` does not move at the first.

        Source: SenseNova-U1 release; CFG-Zero* (arXiv 2503.18886) with one zeroed step.
        """
        cond = velocities[COND]
        if len(velocities) == 1:
            return cond
        if self._norm is CfgNorm.CFG_ZERO_STAR:
            return self._zero_star(cond, velocities[UNCOND], step)
        guided = self._mix(velocities)
        if self._norm is CfgNorm.NONE:
            return guided
        dim = None if self._norm is CfgNorm.GLOBAL else -1
        cond_norm = torch.linalg.vector_norm(cond, dim=dim, keepdim=True)
        guided_norm = torch.linalg.vector_norm(guided, dim=dim, keepdim=True)
        return guided * (cond_norm / (guided_norm + NORM_EPS)).clamp(0, 1)

    def _mix(self, velocities: Mapping[Branch, Tensor]) -> Tensor:
        cond = velocities[COND]
        if self.branches == (COND, UNCOND):
            uncond = velocities[UNCOND]
            return uncond + self._scale * (cond - uncond)
        img_cond = velocities[IMG_COND]
        if self.branches == (COND, IMG_COND):
            return img_cond + self._scale * (cond - img_cond)
        uncond = velocities[UNCOND]
        return uncond + self._scale * (cond - img_cond) + self._image_scale * (img_cond - uncond)

    def _zero_star(self, cond: Tensor, uncond: Tensor, step: int) -> Tensor:
        if step == 0:
            return torch.zeros_like(cond)
        alpha = (cond * uncond).sum() / (uncond.square().sum() + NORM_EPS)
        towards = alpha * uncond
        return (cond - towards).mul_(self._scale).add_(towards)
