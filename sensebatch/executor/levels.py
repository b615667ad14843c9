"""The plan of a run level by level: jobs that start from images of others come after those."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from sensebatch.config import MemoryConfig
from sensebatch.executor.deadline import Deadline
from sensebatch.jobs import GroupKey
from sensebatch.plan.batches import Plan, make_plan
from sensebatch.store.store import Store

Groups: TypeAlias = Iterable[Iterable[tuple[str, ...]]]
"""The batches of each group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """What a schedule is made of."""

    plan: Plan
    """Of all levels, as far as is known now."""
    groups: Groups
    """What may run at once."""
    later: Iterator[Groups]
    """The levels, where there are several; each is planned when all before it is through."""


def plan_levels(
    store: Store,
    memory: MemoryConfig,
    fitting: Callable[[GroupKey], int | None],
    deadline: Deadline,
) -> Levels:
    """Returns the plan of the jobs that are to be run.

    A level is cut into batches only when it is known which of its jobs are blocked. So it is cut
    alike, whether the run was interrupted before or not.

    Args:
        store: The run's folder, with the manifests ingested.
        memory: How many jobs are wanted in a batch.
        fitting: How many jobs of a group fit the device's memory; None for any number.
        deadline: Decides the order of batches.
    """
    plan = make_plan(store.state.entries(), memory, fitting)
    if not store.state.has_chains():
        groups = deadline.groups(plan, store.state.entries)
        return Levels(plan=plan, groups=groups, later=iter(()))

    def later() -> Iterator[Groups]:
        # Batches on record precede the first level as well: their jobs may be parents.
        before: set[str] = set()
        while True:
            store.state.settle_chains()
            to_come = min((entry.level for entry in store.state.entries()), default=None)
            if to_come is None:
                return
            entries = [entry for entry in store.state.entries() if entry.level == to_come]
            ids = {entry.id for entry in entries}
            if ids <= before:
                return
            before = ids
            yield deadline.groups(make_plan(entries, memory, fitting), store.state.entries)

    return Levels(plan=plan, groups=(), later=later())
