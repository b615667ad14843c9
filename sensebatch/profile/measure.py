"""Runs the cases of a suite, each in a process of its own, and reads what their logs say.

A process each, so that peaks, caps and the allocator's state are the case's own and a case that
fails takes no other with it. How a command line becomes a process is the caller's to say.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

import sensebatch
from sensebatch.plan.work import Speeds
from sensebatch.process import last_words
from sensebatch.profile.distances import with_distances
from sensebatch.profile.expected import with_expectation
from sensebatch.profile.figures import figures
from sensebatch.profile.rows import (
    DONE,
    FAILED,
    PARQUET_NAME,
    STOPPED,
    Row,
    read_rows,
    with_ratios,
    write_rows,
)
from sensebatch.profile.suites import Case, Scale, Suite, in_bytes, run_arguments, write_manifest
from sensebatch.store.files import unused
from sensebatch.store.log import read_log
from sensebatch.store.run_dir import RunDir
from sensebatch.units import counted

Launch = Callable[[Sequence[str], Path], int]
"""(arguments after `sensebatch`, file for what it says) -> exit code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What a suite asks of its caller."""

    launch: Launch
    """Runs a command line in a process of its own."""
    say: Callable[[str], None]
    """Receives a line for people before and after each case."""
    stopped: Callable[[], bool] = lambda: False
    """Whether to start no more cases; the one that was running has been stopped too."""
    finished: Callable[[Case], None] = lambda _: None
    """Receives each case that was run to its end."""


def run_suite(
    suite: Suite,
    cases: Iterable[Case],
    scale: Scale,
    folder: Path,
    *,
    hooks: Hooks,
    speeds: Mapping[str, Speeds] | None = None,
) -> list[Row]:
    """Runs cases, writes the results after each, and returns all rows of the folder.

    Rows of cases that are not run again stay. A case's run gets a folder that was not there
    before, so that no figure is of an earlier run. A case that is stopped has a row if it made
    images.

    Args:
        suite: Whose cases they are.
        cases: To run, in order.
        scale: How large they are.
        folder: Where runs and results go.
        hooks: What starts a case, and hears of it.
        speeds: What GPUs reach at most, by their names.

    Raises:
        RunFolderError: The folder holds results of another suite, or cannot be written.
    """
    rows = []
    if (folder / PARQUET_NAME).exists():
        rows = read_rows(folder, suite=suite)
    for case in cases:
        if hooks.stopped():
            break
        hooks.say(f"{case.name}: {case.setting or 'no memory options'}")
        row = _run_case(suite, case, scale, folder, hooks.launch, speeds or {})
        if hooks.stopped() and row.status != DONE:
            if not row.images:
                break
            row = replace(row, status=STOPPED, error="stopped before all its jobs were done")
        else:
            hooks.finished(case)
        hooks.say(_ending(row))
        by_name = {old.case: old for old in rows} | {row.case: row}
        rows = with_ratios(by_name.values())
        if suite is Suite.QUALITY:
            rows = with_distances(folder, rows)
        write_rows(folder, rows)
    return rows


def _ending(row: Row) -> str:
    if row.status != DONE:
        return f"{row.case}: {row.status}: {row.error}"
    if not row.images:
        jobs, text = (
            "-" if speed is None else f"{speed:,.2f}"
            for speed in (row.jobs_per_s, row.text_tok_per_s)
        )
        return f"{row.case}: {counted(row.jobs_done or 0, 'job')}, {jobs} jobs/s, {text} text tok/s"
    speed = "-" if row.image_tok_per_s is None else f"{row.image_tok_per_s:,.2f}"
    return f"{row.case}: {counted(row.images, 'image')}, {speed} image tok/s"


def _run_case(
    suite: Suite,
    case: Case,
    scale: Scale,
    folder: Path,
    launch: Launch,
    speeds: Mapping[str, Speeds],
) -> Row:
    root = unused(folder / case.name)
    manifest = write_manifest(case, scale, folder / "manifests")
    arguments = run_arguments(case, scale, manifest, root)
    row = Row(
        suite=suite.value,
        case=case.name,
        status=FAILED,
        task=case.what,
        think=case.think,
        width=case.resolution.width,
        height=case.resolution.height,
        num_steps=case.num_steps(scale),
        run_folder=root.name,
        num_jobs=case.num_jobs,
        scripted_tokens=scale.text_tokens if scale.scripted else None,
        model=scale.model,
        setting=case.setting,
        budget_bytes=in_bytes(case.device_gib),
        host_budget_bytes=in_bytes(case.host_gib),
        baseline=case.baseline,
        sensebatch_version=sensebatch.__version__,
        started_at=datetime.now(UTC),
        command=shlex.join(["sensebatch", *arguments]),
    )
    messages = root.with_name(f"{root.name}.stderr.txt")
    code = launch(arguments, messages)
    log_path = RunDir(root).log
    log = read_log(log_path) if log_path.exists() else None
    if log is not None and log.num_rows:
        row = replace(row, **figures(log, num_steps=row.num_steps))
        row = with_expectation(row, case, scale, manifest, speeds)
    if code == 0:
        return replace(row, status=DONE)
    return replace(row, error=_reason(log, messages, code))


def _reason(log: pa.Table | None, messages: Path, code: int) -> str:
    """Returns why a case failed: the first failed job's error, or the last line its run said."""
    if log is not None:
        failed = log.filter(pc.field("status") != DONE).slice(0, 1).to_pylist()
        if failed:
            return f"{failed[0]['job_id']}: {failed[0]['error_type']}: {failed[0]['error_message']}"
    return last_words(messages, code)
