"""The figures of a run for the report page: totals, groups, and what happened over its time.

A table of the log in, plain data out. Seconds and bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sensebatch.report.summary import COLUMNS as SUMMARY_COLUMNS
from sensebatch.report.summary import Summary, summarise
from sensebatch.report.timeline import Batch, group_name, timeline
from sensebatch.units import GIB, counted, duration

BINS = 120
"""Parts that the time of a run is cut into."""
PHASES = ("prefill", "think", "denoise", "other", "waiting")
MEMORY = ("allocated", "reserved", "rss")
COLUMNS = tuple(SUMMARY_COLUMNS)
"""What a log must have."""

_MOST_WAITS = 8
EMPTY: Mapping[str, Any] = {
    "figures": [],
    "groups": [],
    "phases": list(PHASES),
    "sessions": [],
    "span_s": 0,
    "busy_s": 0,
    "bin_s": 0,
    "workers": [],
    "waits": [],
}
"""The figures of a run that has no log yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """The sessions of a run, one after the other on one axis."""

    starts: Mapping[int, float]
    """Seconds from the beginning of the axis, by the number of the session."""
    span_s: float

    @property
    def bin_s(self) -> float:
        """Seconds of a bin."""
        return self.span_s / BINS

    def at(self, batch: Batch) -> float:
        """Returns when a batch began."""
        return self.starts[batch.session] + batch.start_s

    def shares(self, start: float, seconds: float) -> Iterator[tuple[int, float]]:
        """Yields (bin, seconds in it) of a time."""
        if self.bin_s <= 0:
            return
        end = start + seconds
        place = max(int(start / self.bin_s), 0)
        while place < BINS and place * self.bin_s < end:
            inside = min(end, (place + 1) * self.bin_s) - max(start, place * self.bin_s)
            if inside > 0:
                yield place, inside
            place += 1


def run_figures(log: pa.Table) -> dict[str, Any]:
    """Returns the figures of a run's log; those of a run without rows are empty."""
    summary = summarise(log)
    batches = timeline(log)
    times = _times(batches)
    busy = sum(batch.total_s + (batch.wait_s or 0.0) for batch in batches)
    return {
        "figures": list(_totals(summary, times)),
        "totals": {
            "images": summary.total.images,
            "wall_s": summary.total.wall_s,
            "seconds_per_image": summary.total.seconds_per_image,
            "image_tok_per_s": summary.total.image_tok_per_s,
        },
        "groups": _groups(summary),
        "phases": list(PHASES),
        "sessions": [
            {"number": number, "start_s": start} for number, start in times.starts.items()
        ],
        "span_s": times.span_s,
        "busy_s": busy,
        "bin_s": times.bin_s,
        "workers": list(_workers(batches, times)),
        "images_per_minute": _speed(batches, times),
        "memory": _memory(log, batches, times),
        "load_peak": {name: getattr(summary.load_peak, f"{name}_bytes") for name in MEMORY},
        "waits": _waits(batches, times),
    }


def _totals(summary: Summary, times: Times) -> Iterator[Sequence[str]]:
    total = summary.total
    yield "Images", f"{total.images:,}", f"in {counted(total.calls, 'batch')}"
    yield "Generation", duration(total.wall_s), f"of {duration(times.span_s)} from start to end"
    if total.seconds_per_image is not None:
        yield "Seconds an image", f"{total.seconds_per_image:.3f}", "in the engine"
    if total.image_tok_per_s is not None:
        yield "Image tok/s", f"{total.image_tok_per_s:,.1f}", f"{total.image_tokens:,} tokens"
    if total.text_tokens:
        yield "Text tokens", f"{total.text_tokens:,}", "thoughts and stories"
    yield (
        "Model load",
        f"{summary.load_s:.1f} s",
        counted(summary.sessions, "process"),
    )
    if summary.peak.reserved_bytes:
        device = f"{summary.peak.allocated_bytes / GIB:.2f} GiB allocated"
        yield "Device memory", f"{summary.peak.reserved_bytes / GIB:.2f} GiB", device
    yield "Host memory", f"{summary.peak.rss_bytes / GIB:.2f} GiB", "resident at most"
    if summary.waiting is not None:
        batches = counted(summary.waiting.batches, "batch")
        waited = f"{summary.waiting.seconds:.2f} s before {batches}"
        yield "Waiting", f"{summary.waiting.share:.2%}", waited
    precision = "" if summary.precision == "-" else f", {summary.precision}"
    where = f"{summary.dtype}{precision}, {summary.attn_backend}"
    yield "Memory mode", summary.vram_mode, where
    if summary.failed_attempts:
        yield "Failed attempts", f"{summary.failed_attempts:,}", ""


