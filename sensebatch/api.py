"""The Python API, which `import sensebatch` exports; docs/python.md shows how to use it.

Jobs come from manifests or from rows in memory, by the same rules. A run is the same session that
the command line runs. Nothing here prints, handles signals or ends the process, and torch is
imported only when an engine is needed. Every error a user can fix is a `SensebatchError`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sensebatch.config import RunConfig, WorkersConfig, default_config
from sensebatch.contract import Stop
from sensebatch.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    EngineError,
    ManifestError,
    Problem,
    RunFolderError,
    RunStoppedError,
    SensebatchError,
    StoppedError,
    StorageFullError,
)
from sensebatch.executor.observer import Summary
from sensebatch.jobs import Job
from sensebatch.loading import TorchBackend
from sensebatch.manifest.read import read_manifests, read_rows
from sensebatch.plan import summary
from sensebatch.plan.batches import Plan, plan_entry
from sensebatch.plan.batches import make_plan as _make_plan
from sensebatch.session import Request, RunObserver, WarmEngine, run_session
from sensebatch.settings import resolve_settings
from sensebatch.store import finished, log, status
from sensebatch.store.acceptance import Verdict
from sensebatch.store.finished import FinishedJob
from sensebatch.store.run_dir import RunDir
from sensebatch.store.status import RunStatus
from sensebatch.tasks import Task

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "EngineError",
    "FinishedJob",
    "Job",
    "ManifestError",
    "Plan",
    "Problem",
    "RunConfig",
    "RunFolderError",
    "RunObserver",
    "RunStatus",
    "RunStoppedError",
    "SensebatchError",
    "Stop",
    "StoppedError",
    "StorageFullError",
    "Summary",
    "Task",
    "Verdict",
    "WarmEngine",
    "WorkersConfig",
    "configure",
    "finished_jobs",
    "iter_jobs",
    "make_jobs",
    "make_plan",
    "open_engine",
    "plan_summary",
    "read_jobs",
    "read_log",
    "read_status",
    "run",
]

AnyPath = str | os.PathLike[str]
Warn = Callable[[Problem], None]

_ROWS = "rows"
"""Stands for the file name of a manifest in messages about rows in memory."""


def configure(
    settings: Mapping[str, object] | None = None, *, file: AnyPath | None = None
) -> RunConfig:
    """Returns the settings of a run: the model's defaults < the file < `settings`.

    Args:
        settings: Values by place, such as `{"model.model": "tiny", "memory.max_batch_size": 4}`.
        file: A YAML configuration file, or the `run.yaml` of an earlier run.

    Raises:
        ConfigError: Some names are unknown or some values invalid; it lists all of them.
    """
    config_file = None if file is None else Path(file)
    return resolve_settings(config_file=config_file, flags=settings, dashed=False)


def iter_jobs(
    *manifests: AnyPath,
    config: RunConfig | None = None,
    task: Task | None = None,
    limit: int | None = None,
    warn: Warn | None = None,
) -> Iterator[Job]:
    """Yields the jobs of manifests one by one, for manifests that are too long for a list.

    Jobs are valid only once the iterator has ended: mistakes are raised at the end.

    Args:
        manifests: YAML, Parquet or JSONL files, whose ids must differ.
        config: Provides the defaults; those of the embedded checkpoint if None.
        task: The task of rows that name none.
        limit: The number of jobs to stop after.
        warn: Receives what is allowed but worth a look.

    Raises:
        ManifestError: Lists every mistake; raised at the end.
    """
    paths = [Path(path) for path in manifests]
    return read_manifests(paths, config or default_config(), task=task, limit=limit, warn=warn)


def read_jobs(
    *manifests: AnyPath,
    config: RunConfig | None = None,
    task: Task | None = None,
    limit: int | None = None,
    warn: Warn | None = None,
) -> list[Job]:
    """Returns the jobs of manifests; see `iter_jobs` for the arguments.

    Raises:
        ManifestError: Lists every mistake.
    """
    return list(iter_jobs(*manifests, config=config, task=task, limit=limit, warn=warn))


def make_jobs(
    rows: Iterable[Mapping[str, Any]],
    *,
    config: RunConfig | None = None,
    task: Task | None = None,
    base: AnyPath = "",
    warn: Warn | None = None,
) -> list[Job]:
    """Returns the jobs that rows describe, by the rules of a manifest.

    Args:
        rows: Fields as in a manifest (docs/manifest.md), including `n`, `seeds` and `matrix`.
        config: Provides the defaults; those of the embedded checkpoint if None.
        task: The task of rows that name none.
        base: The folder that relative image paths start from; the current one if empty.
        warn: Receives what is allowed but worth a look.

    Raises:
        ManifestError: Lists every mistake, with rows counted from 0.
    """
    path = Path(base) / _ROWS
    return list(read_rows(rows, config or default_config(), path=path, task=task, warn=warn))


def make_plan(jobs: Iterable[Job], *, config: RunConfig | None = None) -> Plan:
    """Returns which jobs would go through the network together, as if none were done."""
    memory = (config or default_config()).memory
    return _make_plan((plan_entry(job) for job in jobs), memory)


def plan_summary(plan: Plan, *, config: RunConfig | None = None) -> dict[str, Any]:
    """Returns a plan as `sensebatch plan --json` prints it: batches by group, and memory.

    `memory` lists what each memory mode needs on the GPU and the host, or only the mode that the
    settings leave; it is None for a model that is not on the disk.

    Raises:
        CheckpointError: The model's files cannot be read.
        ConfigError: The budget is too small, or no device has the precision with the other
            settings.
    """
    memory = summary.memory_summary(plan, config or default_config(), None)
    return summary.plan_summary(plan) | {"memory": memory}


def open_engine(config: RunConfig | None = None) -> WarmEngine:
    """Returns an engine that keeps its model loaded from run to run; close it after use.

    The first run that has something to do loads the weights.

    Args:
        config: Its model settings apply to every run that uses the engine.

    Raises:
        CheckpointError: The checkpoint, LoRA or prompt file cannot be used.
        ConfigError: The device cannot be used.
    """
    return WarmEngine(config or default_config(), TorchBackend())


def run(
    jobs: Iterable[Job],
    folder: AnyPath,
    *,
    config: RunConfig | None = None,
    engine: WarmEngine | None = None,
    observer: RunObserver | None = None,
    stop: Stop | None = None,
    redraw: bool = False,
    workers: WorkersConfig | None = None,
) -> Summary:
    """Runs the jobs that are not done yet in a folder, and returns what became of them.

    It may be called from any thread, and calls the observer from the same one.

    Args:
        jobs: All jobs of the folder, in order. Jobs of earlier runs that are not among them keep
            their files.
        folder: The run's folder; made if there is none.
        config: The run's settings; the engine's if None.
        engine: Computes, and keeps its weights afterwards; None loads them for this run only.
        observer: Watches the run.
        stop: Once it is set, the run finishes the current images and ends, and can be resumed;
            `threading.Event` is one.
        redraw: Whether finished jobs may be drawn again although only the model, its dtype or its
            precision has changed since; otherwise they are refused.
        workers: Workers in processes of their own, in place of one engine in this process.

    Raises:
        SensebatchError: Something the user can fix, raised before any job runs.
        EngineError: The engine is closed, in use, or holds another model.
        RunStoppedError: The disk is full, or the device failed; the same call resumes the run.
        StoppedError: The stop was set before any job ran.
    """
    if engine is not None and workers is not None:
        raise ConfigError("workers: expected no engine beside them; each loads one of its own")
    if config is None:
        config = default_config() if engine is None else engine.config
    if not isinstance(config, RunConfig):
        found = type(config).__name__
        raise ConfigError(f"config: expected what `configure` returns, found a {found}")
    request = Request(
        root=Path(folder),
        config=config,
        sources=(),
        jobs=lambda: _some(jobs),
        redraw=redraw,
        workers=workers,
    )
    with nullcontext() if engine is None else engine.held(config.model) as backend:
        return run_session(request, backend, observer=observer, stop=stop)


def _some(jobs: Iterable[Job]) -> Iterator[Job]:
    """Yields the jobs, and refuses an exhausted iterator, which would remove all jobs of a folder.

    Raises:
        ConfigError: There is no job.
    """
    count = 0
    for job in jobs:
        count += 1
        yield job
    if not count:
        raise ConfigError("jobs: expected at least one job, found none")


def finished_jobs(folder: AnyPath) -> Iterator[FinishedJob]:
    """Yields the jobs of a run's folder that are done, in order; works during a run.

    Rejected tries are among them: their `verdict` says so.

    Raises:
        RunFolderError: It is not a run's folder.
    """
    return finished.finished_jobs(Path(folder))


def read_log(folder: AnyPath) -> pa.Table:
    """Returns the log of a run's folder, with one row for each attempt (docs/log.md).

    Raises:
        RunFolderError: There is no log, or it cannot be read.
    """
    return log.read_log(RunDir(Path(folder)).log)


def read_status(folder: AnyPath) -> RunStatus:
    """Returns the progress of a run's folder: jobs by state, and failures; works during a run.

    Raises:
        RunFolderError: It is not a run's folder.
    """
    return status.read_status(Path(folder))
