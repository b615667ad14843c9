"""Rows of a log without a run."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from sensebatch.store.log import SCHEMA
from sensebatch.units import GIB


def log_row(job_id: str, batch_id: str, **changes: Any) -> dict[str, Any]:
    """Returns a row of the log: one 256x256 image in a batch of 4 s on a GPU."""
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
        "function": None,
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


def log_table(*rows: dict[str, Any]) -> pa.Table:
    """Returns rows as the log they would be."""
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)