def _groups(summary: Summary) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "jobs": group.jobs,
            "images": group.images,
            "calls": group.calls,
            "wall_s": group.wall_s,
            "seconds_per_image": group.seconds_per_image,
            "image_tok_per_s": group.image_tok_per_s,
        }
        for name, group in summary.by_group.items()
    ]


def _times(batches: Sequence[Batch]) -> Times:
    ends: dict[int, float] = {}
    for batch in batches:
        ends[batch.session] = max(ends.get(batch.session, 0.0), batch.start_s + batch.total_s)
    starts, now = {}, 0.0
    for session in sorted(ends):
        starts[session] = now
        now += ends[session]
    return Times(starts=starts, span_s=now)


def _workers(batches: Sequence[Batch], times: Times) -> Iterator[dict[str, Any]]:
    for worker in sorted({batch.worker for batch in batches}):
        bins = [[0.0] * len(PHASES) for _ in range(BINS)]
        seconds = [0.0] * len(PHASES)
        for batch in batches:
            if batch.worker != worker:
                continue
            at = times.at(batch)
            waited = batch.wait_s or 0.0
            parts = [batch.prefill_s, batch.think_s, batch.denoise_s, max(batch.other_s, 0.0)]
            spans = [(len(parts), at - waited, waited)]
            for phase, length in enumerate(parts):
                spans.append((phase, at, length))
                at += length
            for phase, start, length in spans:
                seconds[phase] += length
                for place, inside in times.shares(start, length):
                    bins[place][phase] += inside / times.bin_s
        yield {
            "name": f"worker {worker}",
            "bins": [_within_one(shares) for shares in bins],
            "seconds": seconds,
        }


def _within_one(shares: Sequence[float]) -> list[float]:
    """Returns shares of a bin that fill it at most; a wait may overlap the batch before it."""
    whole = max(sum(shares), 1.0)
    return [round(share / whole, 4) for share in shares]


def _speed(batches: Sequence[Batch], times: Times) -> list[float]:
    """Returns images a minute in each bin; a batch's images are spread over its time."""
    bins = [0.0] * BINS
    for batch in batches:
        for place, inside in times.shares(times.at(batch), batch.total_s):
            bins[place] += batch.images * inside / batch.total_s
    return [round(60 * images / times.bin_s, 3) for images in bins] if times.bin_s else bins


def _memory(log: pa.Table, batches: Sequence[Batch], times: Times) -> dict[str, list[int]]:
    """Returns the highest peak of each kind in each bin; 0 where nothing ran."""
    keys = ["session", "worker", "batch_id", "queue_s"]
    peaks = [f"peak_{name}_bytes" for name in MEMORY]
    table = log.group_by(keys).aggregate([(peak, "max") for peak in peaks])
    of_batch = {
        (row["session"], row["worker"] or 0, row["batch_id"], row["queue_s"]): [
            row[f"{peak}_max"] or 0 for peak in peaks
        ]
        for row in table.to_pylist()
    }
    bins = {name: [0] * BINS for name in MEMORY}
    for batch in batches:
        found = of_batch[batch.session, batch.worker, batch.batch_id, batch.start_s]
        for place, _ in times.shares(times.at(batch), batch.total_s):
            for name, peak in zip(MEMORY, found, strict=True):
                bins[name][place] = max(bins[name][place], peak)
    return bins


def _waits(batches: Sequence[Batch], times: Times) -> list[dict[str, Any]]:
    longest = sorted(
        (batch for batch in batches if batch.wait_s), key=lambda batch: -(batch.wait_s or 0.0)
    )
    return [
        {"name": _name(batch), "at_s": times.at(batch), "wait_s": batch.wait_s}
        for batch in longest[:_MOST_WAITS]
    ]


def _name(batch: Batch) -> str:
    """Returns what the page calls a batch."""
    group = group_name(batch.task, batch.width, batch.height, think=batch.think)
    return f"{group}, {counted(batch.jobs, 'job')}"


def failures(rows: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """Returns failed jobs by the type of their error, the most frequent first.

    Args:
        rows: (id, type, message) of each job that failed.
    """
    counts = Counter(kind for _, kind, _ in rows)
    return [
        {
            "type": kind,
            "count": count,
            "message": next(message for _, other, message in rows if other == kind),
            "jobs": [job_id for job_id, other, _ in rows if other == kind][:5],
        }
        for kind, count in counts.most_common()
    ]
