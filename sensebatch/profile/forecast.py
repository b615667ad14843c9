"""How long a suite takes: at least as long as the plan says, and with what was measured so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sensebatch.errors import ConfigError
from sensebatch.plan.work import Speeds
from sensebatch.profile.expected import expectation
from sensebatch.profile.suites import Case, Scale, write_manifest
from sensebatch.units import counted, duration

DTYPE = "bfloat16"
"""What a GPU takes if nothing else is said."""


class Forecast:
    """The seconds of a suite's cases, before and while it is run.

    Args:
        cases: In order.
        scale: How large they are.
        folder: The suite's; the cases' manifests are written there.
        speeds: What a GPU reaches at most, by its name; empty where none was measured.
        has_gpu: Whether the cases run on a GPU, which `sensebatch doctor` can measure.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        scale: Scale,
        folder: Path,
        speeds: Mapping[str, Speeds],
        clock: Callable[[], float] = time.monotonic,
        *,
        has_gpu: bool = True,
    ) -> None:
        self._has_gpu = has_gpu
        self._gpu = next(iter(speeds), None)
        self._least = {
            case.name: _least_seconds(case, scale, folder, speeds[self._gpu]) if self._gpu else None
            for case in cases
        }
        self._done: list[str] = []
        self._clock = clock
        self._start = clock()

    @property
    def left(self) -> list[str]:
        """The cases that were not run to their end."""
        return [name for name in self._least if name not in self._done]

    def before(self) -> str:
        """Returns a line that says how long the suite takes at least."""
        count = counted(len(self._least), "case")
        if not self._has_gpu:
            return f"{count}; how long they take is known for GPUs alone"
        if self._gpu is None:
            return f"{count}; sensebatch doctor measures what is needed to say how long they take"
        known = self._known(self._least)
        if not known:
            return f"{count}; a plan knows no seconds for what they compute with"
        words = f"{count}, at least {duration(sum(known.values()))} on {self._gpu} besides loading"
        each = ", ".join(f"{name} {duration(seconds)}" for name, seconds in known.items())
        return f"{words}: {each}" if len(known) > 1 else words

    def after(self, case: Case) -> str:
        """Returns a line that says how far the suite is, after a case."""
        self._done.append(case.name)
        elapsed = self._clock() - self._start
        words = f"{len(self._done)} of {len(self._least)} cases after {duration(elapsed)}"
        left, done = self._known(self.left), self._known(self._done)
        if not left or not done:
            return words
        # Loading and whatever else the plan does not count, in proportion to what it does.
        remaining = elapsed * sum(left.values()) / sum(done.values())
        return f"{words}, about {duration(remaining)} left"

    def _known(self, names: Sequence[str] | Mapping[str, object]) -> dict[str, float]:
        found = {name: self._least[name] for name in names}
        return {name: seconds for name, seconds in found.items() if seconds is not None}


def _least_seconds(case: Case, scale: Scale, folder: Path, speeds: Speeds) -> float | None:
    """Returns a case's least seconds; None where the plan knows none, or it does not fit."""
    manifest = write_manifest(case, scale, folder / "manifests")
    try:
        expected = expectation(case, scale.model, manifest, DTYPE)
    except ConfigError:
        return None
    limits = expected.limits(speeds, with_text=scale.scripted)
    return None if limits is None else limits[0]
