"""`sensebatch plan`: what a run would do, group by group. Loads no weights."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sensebatch.cli.options import (
    BatchOptions,
    ForecastOptions,
    Limit,
    Manifests,
    ModelOptions,
    ReadingOptions,
    RowTask,
    flags_of,
)

if TYPE_CHECKING:
    from sensebatch.functions import AcceptFunction
    from sensebatch.jobs import Job
    from sensebatch.plan.batches import Plan

clock = time.time
"""Says what time it is; one name to stop at in tests."""


def plan(
    manifests: Manifests,
    model: ModelOptions,
    batch: BatchOptions,
    reading: ReadingOptions,
    forecasting: ForecastOptions,
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

    now = clock()
    forecasting.at(now)
    flags = flags_of(model, batch, reading)
    config = resolve_settings(config_file=model.config, flags=flags)
    machine, problem = (None, None) if config.model.device == "cpu" else read_speeds()
    if problem is not None:
        warn(problem)
    gpu = None if machine is None else machine.machine
    jobs = read_manifests(manifests, config, task=task, limit=limit, warn=warn_of)
    jobs = long_prompts(config, gpu, warn_of).watch(jobs)
    noted = _Noted()
    made = make_plan(map(plan_entry, noted.drawn(jobs)), config.memory)
    noted.warn_of_unused(config.accept)
    memory = memory_summary(made, config, gpu)
    found = _forecast(made, noted.ids, memory, forecasting, now)
    summary = plan_summary(made) | {
        "memory": memory,
        "machine": None if machine is None else machine.model_dump(),
        "forecast": found,
        "functions": dict(noted.judged),
        "from_tries": noted.from_tries,
    }
    if as_json:
        show(json.dumps(summary))
    else:
        from sensebatch.cli.plan_tables import print_plan

        print_plan(summary, *_forecast_lines(found, forecasting, now))


def _is_wanted(forecasting: ForecastOptions) -> bool:
    return any(one is not None for one in asdict(forecasting).values())


def _forecast(
    plan: Plan,
    ids: Sequence[str],
    memory: Sequence[Mapping[str, Any]] | None,
    forecasting: ForecastOptions,
    now: float,
) -> dict[str, Any] | None:
    """Returns how long the plan takes and how far it comes; None if nobody asked or can say."""
    from sensebatch.cli.forecast import forecast_summary

    if not _is_wanted(forecasting):
        return None
    until = forecasting.at(now)
    return forecast_summary(
        plan,
        ids,
        memory,
        workers=forecasting.workers or 1,
        available_s=None if until is None else until - now,
        speed_of=forecasting.speed_of,
    )


def _forecast_lines(
    found: Mapping[str, Any] | None,
    forecasting: ForecastOptions,
    now: float,
) -> Iterator[str]:
    from sensebatch.cli.forecast import forecast_lines, unknown_line

    if not _is_wanted(forecasting):
        return
    if found is None:
        asked = [name for name, one in asdict(forecasting).items() if one is not None]
        yield unknown_line([f"--{name.replace('_', '-')}" for name in asked])
    else:
        yield from forecast_lines(found, forecasting.at(now))


class _Noted:
    """What is noted of jobs beside their plan."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        """Those of the jobs that a model does, in their order."""
        self.judged: Counter[str] = Counter()
        """Images that the user's functions judge, by function."""
        self.from_tries: list[tuple[str, str]] = []
        """Jobs that start from a try, and that try."""
        self._tries: set[str] = set()

    def warn_of_unused(self, functions: Sequence[AcceptFunction]) -> None:
        """Warns of functions if they judge no image."""
        from sensebatch.cli.messages import warn
        from sensebatch.functions import unused_words

        if functions and not self.judged:
            warn(unused_words(functions))

    def drawn(self, jobs: Iterable[Job]) -> Iterator[Job]:
        """Yields the jobs that a model does."""
        for job in jobs:
            if job.attempt_at is not None:
                self._tries.add(job.id)
            if job.verdict is None and self._tries and job.images:
                parents = (image.output[0] for image in job.images if image.output)
                self.from_tries += [(job.id, one) for one in parents if one in self._tries]
            if job.judged_by is None:
                self.ids.append(job.id)
                yield job
            else:
                self.judged[job.judged_by.function] += 1
