"""The summary of a run, from its log alone: a table in, figures and text out.

A call is one batch through the engine. Each of its jobs' rows has the batch's seconds and peaks, so
they are counted once a call here and never summed over rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sensebatch.jobs import FinishReason
from sensebatch.report.functions import COLUMNS as OPINION_COLUMNS
from sensebatch.report.functions import Opinion, opinion_lines, opinions
from sensebatch.report.timeline import COLUMNS as TIMELINE_COLUMNS
from sensebatch.report.timeline import (
    Batch,
    Waiting,
    format_waiting,
    group_name,
    of_engines,
    timeline,
    waiting,
)
from sensebatch.report.workers import (
    Stint,
    WorkerShare,
    format_share,
    share_name,
    together_s,
    worker_shares,
)
from sensebatch.resolutions import PATCH_PIXELS
from sensebatch.store import log as run_log
from sensebatch.units import GIB, counted

_CALL = ["session", "worker", "batch_id", "started_at", "task", "width", "height", "think"]
"""Identical jobs make batches of the same id; no two of a worker start at the same time."""
_MOST = [
    "total_s",
    "num_kept_images",
    "step_s",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "peak_rss_bytes",
]
"""Figures of a call: the same in each of its rows, but for what a row's own job added."""
_SUM = ["num_images", "image_tokens"]
_TEXT = ["think_tokens", "text_tokens"]
_LOAD = [
    "load_s",
    "load_peak_allocated_bytes",
    "load_peak_reserved_bytes",
    "load_peak_rss_bytes",
]
_CONFIG = ["vram_mode", "attn_backend", "dtype", "precision"]
COLUMNS = sorted(
    {
        "job_id",
        "status",
        "finish_reason",
        *_CALL,
        *_MOST,
        *_SUM,
        *_TEXT,
        *_LOAD,
        *_CONFIG,
        *TIMELINE_COLUMNS,
        *OPINION_COLUMNS,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Peak bytes of device memory and of the process."""

    allocated_bytes: int
    reserved_bytes: int
    rss_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One batch that made images."""

    session: int
    batch_id: str
    task: str
    width: int | None
    height: int | None
    think: bool
    jobs: int
    """Jobs that were done; the batch may have had others."""
    images: int
    kept_images: int
    """Images that an interrupted batch had drawn, in none of these seconds."""
    image_tokens: int
    wall_s: float
    step_s: float | None
    """Seconds of a denoising step of the whole batch."""
    peak: Memory

    @property
    def group(self) -> str:
        """What a report calls the jobs of the call and those like them."""
        return group_name(self.task, self.width, self.height, think=self.think)


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """What a number of calls made, and how fast."""

    jobs: int
    calls: int
    images: int
    wall_s: float
    """Wall seconds of generation, over all calls."""
    kept_images: int
    """How many of `images` were drawn before what the log has of their calls."""
    calls_with_kept: int
    """Calls with such images; no speed is measured by them."""
    seconds_per_image: float | None
    image_tokens: int
    tokens_per_image: float | None
    image_tok_per_s: float | None
    """Image tokens divided by wall seconds of generation."""
    text_tokens: int
    """Think and interleave text; not part of the image figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a log says of a run, over all its sessions or one."""

    vram_mode: str
    attn_backend: str
    dtype: str
    precision: str
    """`-` if no weights are quantised; if those of some rows are, the dtype names the others."""
    sessions: int
    load_s: float
    """Seconds of all loads together; a session that found nothing to do has none."""
    load_peak: Memory
    total: Throughput
    peak: Memory
    failed_attempts: int
    finish_reasons: Mapping[str, int]
    """Done attempts by why their text ended; nothing of logs that do not say."""
    by_group: Mapping[str, Throughput]
    """The groups, by `group_name`."""
    waiting: Waiting | None
    """How long devices waited between batches; None if there was one batch, or the log is older."""
    workers: tuple[WorkerShare, ...]
    """What each worker did; nothing where there was only one."""
    together_s: float
    """Seconds from the first batch of each session to the end of its last, of any worker."""
    functions: tuple[Opinion, ...]
    """What functions of the user's said of images; in none of the other figures."""
    calls: tuple[Call, ...]
    """In the order they were committed."""


def read_log(path: Path) -> pa.Table:
    """Returns the columns of a `log.parquet` that the summary needs; see `store.log.read_log`.

    Raises:
        RunFolderError: There is no such file, or it is not a log.
    """
    return run_log.read_log(path, COLUMNS)


def summarise(log: pa.Table, *, session: int | None = None) -> Summary:
    """Returns the summary of a log.

    Args:
        log: `log.parquet` as a table.
        session: Only the rows of this session; None for all.
    """
    if session is not None:
        log = log.filter(pc.field("session") == session)
    failed_attempts = log.filter(pc.field("status") != "done").num_rows
    functions = opinions(log)
    log = of_engines(log)
    done = log.filter(pc.field("status") == "done")
    calls = _calls(done)
    by_group: dict[str, list[Call]] = {}
    for call in calls:
        by_group.setdefault(call.group, []).append(call)
    text_tokens, batches = _text_tokens(done), timeline(log)
    stints = [_stint(batch) for batch in batches]
    return Summary(
        vram_mode=_words(log["vram_mode"]),
        attn_backend=_words(log["attn_backend"]),
        dtype=_words(log["dtype"]),
        precision=_precisions(log),
        sessions=len(pc.unique(log["session"])),
        load_s=sum(
            log.group_by("session").aggregate([("load_s", "max")])["load_s_max"].to_pylist()
        ),
        load_peak=_peak(log, "load_peak_"),
        total=_throughput(calls, sum(text_tokens.values())),
        peak=_peak(done, "peak_"),
        failed_attempts=failed_attempts,
        finish_reasons=_finish_reasons(done),
        by_group={
            name: _throughput(members, text_tokens[name]) for name, members in by_group.items()
        },
        waiting=waiting(batches),
        workers=worker_shares(stints),
        together_s=together_s(stints),
        functions=functions,
        calls=tuple(calls),
    )


def _stint(batch: Batch) -> Stint:
    return Stint(
        session=batch.session,
        worker=batch.worker,
        node=batch.node,
        jobs=batch.jobs,
        images=batch.images,
        start_s=batch.start_s,
        busy_s=batch.total_s,
    )


def summary_json(summary: Summary) -> dict[str, Any]:
    """Returns the summary as plain data: seconds, bytes, tokens."""
    return asdict(summary)


def _words(column: pa.ChunkedArray) -> str:
    return ", ".join(sorted(word for word in pc.unique(column).to_pylist() if word)) or "-"


def _finish_reasons(done: pa.Table) -> dict[str, int]:
    counted = pc.value_counts(done["finish_reason"]).to_pylist()
    found = {count["values"]: count["counts"] for count in counted if count["values"]}
    return {reason: found[reason] for reason in sorted(found)}


def _precisions(log: pa.Table) -> str:
    found = log["precision"]
    if found.null_count == len(found):
        return "-"
    return _words(pc.coalesce(found, log["dtype"]))


def _peak(rows: pa.Table, prefix: str) -> Memory:
    def most(name: str) -> int:
        return pc.max(rows[f"{prefix}{name}_bytes"]).as_py() or 0

    return Memory(
        allocated_bytes=most("allocated"), reserved_bytes=most("reserved"), rss_bytes=most("rss")
    )


def _calls(done: pa.Table) -> list[Call]:
    sums = [("job_id", "count"), *((name, "sum") for name in _SUM)]
    figures = [(name, "max") for name in _MOST]
    # Groups come out in no order of their own.
    rows = done.append_column("row", pa.array(range(done.num_rows), pa.int64()))
    table = rows.group_by(_CALL).aggregate([*sums, *figures, ("row", "min")]).sort_by("row_min")
    return [
        Call(
            session=row["session"],
            batch_id=row["batch_id"],
            task=row["task"],
            width=row["width"],
            height=row["height"],
            think=row["think"],
            jobs=row["job_id_count"],
            images=row["num_images_sum"],
            kept_images=row["num_kept_images_max"] or 0,
            image_tokens=row["image_tokens_sum"],
            wall_s=row["total_s_max"],
            step_s=row["step_s_max"],
            peak=Memory(
                allocated_bytes=row["peak_allocated_bytes_max"],
                reserved_bytes=row["peak_reserved_bytes_max"],
                rss_bytes=row["peak_rss_bytes_max"],
            ),
        )
        for row in table.to_pylist()
    ]


def _text_tokens(done: pa.Table) -> dict[str, int]:
    sums = [(name, "sum") for name in _TEXT]
    table = done.group_by(["task", "width", "height", "think"]).aggregate(sums)
    return {
        group_name(row["task"], row["width"], row["height"], think=row["think"]): row[
            "think_tokens_sum"
        ]
        + row["text_tokens_sum"]
        for row in table.to_pylist()
    }


def _throughput(calls: Sequence[Call], text_tokens: int) -> Throughput:
    images = sum(call.images for call in calls)
    image_tokens = sum(call.image_tokens for call in calls)
    whole = [call for call in calls if not call.kept_images]
    drawn = sum(call.images for call in whole)
    drawn_s = sum(call.wall_s for call in whole)
    return Throughput(
        jobs=sum(call.jobs for call in calls),
        calls=len(calls),
        images=images,
        wall_s=sum(call.wall_s for call in calls),
        kept_images=sum(call.kept_images for call in calls),
        calls_with_kept=len(calls) - len(whole),
        seconds_per_image=drawn_s / drawn if drawn else None,
        image_tokens=image_tokens,
        tokens_per_image=image_tokens / images if images else None,
        image_tok_per_s=(
            sum(c.image_tokens for c in whole) / drawn_s if drawn and drawn_s else None
        ),
        text_tokens=text_tokens,
    )


def format_summary(summary: Summary) -> str:
    """Returns the published summary as text, in the published order: totals, then each call."""
    calls = (_call_line(number, call) for number, call in enumerate(summary.calls, start=1))
    return "\n".join([format_totals(summary), *calls])


def format_totals(summary: Summary) -> str:
    """Returns the published summary as text but for the calls."""
    total = summary.total
    lines = [
        f"config          vram_mode={summary.vram_mode}  attn_backend={summary.attn_backend}  "
        f"dtype={summary.dtype}"
        + ("" if summary.precision == "-" else f"  precision={summary.precision}"),
        f"model load      {summary.load_s:.3f} s",
        f"load peak       {_gib(summary.load_peak)}",
        f"generations     calls={total.calls}  images={total.images}  wall={total.wall_s:.3f} s",
        f"average         {_figure(total.seconds_per_image, '.3f')} s/image",
        f"image tokens    patch={PATCH_PIXELS}  average={_figure(total.tokens_per_image, '.1f')} "
        "per image",
        f"throughput      {_figure(total.image_tok_per_s, '.2f')} image tok/s",
        f"generation peak {_gib(summary.peak)}",
    ]
    if summary.waiting is not None:
        lines.append(f"waiting         {format_waiting(summary.waiting)}")
    if summary.workers:
        each = _figure((total.images and summary.together_s / total.images) or None, ".3f")
        workers = counted(len(summary.workers), "worker")
        lines.append(f"together        {workers}  {summary.together_s:.3f} s  {each} s/image")
    lines += [f"{share_name(share)}: {format_share(share)}" for share in summary.workers]
    if total.calls_with_kept:
        calls = counted(total.calls_with_kept, "call")
        lines.append(
            f"kept images     {total.kept_images} in {calls}, drawn earlier; left out of average "
            "and throughput"
        )
    truncated = [reason for reason in FinishReason if reason.is_truncated]
    if any(reason in summary.finish_reasons for reason in truncated):
        reasons = (f"{name}={count}" for name, count in summary.finish_reasons.items())
        lines.append(f"finish reasons  {'  '.join(reasons)}")
    lines += opinion_lines(summary.functions)
    if summary.failed_attempts:
        lines.append(f"failed attempts {summary.failed_attempts}")
    return "\n".join(lines)


def _call_line(number: int, call: Call) -> str:
    step = f"  {call.step_s:.3f} s/step" if call.step_s is not None else ""
    measured = call.wall_s and call.images and not call.kept_images
    speed = f"{call.image_tokens / call.wall_s:.2f}" if measured else "-"
    kept = f" ({call.kept_images} kept)" if call.kept_images else ""
    return (
        f"  call {number}: {call.group}  jobs={call.jobs}  "
        f"images={call.images}{kept}  {call.wall_s:.3f} s{step}  {speed} tok/s  "
        f"{_gib(call.peak)}"
    )


def _gib(memory: Memory) -> str:
    """Returns peaks in words; those of the device only where there was one."""
    rss = f"rss={memory.rss_bytes / GIB:.2f} GiB"
    if not memory.reserved_bytes:
        return rss
    return (
        f"allocated={memory.allocated_bytes / GIB:.2f} GiB  "
        f"reserved={memory.reserved_bytes / GIB:.2f} GiB  {rss}"
    )


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
