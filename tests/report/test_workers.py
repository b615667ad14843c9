"""What each worker did, from batches."""

from __future__ import annotations

from sensebatch.report.summary import format_totals, summarise
from sensebatch.report.workers import Stint, worker_shares
from tests.log_rows import log_row, log_table


def stint(worker: int, start_s: float, busy_s: float, *, session: int = 1, jobs: int = 1) -> Stint:
    return Stint(
        session=session,
        worker=worker,
        node="host",
        jobs=jobs,
        images=jobs,
        start_s=start_s,
        busy_s=busy_s,
    )


def test_a_worker_is_idle_while_others_work() -> None:
    long, short = worker_shares(
        [stint(0, 1.0, 4.0, jobs=3), stint(0, 5.0, 4.0), stint(1, 1.0, 2.0)]
    )
    assert (long.jobs, long.share, long.busy_s, long.idle_s) == (4, 0.8, 8.0, 0.0)
    assert (short.jobs, short.share, short.busy_s, short.idle_s) == (1, 0.2, 2.0, 6.0)
    assert short.idle_share == 0.75


def test_time_between_sessions_and_sessions_of_others_are_not_idle_time() -> None:
    _, second = worker_shares(
        [stint(0, 0.0, 9.0), stint(0, 0.0, 1.0, session=2), stint(1, 0.5, 0.5, session=2)]
    )
    assert second.idle_s == 0.5


def test_one_worker_has_no_share() -> None:
    assert worker_shares([stint(0, 0.0, 1.0), stint(0, 1.0, 1.0)]) == ()


def test_summary_has_a_line_for_each_of_several_workers() -> None:
    rows = [
        log_row("a", "x", worker=0, node="one", queue_s=0.0),
        log_row("b", "y", worker=0, node="one", queue_s=4.0),
        log_row("c", "z", worker=1, node="two", queue_s=0.0),
    ]
    lines = format_totals(summarise(log_table(*rows))).splitlines()
    assert "together        2 workers  8.000 s  2.667 s/image" in lines
    assert [line for line in lines if line.startswith("worker")] == [
        "worker 0 on one: 2 jobs (66.7%), idle 0.0%",
        "worker 1 on two: 1 job (33.3%), idle 50.0%",
    ]
