"""How tests say what to draw."""

from __future__ import annotations

from typing import Any

from sensebatch.engine.sampling.guidance import Guidance
from sensebatch.jobs import Drawing
from sensebatch.resolutions import Resolution


def drawing_of(
    guidance: Guidance,
    size: Resolution,
    *,
    num_steps: int = 2,
    timestep_shift: float = 3.0,
    **others: Any,
) -> Drawing:
    """Returns a drawing with the branches of a guidance."""
    return Drawing(
        resolution=size,
        num_steps=num_steps,
        timestep_shift=timestep_shift,
        branches=guidance.branches,
        **others,
    )
