"""The published summary: each call counted once, however many rows it has."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensebatch.errors import RunFolderError
from sensebatch.report import GIB, format_summary, read_log, summarise, summary_json
from sensebatch.store.log import SCHEMA


def _row(job_id: str, batch_id: str, **changes: Any) -> dict[str, Any]:
    """Returns a row of the log: one 256x256 picture in a batch of 4 s on a GPU."""
    row: dict[str, Any] = {}
    for field in SCHEMA:
        if pa.types.is_string(field.type):
            row[field.name] = ""
        elif pa.types.is_list(field.type):
            row[field.name] = []
        elif pa.types.is_boolean(field.type):
            row[field.name] = False
        elif pa.types.is_timestamp(field.type):
            row[field.name] = datetime(2026, 1, 1, tzinfo=UTC)
        else:
            row[field.name] = 0
    row |= {
        "job_id": job_id,
        "batch_id": batch_id,
        "session": 1,
        "task": "t2i",
        "status": "done",
        "width": 256,
        "height": 256,
        "num_images": 1,
        "image_tokens": 64,
        "load_s": 3.0,
        "load_peak_allocated_bytes": 2 * GIB,
        "load_peak_reserved_bytes": 3 * GIB,
        "load_peak_rss_bytes": GIB,
        "total_s": 4.0,
        "step_s": 0.5,
        "peak_allocated_bytes": 5 * GIB,
        "peak_reserved_bytes": 6 * GIB,
        "peak_rss_bytes": GIB,
        "vram_mode": "full",
        "attn_backend": "sdpa",
        "dtype": "bfloat16",
    }
    return row | changes


def _log(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


TWO_CALLS = (
    _row("a", "x"),
    _row("b", "x"),
    _row("c", "y", task="interleave", num_images=3, image_tokens=192, total_s=8.0, text_tokens=20),
)


def test_batch_seconds_are_counted_once_for_all_its_jobs() -> None:
    total = summarise(_log(*TWO_CALLS)).total
    assert (total.calls, total.jobs, total.images, total.wall_s) == (2, 3, 5, 12.0)
    assert total.seconds_per_image == pytest.approx(12 / 5)
    assert total.image_tok_per_s == pytest.approx((64 + 64 + 192) / 12)
    assert total.text_tokens == 20


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_totals_do_not_depend_on_how_jobs_are_batched(sizes: list[int]) -> None:
    rows = [
        _row(f"{batch}-{job}", str(batch), total_s=float(size))
        for batch, size in enumerate(sizes)
        for job in range(size)
    ]
    total = summarise(_log(*rows)).total
    assert total.calls == len(sizes)
    assert total.images == sum(sizes)
    assert total.seconds_per_image == pytest.approx(1.0)


def test_failed_attempts_are_counted_apart() -> None:
    failed = _row("d", "x", status="failed", num_images=0, image_tokens=0)
    summary = summarise(_log(*TWO_CALLS, failed))
    assert summary.failed_attempts == 1
    assert summary.total == summarise(_log(*TWO_CALLS)).total


def test_each_session_loads_once_and_can_be_looked_at_alone() -> None:
    log = _log(*TWO_CALLS, _row("d", "x", session=2, load_s=5.0))
    assert summarise(log).load_s == pytest.approx(8.0)
    assert summarise(log).sessions == 2
    assert summarise(log).total.calls == 3
    alone = summarise(log, session=2)
    assert (alone.load_s, alone.total.calls) == (5.0, 1)


def test_peaks_are_the_highest_of_all_calls() -> None:
    higher = _row("d", "z", peak_allocated_bytes=9 * GIB, peak_rss_bytes=2 * GIB)
    peak = summarise(_log(*TWO_CALLS, higher)).peak
    assert (peak.allocated_bytes, peak.reserved_bytes) == (9 * GIB, 6 * GIB)
    assert peak.rss_bytes == 2 * GIB


def test_fields_stand_in_the_published_order() -> None:
    lines = format_summary(summarise(_log(*TWO_CALLS))).splitlines()
    assert [line[:15].strip() for line in lines[:8]] == [
        "config",
        "model load",
        "load peak",
        "generations",
        "average",
        "image tokens",
        "throughput",
        "generation peak",
    ]
    assert lines[0].split("  ", 1)[1].split() == [
        "vram_mode=full",
        "attn_backend=sdpa",
        "dtype=bfloat16",
    ]
    assert lines[2].endswith("allocated=2.00 GiB  reserved=3.00 GiB  rss=1.00 GiB")
    assert [line.strip().startswith("call ") for line in lines[8:]] == [True, True]
    assert "call 2: interleave 256x256  jobs=1  images=3  8.000 s" in lines[9]


def test_long_reports_are_cut_and_say_so() -> None:
    summary = summarise(_log(*(_row(str(i), str(i)) for i in range(5))))
    lines = format_summary(summary, max_calls=2).splitlines()
    assert lines[-1] == "  ... and 3 more calls"
    assert sum(line.startswith("  call ") for line in lines) == 2


def test_groups_are_by_task_and_size() -> None:
    groups = summarise(_log(*TWO_CALLS)).by_group
    assert list(groups) == ["t2i 256x256", "interleave 256x256"]
    assert (groups["t2i 256x256"].jobs, groups["interleave 256x256"].text_tokens) == (2, 20)


def test_log_without_rows_is_an_empty_summary() -> None:
    summary = summarise(_log())
    assert summary.total.seconds_per_image is None
    assert "average         - s/image" in format_summary(summary)
    assert summary_json(summary)["calls"] == ()


def test_log_is_read_from_the_columns_it_has(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(_log(*TWO_CALLS), path)
    assert summarise(read_log(path)) == summarise(_log(*TWO_CALLS))


@pytest.mark.parametrize("content", [None, b"", b"no parquet"])
def test_what_is_no_log_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "log.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunFolderError, match="expected the log of a run"):
        read_log(path)


def test_batches_of_identical_jobs_are_calls_of_their_own() -> None:
    later = datetime(2026, 1, 1, 0, 1, tzinfo=UTC)
    log = _log(_row("a", "x"), _row("b", "x"), _row("c", "x", started_at=later))
    total = summarise(log).total
    assert (total.calls, total.jobs, total.wall_s) == (2, 3, 8.0)
