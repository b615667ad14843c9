"""Runs the cases of a suite, each in a process of its own, and reads what their logs say.

A process each, so that peaks, caps and the allocator's state are the case's own and a case that
fails takes no other with it. How a command line becomes a process is the caller's to say.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc

import sensebatch
from sensebatch.checkpoint.files import open_checkpoint
from sensebatch.checkpoint.system_prompts import resolve_system_prompts
from sensebatch.config import RunConfig
from sensebatch.manifest.read import read_manifest
from sensebatch.plan import group_load, make_plan, plan_entry
from sensebatch.profile.rows import (
    DONE,
    FAILED,
    PARQUET_NAME,
    Row,
    read_rows,
    with_ratios,
    write_rows,
)
from sensebatch.profile.suites import Case, Scale, Suite, run_arguments, write_manifest
from sensebatch.report import summarise
from sensebatch.settings import resolve_settings
from sensebatch.store.log import read_log
from sensebatch.store.run_dir import RunDir
from sensebatch.vram import GIB, Placement, place

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

Launch = Callable[[Sequence[str], Path], int]
"""(arguments behind `sensebatch`, file for what it says) -> exit code."""


def run_suite(
    suite: Suite,
    cases: Iterable[Case],
    scale: Scale,
    folder: Path,
    *,
    launch: Launch,
    say: Callable[[str], None],
) -> list[Row]:
    """Runs cases, writes the results behind each, and returns all rows of the folder.

    Rows of cases that are not run again stay. A case's run gets a folder that was not there
    before, so that no figure is of an earlier run.

    Args:
        suite: Whose cases they are.
        cases: To run, in order.
        scale: How large they are.
        folder: Where runs and results go.
        launch: Runs a command line in a process of its own.
        say: Receives a line for people before and after each case.

    Raises:
        RunFolderError: The folder holds results of another suite, or cannot be written.
    """
    rows = []
    if (folder / PARQUET_NAME).exists():
        rows = read_rows(folder, suite=suite)
    for case in cases:
        say(f"{case.name}: {case.setting or 'no memory options'}")
        row = _run_case(suite, case, scale, folder, launch)
        say(_ending(row))
        by_name = {old.case: old for old in rows} | {row.case: row}
        rows = with_ratios(by_name.values())
        write_rows(folder, rows)
    return rows


def _ending(row: Row) -> str:
    if row.status == FAILED:
        return f"{row.case}: failed: {row.error}"
    speed = "-" if row.image_tok_per_s is None else f"{row.image_tok_per_s:,.2f}"
    return f"{row.case}: {row.images} images, {speed} image tok/s"


def _run_case(suite: Suite, case: Case, scale: Scale, folder: Path, launch: Launch) -> Row:
    root = _new_folder(folder, case.name)
    manifest = write_manifest(case, scale, folder / "manifests")
    arguments = run_arguments(case, scale, manifest, root)
    row = Row(
        suite=suite.value,
        case=case.name,
        status=FAILED,
        task=case.task.value,
        think=case.think,
        width=case.resolution.width,
        height=case.resolution.height,
        num_steps=scale.num_steps,
        num_jobs=case.num_jobs,
        model=scale.model,
        setting=case.setting,
        budget_bytes=_bytes(case.device_gib),
        host_budget_bytes=_bytes(case.host_gib),
        baseline=case.baseline,
        sensebatch_version=sensebatch.__version__,
        started_at=datetime.now(UTC),
        command=shlex.join(["sensebatch", *arguments]),
    )
    messages = root.with_name(f"{root.name}.stderr.txt")
    code = launch(arguments, messages)
    log = read_log(RunDir(root)) if RunDir(root).log.exists() else None
    if log is not None and log.num_rows:
        row = replace(row, **_figures(log, scale), **_expected(case, scale, manifest, log))
    if code == 0:
        return replace(row, status=DONE)
    return replace(row, error=_reason(log, messages, code))


def _bytes(gib: int | None) -> int | None:
    return None if gib is None else gib * GIB


def _new_folder(folder: Path, name: str) -> Path:
    """Returns `name` in a folder, or `name-2` and so on: the first that is not there."""
    number = 1
    while (path := folder / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


def _reason(log: pa.Table | None, messages: Path, code: int) -> str:
    """Returns why a case is no success: the first failed job's error, or the run's last words."""
    if log is not None:
        failed = log.filter(pc.field("status") != DONE).slice(0, 1).to_pylist()
        if failed:
            return f"{failed[0]['job_id']}: {failed[0]['error_type']}: {failed[0]['error_message']}"
    said = messages.read_text(encoding="utf-8", errors="replace") if messages.exists() else ""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1] if lines else 'it said nothing'}"


def _figures(log: pa.Table, scale: Scale) -> dict[str, Any]:
    """Returns what a log says of a case; a step's seconds are those of one picture's step."""
    summary = summarise(log)
    total, made = summary.total, log.filter(pc.field("status") == DONE)
    by_call = made.group_by(["session", "batch_id"]).aggregate([("denoise_s", "max")])
    denoise_s = sum(by_call["denoise_s_max"].to_pylist())
    last = log.slice(log.num_rows - 1).to_pylist()[0]
    figures = {
        "vram_mode": summary.vram_mode,
        "dtype": summary.dtype,
        "attn_backend": summary.attn_backend,
        "device": last["device"],
        "torch_version": last["torch_version"],
        "load_s": summary.load_s,
        "load_peak_allocated_bytes": summary.load_peak.allocated_bytes,
        "load_peak_reserved_bytes": summary.load_peak.reserved_bytes,
        "load_peak_rss_bytes": summary.load_peak.rss_bytes,
        "calls": total.calls,
        "jobs_done": total.jobs,
        "images": total.images,
        "text_tokens": total.text_tokens,
        "wall_s": total.wall_s,
        "step_s": denoise_s / (total.images * scale.num_steps) if total.images else None,
        "seconds_per_image": total.seconds_per_image,
        "image_tok_per_s": total.image_tok_per_s,
    }
    if total.calls:
        figures |= {f"peak_{name}": value for name, value in asdict(summary.peak).items()}
    return figures


def _expected(case: Case, scale: Scale, manifest: Path, log: pa.Table) -> dict[str, Any]:
    """Returns the device bytes that the arithmetic expects, if that placement was the one used."""
    flags = {
        "model.model": scale.model,
        "memory.vram_mode": case.vram_mode,
        "memory.vram_budget_bytes": _bytes(case.device_gib),
        "memory.host_budget_bytes": _bytes(case.host_gib),
    }
    config = resolve_settings(flags=flags)
    placement = _placement(config, manifest, log["dtype"][0].as_py())
    same = set(log["vram_mode"].to_pylist()) == {placement.mode}
    return {"expected_peak_bytes": placement.device_bytes if same else None}


def _placement(config: RunConfig, manifest: Path, dtype: str) -> Placement:
    checkpoint = open_checkpoint(config.model.model)
    prompts = resolve_system_prompts(checkpoint).by_task.values()
    plan = make_plan((plan_entry(job) for job in read_manifest(manifest, config)), config.memory)
    longest = max(len(prompt.text.encode()) for prompt in prompts)
    return place(
        checkpoint.architecture,
        config.memory,
        [group_load(group, system_prompt_bytes=longest) for group in plan.groups],
        item_bytes=ITEM_BYTES[dtype],
        device_free=None,
        host_free=psutil.virtual_memory().available,
    )
