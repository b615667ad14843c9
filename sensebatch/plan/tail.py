"""In which order several workers are handed the batches of a group, so that they end together.

Pure. Only the order changes: which jobs share a batch is the plan's alone, and so is every byte.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from sensebatch.jobs import GroupKey
from sensebatch.plan.batches import Demand, GroupPlan, Plan, most_of

TEXT_STEP_TOKENS = 1000.0
"""Tokens of images that go through a network in the time of a decoding step, which all jobs of a
batch share: about so many on one H200, and on others within a few times of it."""
NEAR_BATCHES = 8
"""Batches for each worker that come after a group whose order no longer matters."""

Ids: TypeAlias = tuple[str, ...]


def batch_work(group: GroupKey, demands: Sequence[Demand]) -> float:
    """Returns what a batch is expected to take: tokens through the network, at most.

    Args:
        group: The batch's.
        demands: What its jobs take; at least one.
    """
    evaluations = 0 if group.drawing is None else group.drawing.cost
    of_image = group.image_tokens * evaluations
    text = TEXT_STEP_TOKENS * max(demand.text_tokens for demand in demands)
    return text + sum(one.prompt_tokens + one.max_images * of_image for one in demands)


def works(plan: GroupPlan) -> list[float]:
    """Returns the expected work of each batch of a group, in the plan's order."""
    known = [demand for demand, _ in plan.demands]
    size, worst = plan.batch_size, most_of(known)
    jobs = [known[kind] for kind in plan.kinds] or [worst] * len(plan.fresh)
    cut = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    return [batch_work(plan.group, one) for one in (*cut, *([worst] for _ in plan.alone))]


def handed_out(plan: Plan, num_workers: int) -> Iterable[Iterable[Ids]]:
    """Returns the batches of each group in the order in which workers are given them.

    In a group whose batches are not alike, those with the most expected work come first if the
    last batch of the plan is then through earlier; jobs that failed before stay last.

    Args:
        plan: The plan.
        num_workers: At least one; alone, it takes everything in the plan's order.
    """
    orders = _orders(plan.groups, num_workers) if num_workers > 1 else {}
    return (
        group.batches() if order is None else _in_order(group, order)
        for group, order in ((group, orders.get(n)) for n, group in enumerate(plan.groups))
    )


def _in_order(group: GroupPlan, order: Sequence[int]) -> Iterator[Ids]:
    batches = list(group.batches())
    return (batches[place] for place in order)


def _orders(groups: Sequence[GroupPlan], num_workers: int) -> dict[int, list[int]]:
    """Returns the places of batches in the order of their work, for groups that gain by it."""
    first = _first_near(groups, num_workers)
    near = {number: works(groups[number]) for number in range(first, len(groups))}
    if all(_falls(of_group) for of_group in near.values()):
        return {}
    free = [0.0] * num_workers
    _hand_out(free, (work for group in groups[:first] for work in works(group)))
    best = _end(free, near.values())
    found: dict[int, list[int]] = {}
    for number in reversed(near):
        num_fresh = len(near[number]) - len(groups[number].alone)
        order = sorted(range(num_fresh), key=near[number].__getitem__, reverse=True)
        order += range(num_fresh, len(near[number]))
        other = {**near, number: [near[number][place] for place in order]}
        if (end := _end(free, other.values())) < best:
            best, near, found[number] = end, other, order
    return found


def _first_near(groups: Sequence[GroupPlan], num_workers: int) -> int:
    """Returns the first group that is so near to the end that its order matters."""
    num_after = 0
    for number in reversed(range(len(groups))):
        if num_after >= NEAR_BATCHES * num_workers:
            return number + 1
        num_after += groups[number].num_batches
    return 0


def _falls(of_group: Sequence[float]) -> bool:
    return all(before >= after for before, after in itertools.pairwise(of_group))


def _end(free: Sequence[float], near: Iterable[Iterable[float]]) -> float:
    """Returns when the last batch is through if workers are free at some moments."""
    ends = list(free)
    _hand_out(ends, (work for of_group in near for work in of_group))
    return max(ends)


def _hand_out(free: list[float], batches: Iterable[float]) -> None:
    """Gives each batch to the worker that is free first; changes when they are free."""
    heapq.heapify(free)
    for work in batches:
        heapq.heapreplace(free, free[0] + work)
