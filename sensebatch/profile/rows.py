"""One row a case: what was set, what it cost, and how to do it again. To and from Parquet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sensebatch.errors import RunFolderError
from sensebatch.profile.suites import Suite
from sensebatch.store.columns import arrow_schema
from sensebatch.store.files import write_atomic

PARQUET_NAME = "profile.parquet"
DONE = "done"
FAILED = "failed"
STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What became of a case; figures are None where it did not get so far."""

    suite: str
    case: str
    status: str
    """`done`; `failed` where any of its jobs is not done; `stopped` where a signal ended it."""
    error: str | None = None
    task: str
    think: bool
    width: int
    height: int
    num_steps: int
    num_jobs: int
    evaluations: int | None = None
    psnr_db: float | None = None
    ssim: float | None = None
    run_folder: str | None = None
    scripted_tokens: int | None = None
    """Tokens of a thought or before an image, where weights are synthetic."""
    model: str
    setting: str
    budget_bytes: int | None = None
    host_budget_bytes: int | None = None
    baseline: str | None = None
    vram_mode: str | None = None
    dtype: str | None = None
    attn_backend: str | None = None
    device: str | None = None
    load_s: float | None = None
    compile_s: float | None = None
    load_peak_allocated_bytes: int | None = None
    load_peak_reserved_bytes: int | None = None
    load_peak_rss_bytes: int | None = None
    calls: int | None = None
    jobs_done: int | None = None
    images: int | None = None
    text_tokens: int | None = None
    wall_s: float | None = None
    wait_share: float | None = None
    rest_share: float | None = None
    limit_s: float | None = None
    step_s: float | None = None
    steady_step_s: float | None = None
    limit_step_s: float | None = None
    seconds_per_image: float | None = None
    image_tok_per_s: float | None = None
    steady_image_tok_per_s: float | None = None
    text_tok_per_s: float | None = None
    jobs_per_s: float | None = None
    steady_jobs_per_s: float | None = None
    ratio_to_baseline: float | None = None
    steady_ratio_to_baseline: float | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_rss_bytes: int | None = None
    expected_peak_bytes: int | None = None
    expected_ratio: float | None = None
    torch_version: str | None = None
    sensebatch_version: str
    started_at: datetime
    command: str


SCHEMA = arrow_schema(Row)
"""The columns, described one by one in docs/profile.md."""

_SAME = (
    "device",
    "torch_version",
    "model",
    "num_steps",
    "num_jobs",
    "scripted_tokens",
    "width",
    "height",
    "dtype",
)
"""What two cases must share for their speeds to be comparable."""


def with_ratios(rows: Iterable[Row]) -> list[Row]:
    """Returns the rows with ratios of speeds to baselines, and of estimates to peaks."""
    rows = list(rows)
    by_case = {row.case: row for row in rows}
    return [
        replace(
            row,
            ratio_to_baseline=_speed_ratio("image_tok_per_s", row, by_case),
            steady_ratio_to_baseline=_speed_ratio("steady_image_tok_per_s", row, by_case),
            expected_ratio=_ratio(row.expected_peak_bytes, row.peak_reserved_bytes),
        )
        for row in rows
    ]


def _speed_ratio(speed: str, row: Row, by_case: Mapping[str, Row]) -> float | None:
    baseline = by_case.get(row.baseline or "")
    if baseline is None or any(getattr(row, name) != getattr(baseline, name) for name in _SAME):
        return None
    return _ratio(getattr(row, speed), getattr(baseline, speed))


def _ratio(amount: float | None, per: float | None) -> float | None:
    return amount / per if amount and per else None


def write_rows(folder: Path, rows: Iterable[Row]) -> None:
    """Replaces the results in a folder."""
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomic(folder / PARQUET_NAME, sink.getvalue().to_pybytes())


def read_rows(folder: Path, *, suite: Suite | None = None) -> list[Row]:
    """Returns the results in a folder.

    Args:
        folder: Where they were written.
        suite: What they must be of; None for any.

    Raises:
        RunFolderError: There are none, they are not ours, or they are of another suite.
    """
    rows = read_file(folder / PARQUET_NAME)
    for row in rows:
        if suite is not None and row.suite != suite:
            raise RunFolderError(
                f"{folder}: expected results of suite {suite}, found those of {row.suite}; give "
                "another --output-dir"
            )
    return rows


def read_file(path: Path) -> list[Row]:
    """Returns the results in a file; columns that are younger than it are None.

    Raises:
        RunFolderError: There is no such file, or it is not one of ours.
    """
    names = {field.name for field in fields(Row)}
    try:
        return [
            Row(**{name: value for name, value in values.items() if name in names})
            for values in pq.read_table(path).to_pylist()
        ]
    except FileNotFoundError:
        raise RunFolderError(f"{path}: expected the results of a profile, found no file") from None
    except (OSError, pa.ArrowException, TypeError) as error:
        raise RunFolderError(f"{path}: expected the results of a profile: {error}") from None
