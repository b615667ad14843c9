"""The plan of a run level by level: jobs that start from images of others come after those."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sensebatch.config import RunConfig
from sensebatch.executor.deadline import Deadline
from sensebatch.executor.schedule import Groups
from sensebatch.jobs import GroupKey
from sensebatch.plan.batches import Plan, make_plan
from sensebatch.store.store import Store
from sensebatch.store.tables import Span

MIN_FULL_BATCHES = 2
"""Full batches that the first tries of each lane fill, or else there is one lane."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """What a schedule is made of."""

    plan: Plan
    """The plan of all levels, as far as is known now."""
    groups: Groups
    """What may run at once."""
    later: tuple[Iterator[Groups], ...]
    """The levels, where there are several; each is planned when all before it is through. Jobs
    that have nothing to do with each other may be in lanes, of which each has levels of its own."""


def plan_levels(
    store: Store,
    config: RunConfig,
    fitting: Callable[[GroupKey], int | None],
    deadline: Deadline,
    num_workers: int = 1,
    *,
    draws: bool = True,
) -> Levels:
    """Returns the plan of the jobs that are to be run.

    A level is cut into batches only when it is known which of its jobs are blocked. So it is cut
    alike, whether the run was interrupted before or not. Where many series of tries are drawn, half
    of them are in a lane of their own: the verdicts on one half are asked for, and what they decide
    is planned, while the other half is drawn.

    Args:
        store: The run's folder, with the manifests ingested.
        config: How many jobs are wanted in a batch, and whether rejected images stay.
        fitting: How many jobs of a group fit the device's memory; None for any number.
        deadline: Decides the order of batches.
        num_workers: How many workers are handed them.
        draws: Whether there is an engine. If not, a lane ends before the first level of which
            functions do not do every job.
    """
    memory, keep_rejected = config.memory, config.output.keep_rejected
    plan = make_plan(store.state.entries(), memory, fitting)
    if not store.state.has_chains():
        groups = deadline.groups(plan, store.state.entries, num_workers)
        return Levels(plan=plan, groups=groups, later=())

    def later(span: Span) -> Iterator[Groups]:
        # Batches on record precede the first level as well: their jobs may be parents.
        before: set[str] = set()
        while True:
            store.settle(span, keep_rejected=keep_rejected)
            to_come = min((entry.level for entry in store.state.entries(span)), default=None)
            if to_come is None:
                return
            entries = [entry for entry in store.state.entries(span) if entry.level == to_come]
            ids = {entry.id for entry in entries}
            if ids <= before:
                return
            if not draws and not all(entry.group.by_function for entry in entries):
                return
            before = ids
            level = make_plan(entries, memory, fitting)
            yield deadline.groups(level, store.state.entries, num_workers)

    # Neither how far a run is nor how many workers it has may decide what shares a batch.
    spans = store.state.lanes(MIN_FULL_BATCHES * memory.max_batch_size)
    return Levels(plan=plan, groups=(), later=tuple(map(later, spans)))
