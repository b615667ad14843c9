"""Figures of a case are those of its log, with and without the first batch."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from sensebatch.profile.figures import figures
from tests.log_rows import log_row, log_table


def _batch(name: str, order: int, jobs: int, **changes: Any) -> list[dict[str, Any]]:
    started_at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=order)
    return [
        log_row(f"{name}{index}", name, started_at=started_at, **changes) for index in range(jobs)
    ]


FIRST = _batch("z", 1, 4, total_s=30.0, denoise_s=20.0, think_s=9.0, think_tokens=30)
SECOND = _batch("b", 2, 4, total_s=10.0, denoise_s=8.0, think_s=1.0, think_tokens=30)
THIRD = _batch("a", 3, 2, total_s=6.0, denoise_s=4.0, think_s=1.0, think_tokens=30)


def test_steady_figures_leave_out_the_batch_that_was_run_first() -> None:
    # The log holds batches in the order they were committed; the first is the one begun first.
    found = figures(log_table(*SECOND, *FIRST, *THIRD), num_steps=2)
    assert found["step_s"] == pytest.approx(32 / (10 * 2))
    assert found["steady_step_s"] == pytest.approx(12 / (6 * 2))
    assert found["image_tok_per_s"] == pytest.approx(10 * 64 / 46)
    assert found["steady_image_tok_per_s"] == pytest.approx(6 * 64 / 16)
    assert found["text_tok_per_s"] == pytest.approx(300 / 11)


def test_kept_images_count_for_no_speed() -> None:
    kept = _batch("c", 4, 2, total_s=1.0, denoise_s=1.0, num_kept_images=2)
    found = figures(log_table(*FIRST, *SECOND, *THIRD, *kept), num_steps=2)
    without = figures(log_table(*FIRST, *SECOND, *THIRD), num_steps=2)
    for name in ("step_s", "steady_step_s", "image_tok_per_s", "steady_image_tok_per_s"):
        assert found[name] == without[name]
    assert found["images"] == 12


def test_a_single_batch_has_no_steady_figures() -> None:
    found = figures(log_table(*FIRST), num_steps=2)
    assert found["step_s"] == pytest.approx(20 / (4 * 2))
    assert (found["steady_step_s"], found["steady_image_tok_per_s"]) == (None, None)


def test_jobs_that_made_nothing_have_no_speed() -> None:
    failed = [row | {"status": "failed", "num_images": 0, "image_tokens": 0} for row in FIRST]
    found = figures(log_table(*failed), num_steps=2)
    assert {found[name] for name in ("step_s", "image_tok_per_s", "text_tok_per_s")} == {None}
    assert "peak_reserved_bytes" not in found


def test_jobs_without_text_have_no_speed_of_text() -> None:
    rows = [row | {"think_tokens": 0, "think_s": 0.0} for row in FIRST]
    assert figures(log_table(*rows), num_steps=2)["text_tok_per_s"] is None


def test_the_rest_is_what_is_not_denoising_in_batches_between_the_first_and_the_last() -> None:
    batches = [*FIRST, *(row | {"wait_s": 2.0} for row in SECOND), *THIRD]
    assert figures(log_table(*batches), num_steps=2)["rest_share"] == pytest.approx(1 - 8 / 12)
    assert figures(log_table(*FIRST, *SECOND), num_steps=2)["rest_share"] is None
