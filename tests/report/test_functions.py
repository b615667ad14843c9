"""What functions of the user's said of images, from the log alone."""

from __future__ import annotations

from typing import Any

from sensebatch.report.functions import Opinion
from sensebatch.report.summary import format_summary, format_totals, summarise, summary_json
from tests.log_rows import log_row, log_table


def verdict(job_id: str, function: str, score: float | None) -> dict[str, Any]:
    shares = [] if score is None else [score, 1 - score]
    return log_row(
        job_id,
        job_id,
        task="ask",
        function=function,
        status="failed" if score is None else "done",
        num_images=0,
        choice_probabilities=shares,
    )


def test_a_report_has_a_line_for_each_function_beside_all_other_figures() -> None:
    rows = [
        log_row("a", "x"),
        verdict("a-sharp", "checks:sharp", 0.5),
        verdict("b-sharp", "checks:sharp", 1.0),
        verdict("a-clean", "checks:clean", None),
    ]
    summary = summarise(log_table(*rows))
    assert summary.functions == (
        Opinion(function="checks:clean", images=0, mean_score=None, failed=1),
        Opinion(function="checks:sharp", images=2, mean_score=0.75, failed=0),
    )
    lines = format_totals(summary).splitlines()
    assert lines[-3:] == [
        "function checks:clean: 0 images judged, 1 failed",
        "function checks:sharp: 2 images judged, mean score 0.750",
        "failed attempts 1",
    ]
    assert summary.total.jobs == 1
    assert summary_json(summary)["functions"][1]["function"] == "checks:sharp"


def test_without_functions_there_is_no_line() -> None:
    summary = summarise(log_table(log_row("a", "x")))
    assert summary.functions == ()
    assert "function" not in format_summary(summary)
