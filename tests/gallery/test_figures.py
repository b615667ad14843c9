"""The figures of the report page are those of `sensebatch report`."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from sensebatch.gallery.figures import BINS, PHASES, failures, run_figures
from sensebatch.report.summary import summarise
from sensebatch.units import GIB
from tests.log_rows import log_row, log_table


def _log(*changes: dict[str, Any]) -> pa.Table:
    rows = [
        log_row(f"j{n}", f"b{n}", prefill_s=0.5, think_s=0.5, denoise_s=2.0, **change)
        for n, change in enumerate(changes)
    ]
    return log_table(*rows)


TWO: tuple[dict[str, Any], ...] = ({"queue_s": 0.0}, {"queue_s": 5.0, "wait_s": 1.0})


def test_totals_and_groups_are_those_of_the_summary() -> None:
    log = _log(*TWO)
    found, summary = run_figures(log), summarise(log)
    assert found["totals"]["images"] == summary.total.images == 2
    assert found["totals"]["seconds_per_image"] == summary.total.seconds_per_image
    (group,) = found["groups"]
    assert group["image_tok_per_s"] == summary.by_group[group["name"]].image_tok_per_s
    assert found["load_peak"]["reserved"] == 3 * GIB


def test_the_phases_of_a_timeline_add_up_to_the_time_of_the_batches() -> None:
    found = run_figures(_log(*TWO))
    (worker,) = found["workers"]
    assert dict(zip(PHASES, worker["seconds"], strict=True)) == pytest.approx(
        {"prefill": 1, "think": 1, "denoise": 4, "other": 2, "waiting": 1}
    )
    assert found["span_s"] == pytest.approx(9)
    drawn = sum(sum(shares) for shares in worker["bins"]) * found["bin_s"]
    assert drawn == pytest.approx(9, rel=0.01)
    assert max(sum(shares) for shares in worker["bins"]) <= 1.001


def test_images_a_minute_add_up_to_the_images() -> None:
    found = run_figures(_log(*TWO))
    assert len(found["images_per_minute"]) == BINS
    assert sum(found["images_per_minute"]) * found["bin_s"] / 60 == pytest.approx(2, rel=0.01)


def test_processes_follow_one_another_on_one_axis() -> None:
    found = run_figures(_log({"queue_s": 1.0, "session": 1}, {"queue_s": 2.0, "session": 4}))
    assert found["sessions"] == [{"number": 1, "start_s": 0.0}, {"number": 4, "start_s": 5.0}]
    assert found["span_s"] == 11.0


def test_each_worker_has_a_timeline() -> None:
    found = run_figures(_log({"worker": 0, "queue_s": 0.0}, {"worker": 1, "queue_s": 0.0}))
    assert [worker["name"] for worker in found["workers"]] == ["worker 0", "worker 1"]
    assert found["span_s"] == 4.0


def test_memory_is_the_highest_peak_of_each_time() -> None:
    found = run_figures(_log(*TWO))
    assert max(found["memory"]["reserved"]) == 6 * GIB
    # Nothing ran between the two batches.
    assert found["memory"]["reserved"][int(4.5 / found["bin_s"])] == 0


def test_the_longest_waits_come_first() -> None:
    found = run_figures(
        _log(
            {"queue_s": 0.0},
            {"queue_s": 5.0, "wait_s": 1.0},
            {"queue_s": 12.0, "wait_s": 3.0},
        )
    )
    assert [wait["wait_s"] for wait in found["waits"]] == [3.0, 1.0]


def test_an_empty_log_has_empty_figures() -> None:
    found = run_figures(_log())
    assert (found["workers"], found["groups"], found["span_s"]) == ([], [], 0.0)


def test_failures_are_counted_by_type_with_jobs_to_look_at() -> None:
    rows = [(f"j{n}", "JobError", f"message {n}") for n in range(7)]
    found = failures([*rows, ("k", "ValueError", "NaN")])
    assert [(one["type"], one["count"]) for one in found] == [("JobError", 7), ("ValueError", 1)]
    assert found[0]["jobs"] == ["j0", "j1", "j2", "j3", "j4"]
    assert found[1]["message"] == "NaN"
