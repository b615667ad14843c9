"""Finds the timesteps with the least error for a number of steps. Pure: arrays in, numbers out."""

from __future__ import annotations

import numpy as np

from sensebatch.calibrate.trace import Trace
from sensebatch.jobs import Solver


def best_timesteps(trace: Trace, num_steps: int, solver: Solver) -> tuple[float, ...]:
    """Returns the timesteps between 0 and 1 of the schedule with the least error.

    The error of a step is the length of what it misses of the way that the recorded velocities
    lead, and a schedule's error is the sum over its steps: dynamic programming over the recorded
    timesteps finds the least. That an error grows or shrinks on its further way is left out, so a
    verdict on other images has to follow.

    Args:
        trace: Of images drawn with many steps.
        num_steps: Steps of the schedule, fewer than recorded.
        solver: `euler` or `ab2`.
    """
    errors = StepErrors(trace)
    places = _euler_path(errors, num_steps)
    if solver is Solver.AB2:
        places = _multistep_path(errors, num_steps)
    return tuple(float(trace.times[place]) for place in places[1:-1])


class StepErrors:
    """The error of every step between two recorded timesteps.

    Args:
        trace: What was recorded.
    """

    def __init__(self, trace: Trace) -> None:
        self.times = trace.times
        lengths = np.diff(trace.times)
        own = trace.products
        # The way from 0 to each timestep is a sum of velocities by lengths.
        self._way_by_velocity = np.vstack(
            [np.zeros(len(lengths)), np.cumsum(lengths[:, None] * own, 0)]
        )
        by_way = np.cumsum(self._way_by_velocity * lengths, 1)
        self._way_by_way = np.hstack([np.zeros((len(lengths) + 1, 1)), by_way])
        self._velocity = own

    @property
    def num_places(self) -> int:
        """How many timesteps there are, 0 and 1 included."""
        return len(self.times)

    def euler(self) -> np.ndarray:
        """Returns the error of a step from i to j at `[i, j]`, infinite unless i < j."""
        rows = []
        for start in range(self.num_places - 1):
            steps = self.times - self.times[start]
            squared = (
                self._way(start)
                - 2 * steps * self._way_with(start, start)
                + steps**2 * self._velocity[start, start]
            )
            rows.append(_error(squared, start))
        return np.stack(rows)

    def multistep(self, start: int) -> np.ndarray:
        """Returns the error of an Adams-Bashforth step from `start` to j after p at `[p, j]`."""
        befores = np.arange(start)
        with_befores = np.stack([self._way_with(start, before) for before in range(start)])
        steps = self.times[None, :] - self.times[start]
        share = steps / (2 * (self.times[start] - self.times[befores]))[:, None]
        squared = (
            self._way(start)[None, :]
            - 2 * steps * (1 + share) * self._way_with(start, start)[None, :]
            + 2 * steps * share * with_befores
            + (steps * (1 + share)) ** 2 * self._velocity[start, start]
            - 2 * steps**2 * (1 + share) * share * self._velocity[start, befores][:, None]
            + (steps * share) ** 2 * self._velocity[befores, befores][:, None]
        )
        return _error(squared, start)

    def _way(self, start: int) -> np.ndarray:
        """Returns the squared length of the way from a timestep to each."""
        ways = self._way_by_way
        return np.diagonal(ways) - 2 * ways[start] + ways[start, start]

    def _way_with(self, start: int, place: int) -> np.ndarray:
        """Returns the product of the way from a timestep to each with the velocity at a place."""
        ways = self._way_by_velocity[:, place]
        return ways - ways[start]


def _error(squared: np.ndarray, start: int) -> np.ndarray:
    """Returns errors from their squares; infinite for what does not lead forwards from `start`."""
    error = np.sqrt(np.maximum(squared, 0))
    error[..., : start + 1] = np.inf
    return error


def _euler_path(errors: StepErrors, num_steps: int) -> list[int]:
    """Returns the places of the schedule with the least sum of errors of Euler's steps."""
    cost = errors.euler()
    last = errors.num_places - 1
    best = np.full(last + 1, np.inf)
    best[0] = 0.0
    came_from = []
    for _ in range(num_steps):
        through = best[:last, None] + cost
        came_from.append(np.argmin(through, 0))
        best = np.min(through, 0)
    return _walk_back(came_from, last)


def _walk_back(came_from: list[np.ndarray], last: int) -> list[int]:
    path = [last]
    for sources in reversed(came_from):
        path.append(int(sources[path[-1]]))
    return path[::-1]


def _multistep_path(errors: StepErrors, num_steps: int) -> list[int]:
    """Returns the places of the schedule with the least sum of errors of Adams-Bashforth steps.

    The error of a step depends on where the one before began, so a state is the last two places.
    """
    count = errors.num_places
    cost = {start: errors.multistep(start) for start in range(1, count - 1)}
    # The first step is Euler's.
    best = np.full((count, count), np.inf)
    best[0] = errors.euler()[0]
    came_from = []
    for _ in range(num_steps - 1):
        following = np.full((count, count), np.inf)
        source = np.zeros((count, count), dtype=np.int64)
        for start, of_start in cost.items():
            through = best[:start, start, None] + of_start
            source[start] = np.argmin(through, 0)
            following[start] = np.min(through, 0)
        came_from.append(source)
        best = following
    path = [count - 1, int(np.argmin(best[:, count - 1]))]
    for source in reversed(came_from):
        path.append(int(source[path[-1], path[-2]]))
    return path[::-1]
