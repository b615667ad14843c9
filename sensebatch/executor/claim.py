"""Which batches of a manifest are a shard's own; decided once, when its folder is planned first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from sensebatch.config import OutputConfig, RunConfig
from sensebatch.jobs import GroupKey
from sensebatch.plan.batches import Plan, make_plan
from sensebatch.plan.speed import job_cost
from sensebatch.plan.workers import take_turns
from sensebatch.store.shards import Shard
from sensebatch.store.state import Counts
from sensebatch.store.store import Store
from sensebatch.units import counted


def claim_batches(
    store: Store,
    config: RunConfig,
    fitting: Callable[[GroupKey], int | None],
    note: Callable[[str], None],
) -> None:
    """Leaves the batches of other shards to them; does nothing in the folder of a whole run.

    Every shard makes the same plan and divides its batches alike, by what their images cost.

    Args:
        store: The run's folder, with the manifests ingested.
        config: How many jobs are wanted in a batch, and how images are written.
        fitting: How many jobs of a group fit the device's memory; None for any number.
        note: Takes what a person may want to know.
    """
    shard = store.state.shard()
    if shard is None or store.state.is_claimed():
        return
    plan = make_plan(store.state.whole_manifest(), config.memory, fitting)
    num_own = store.state.claim(
        [ids for group in plan.groups for ids in group.batches()],
        _owners(plan, shard),
        cut=", ".join(f"{group.group} in {group.batch_size}s" for group in plan.groups),
        output=_output_words(config.output),
    )
    num_jobs = store.state.counts().jobs
    note(
        f"{shard.words}: {num_jobs:,} of {counted(plan.num_jobs, 'job')}, in {num_own:,} of "
        f"{counted(plan.num_batches, 'batch')}"
    )


def expected_counts(store: Store, config: RunConfig) -> Counts:
    """Returns the counts of a folder; those of a shard before it is known which batches are its.

    How many jobs it then has is as if any number of them fitted the device's memory.
    """
    counts, shard = store.state.counts(), store.state.shard()
    if shard is None or store.state.is_claimed() or counts.held:
        return counts
    plan = make_plan(store.state.whole_manifest(), config.memory)
    batches = (ids for group in plan.groups for ids in group.batches())
    own = sum(
        len(ids)
        for ids, owner in zip(batches, _owners(plan, shard), strict=True)
        if owner == shard.number
    )
    return replace(counts, jobs=own, pending=own, elsewhere=counts.jobs - own)


def _owners(plan: Plan, shard: Shard) -> Iterator[int]:
    """Yields the shard that each batch of a plan belongs to, by what their images cost."""
    costs = (len(ids) * job_cost(group.group) for group in plan.groups for ids in group.batches())
    return (number + 1 for number, _ in take_turns(costs, shard.count))


def _output_words(output: OutputConfig) -> str:
    quality = "" if output.image_format == "png" else f" of quality {output.image_quality}"
    embedding = "with" if output.embed_metadata else "without"
    return f"{output.image_format}{quality} {embedding} metadata"
