"""Which attention kernel is the fastest for the images of a run, by measurement. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sensebatch.plan.load import Load
from sensebatch.plan.passes import LONG_RUN

ALIKE = 1.03
"""Times that differ by less say nothing: a measurement is no more exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpeeds:
    """What the attention backends of a GPU were measured to reach."""

    gpu: str
    """Its name."""
    torch: str
    """The version it was measured with."""
    flop_per_s: Mapping[str, Mapping[int, float]]
    """By backend, and by the number of an image's tokens."""

    def speed(self, backend: str, image_tokens: int) -> float | None:
        """Returns what a backend reaches for images of about this size; None if not measured."""
        measured = self.flop_per_s.get(backend)
        if not measured:
            return None
        return measured[min(measured, key=lambda length: abs(math.log(length / image_tokens)))]

    def ranking(self, loads: Iterable[Load]) -> tuple[str, ...]:
        """Returns the backends that attend the images of a run, the fastest first.

        It is empty where none of the images is large enough for a backend. Of backends that are
        about as fast, those that are taken without a measurement come first.

        Args:
            loads: One for each group of the run.
        """
        seconds = dict.fromkeys(self.flop_per_s, 0.0)
        for load in loads:
            drawing, tokens = load.group.drawing, load.image_tokens
            if drawing is None or tokens < LONG_RUN:
                continue
            jobs = sum(count for _, count in load.demands) or load.batch_size
            keys = len(drawing.branches) * tokens + load.prefix_tokens
            work = jobs * drawing.num_steps * tokens * keys
            for backend in seconds:
                speed = self.speed(backend, tokens)
                seconds[backend] += math.inf if speed is None else work / speed
        if not any(seconds.values()):
            return ()
        least = min(seconds.values())
        return tuple(sorted(seconds, key=lambda name: max(seconds[name], ALIKE * least)))
