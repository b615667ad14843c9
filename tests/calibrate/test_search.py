"""The search for timesteps, against brute force on a flow whose velocities are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sensebatch.calibrate.search import StepErrors, best_timesteps
from sensebatch.calibrate.trace import Trace
from sensebatch.jobs import Solver

TIMES = np.array([0.0, 0.05, 0.15, 0.3, 0.4, 0.6, 0.7, 0.9, 1.0])
VELOCITIES = np.stack([np.sin(9 * TIMES[:-1] ** 2), np.exp(-3 * TIMES[:-1])], axis=1)
"""Of an image of two numbers, at each timestep but the last."""
TRACE = Trace(times=TIMES, products=VELOCITIES @ VELOCITIES.T)


def _way(start: int, end: int) -> np.ndarray:
    return np.diff(TIMES)[start:end] @ VELOCITIES[start:end]


def _error(path: tuple[int, ...], solver: Solver) -> float:
    """Returns the sum of the errors of a schedule's steps, step by step."""
    total = 0.0
    for index, (start, end) in enumerate(itertools.pairwise(path)):
        step = TIMES[end] - TIMES[start]
        taken = step * VELOCITIES[start]
        if solver is Solver.AB2 and index:
            before = path[index - 1]
            share = step / (2 * (TIMES[start] - TIMES[before]))
            taken = step * ((1 + share) * VELOCITIES[start] - share * VELOCITIES[before])
        total += float(np.linalg.norm(_way(start, end) - taken))
    return total


@pytest.mark.parametrize("solver", [Solver.EULER, Solver.AB2])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 8])
def test_the_schedule_is_the_best_of_all(num_steps: int, solver: Solver) -> None:
    inner = range(1, len(TIMES) - 1)
    every = [(0, *path, 8) for path in itertools.combinations(inner, num_steps - 1)]
    least = min(_error(path, solver) for path in every)
    found = best_timesteps(TRACE, num_steps, solver)
    assert len(found) == num_steps - 1
    path = (0, *(int(np.argmin(np.abs(TIMES - t))) for t in found), 8)
    assert list(found) == [TIMES[place] for place in path[1:-1]]
    assert _error(path, solver) == pytest.approx(least, abs=1e-6)


def test_steps_backwards_and_of_no_length_are_never_taken() -> None:
    errors = StepErrors(TRACE)
    forwards = np.arange(9)[None, :] > np.arange(8)[:, None]
    assert (np.isfinite(errors.euler()) == forwards).all()
    assert np.isinf(errors.multistep(3)[:, :4]).all()
    assert np.isfinite(errors.multistep(3)[:, 4:]).all()


def test_where_the_velocity_changes_most_the_steps_are_shortest() -> None:
    times = np.linspace(0, 1, 41)
    sudden = np.stack([np.ones(40), np.tanh((times[:-1] - 0.8) * 30)], axis=1)
    found = best_timesteps(Trace(times=times, products=sudden @ sudden.T), 8, Solver.EULER)
    assert sum(0.65 <= t <= 0.95 for t in found) >= 5
