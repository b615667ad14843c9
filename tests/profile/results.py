"""Results of cases without running any."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from sensebatch.profile.rows import Row
from sensebatch.units import GIB


def result(case: str, **changes: Any) -> Row:
    """Returns the row of a case of suite `modes` that was done on some GPU."""
    row = Row(
        suite="modes",
        case=case,
        status="done",
        task="t2i",
        think=False,
        width=2048,
        height=2048,
        num_steps=50,
        num_jobs=8,
        model="synthetic:8b",
        setting=f"--vram-mode {case}",
        baseline="full",
        vram_mode=case,
        dtype="bfloat16",
        attn_backend="sdpa",
        device="a GPU",
        load_s=30.0,
        compile_s=4.0,
        load_peak_allocated_bytes=32 * GIB,
        load_peak_reserved_bytes=33 * GIB,
        load_peak_rss_bytes=5 * GIB,
        calls=2,
        jobs_done=8,
        images=8,
        text_tokens=2400,
        wall_s=160.0,
        limit_s=120.0,
        step_s=0.375,
        steady_step_s=0.25,
        limit_step_s=0.222,
        seconds_per_image=20.0,
        image_tok_per_s=204.8,
        steady_image_tok_per_s=300.0,
        text_tok_per_s=96.0,
        peak_allocated_bytes=34 * GIB,
        peak_reserved_bytes=35 * GIB,
        peak_rss_bytes=6 * GIB,
        expected_peak_bytes=34 * GIB,
        torch_version="2.0",
        sensebatch_version="0.1.0",
        started_at=datetime(2026, 1, 1, tzinfo=UTC),
        command=f"sensebatch run {case}.yaml",
    )
    return replace(row, **changes)
