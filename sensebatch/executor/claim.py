"""Which batches of a manifest are a shard's own; decided once, when its folder is planned first."""

from __future__ import annotations

from collections.abc import Callable

from sensebatch.config import OutputConfig, RunConfig
from sensebatch.jobs import GroupKey
from sensebatch.plan.batches import make_plan
from sensebatch.plan.speed import job_cost
from sensebatch.plan.workers import take_turns
from sensebatch.store.store import Store


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
    batches = [(group, ids) for group in plan.groups for ids in group.batches()]
    costs = (len(ids) * job_cost(group.group) for group, ids in batches)
    owners = (number + 1 for number, _ in take_turns(costs, shard.count))
    num_own = store.state.claim(
        [ids for _, ids in batches],
        owners,
        cut=", ".join(f"{group.group} in {group.batch_size}s" for group in plan.groups),
        output=_output_words(config.output),
    )
    num_jobs = store.state.counts().jobs
    note(
        f"{shard.words}: {num_jobs:,} of {plan.num_jobs:,} jobs, in {num_own:,} of "
        f"{plan.num_batches:,} batches"
    )


def _output_words(output: OutputConfig) -> str:
    quality = "" if output.image_format == "png" else f" of quality {output.image_quality}"
    embedding = "with" if output.embed_metadata else "without"
    return f"{output.image_format}{quality} {embedding} metadata"
