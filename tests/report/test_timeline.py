"""What the device did when: each batch once, its waiting apart from its work."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sensebatch.report.summary import format_summary, read_log, summarise
from sensebatch.report.timeline import timeline, timeline_table, waiting, waiting_lines
from tests.log_rows import log_row, log_table

PHASES = {"prefill_s": 0.5, "think_s": 1.0, "denoise_s": 7.0, "total_s": 9.0}
NIGHT = log_table(
    log_row("c", "y", queue_s=10.0, wait_s=1.0, task="edit", **PHASES),
    log_row("a", "x", queue_s=0.25, wait_s=None, **PHASES),
    log_row("b", "x", queue_s=0.25, wait_s=None, **PHASES),
    log_row("d", "z", queue_s=20.0, wait_s=0.5, status="failed", num_images=0, **PHASES),
    log_row("e", "", status="failed", num_images=0) | {"batch_id": None},
)


def test_every_batch_is_one_line_in_the_order_of_the_run() -> None:
    batches = timeline(NIGHT)
    assert [(batch.batch_id, batch.jobs, batch.images) for batch in batches] == [
        ("x", 2, 2),
        ("y", 1, 1),
        ("z", 1, 0),
    ]
    assert [batch.wait_s for batch in batches] == [None, 1.0, 0.5]
    assert batches[0].other_s == pytest.approx(0.5)


def test_waiting_is_a_share_of_the_batches_that_it_is_known_of() -> None:
    found = waiting(timeline(NIGHT))
    assert found is not None
    assert (found.seconds, found.batches) == (1.5, 2)
    assert found.share == pytest.approx(1.5 / 19.5)
    assert waiting(timeline(NIGHT.slice(1, 2))) is None


def test_the_table_and_the_summary_say_the_share() -> None:
    titles, rows = timeline_table(timeline(NIGHT))
    assert (len(rows), titles[0], titles[-1]) == (3, "start\ns", "what")
    assert rows[0] == ["0.250", "-", "0.500", "1.000", "7.000", "0.500", "2", "2", "t2i 256x256"]
    said = "1.500 s before 2 batches (7.69% of their time)"
    assert waiting_lines(timeline(NIGHT)) == [f"waiting: {said}"]
    assert f"waiting         {said}" in format_summary(summarise(NIGHT)).splitlines()


def test_batches_of_one_worker_follow_one_another_and_each_has_its_share() -> None:
    log = log_table(
        log_row("a", "x", worker=0, queue_s=0.0, wait_s=None, **PHASES),
        log_row("b", "x", worker=1, queue_s=0.0, wait_s=None, **PHASES),
        log_row("c", "y", worker=1, queue_s=9.0, wait_s=1.0, **PHASES),
        log_row("d", "z", worker=0, queue_s=9.5, wait_s=2.0, **PHASES),
    )
    batches = timeline(log)
    assert [(batch.worker, batch.batch_id) for batch in batches] == [
        (0, "x"),
        (0, "z"),
        (1, "x"),
        (1, "y"),
    ]
    assert len(summarise(log).calls) == 4, "the same jobs on two workers are two calls"
    titles, rows = timeline_table(batches)
    assert titles[:2] == ["worker", "start\ns"]
    assert rows[3][:3] == ["1", "9.000", "1.000"]
    lines = waiting_lines(batches)
    said = [line.partition(" s before ")[0] for line in lines]
    assert said == [
        "waiting: 3.000",
        "waiting of worker 0: 2.000",
        "waiting of worker 1: 1.000",
    ]
    assert [line.rpartition(" (")[2] for line in lines] == [
        f"{share:.2%} of their time)" for share in (3 / 21, 2 / 11, 1 / 10)
    ]


def test_logs_of_versions_without_workers_are_those_of_one(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(NIGHT.drop_columns(["worker", "node"]), path)
    assert timeline(read_log(path)) == timeline(NIGHT)


def test_logs_without_the_column_are_read_and_say_nothing_of_waiting(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(NIGHT.drop_columns(["wait_s", "precision"]), path)
    log = read_log(path)
    assert [batch.wait_s for batch in timeline(log)] == [None, None, None]
    summary = summarise(log)
    assert (summary.waiting, summary.total.calls) == (None, 2)
    assert "waiting" not in format_summary(summary)
