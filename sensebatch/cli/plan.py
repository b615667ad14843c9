"""`sensebatch plan`: what a run would do, group by group. Loads no weights."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from sensebatch.cli.options import (
    BatchOptions,
    Limit,
    Manifests,
    ModelOptions,
    ReadingOptions,
    RowTask,
    flags_of,
)


def plan(
    manifests: Manifests,
    model: ModelOptions,
    batch: BatchOptions,
    reading: ReadingOptions,
    task: RowTask = None,
    limit: Limit = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Print how manifests are cut into batches, as if no job were done yet.

    If the checkpoint is on disk, also print what each memory mode needs on the GPU and the host, by
    group. If sensebatch doctor has measured a GPU, print the mode that auto chooses on it, and the
    least time that its speeds allow.
    """
    from sensebatch.cli.messages import show, warn, warn_of
    from sensebatch.cli.speed_cache import read_speeds
    from sensebatch.manifest.read import read_manifests
    from sensebatch.plan.batches import make_plan, plan_entry
    from sensebatch.plan.summary import long_prompts, memory_summary, plan_summary
    from sensebatch.settings import resolve_settings

    flags = flags_of(model, batch, reading)
    config = resolve_settings(config_file=model.config, flags=flags)
    machine, problem = (None, None) if config.model.device == "cpu" else read_speeds()
    if problem is not None:
        warn(problem)
    gpu = None if machine is None else machine.machine
    jobs = read_manifests(manifests, config, task=task, limit=limit, warn=warn_of)
    jobs = long_prompts(config, gpu, warn_of).watch(jobs)
    made = make_plan((plan_entry(job) for job in jobs), config.memory)
    summary = plan_summary(made) | {
        "memory": memory_summary(made, config, gpu),
        "machine": None if machine is None else machine.model_dump(),
    }
    if as_json:
        show(json.dumps(summary))
    else:
        from sensebatch.cli.plan_tables import print_plan

        print_plan(summary)
