"""Computations that can be paused, so that others run in between. Knows not what they compute."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Generic, TypeAlias, TypeVar

from sensebatch.engine.model.lockstep import Pass

T = TypeVar("T")

Steps: TypeAlias = Generator[None, None, T]
"""Yields after each step of a computation, and returns its result."""


def by_block(one: Pass[T]) -> Steps[T]:
    """Computes what a pass through the network does; each block that it goes through is a step."""
    lend, number = next(one)
    while True:
        with lend(number) as block:
            try:
                lend, number = one.send(block)
            except StopIteration as end:
                result: T = end.value
                break
        yield
    yield
    return result


def run_through(steps: Steps[T]) -> T:
    """Returns the result of a computation, without a pause."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


class Paced(Generic[T]):
    """A computation that is taken between the steps of another one, evenly.

    Args:
        steps: The computation.
        num_steps: How many steps it has.
    """

    def __init__(self, steps: Steps[T], num_steps: int) -> None:
        self._steps = steps
        self._left = num_steps
        self._results: list[T] = []

    def advance(self, num_calls: int) -> None:
        """Takes as many steps as are due.

        Args:
            num_calls: How many more calls are expected; after the last one there is nothing left.
        """
        due = math.ceil(self._left / (num_calls + 1))
        self._left -= due
        # The last call takes all that is left, whatever was expected.
        while not self._results and (due > 0 or num_calls <= 0):
            try:
                next(self._steps)
            except StopIteration as end:
                self._results.append(end.value)
            due -= 1

    def finish(self) -> T:
        """Returns the result, once, after the steps that are left."""
        self.advance(0)
        return self._results.pop()
