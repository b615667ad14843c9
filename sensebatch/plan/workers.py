"""Which of several workers takes which batch, and when it ends. Pure: costs in, numbers out.

The rule is that of the executor: batches in their order, each to the worker that is free first. It
divides a manifest into shards, and says what several workers take and how far they come.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator


def take_turns(costs: Iterable[float], num_workers: int) -> Iterator[tuple[int, float]]:
    """Yields (worker, end) of each batch: who takes it, and the cost until it is through.

    Workers are numbered from 0; of those that are free first, the lowest number takes a batch.

    Args:
        costs: Of each batch, in the order they are handed out; all in one unit, such as seconds.
        num_workers: At least one.
    """
    free: list[tuple[float, int]] = [(0, number) for number in range(num_workers)]
    for cost in costs:
        since, number = free[0]
        heapq.heapreplace(free, (since + cost, number))
        yield number, since + cost
