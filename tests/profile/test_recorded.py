"""The memory arithmetic compared with peaks that were measured on GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from sensebatch.errors import ConfigError
from sensebatch.plan.computation import Computation, gpu_computation
from sensebatch.profile import expected
from sensebatch.profile.expected import Expectation, expectation
from sensebatch.profile.rows import DONE, Row, read_file
from sensebatch.profile.suites import Scale, Suite, chosen_cases, suite_cases, write_manifest
from sensebatch.resolutions import Resolution
from sensebatch.units import GIB
from tests.profile.results import result

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "docs" / "measured"
LOWEST, HIGHEST = 0.97, 1.10
"""What is expected, by what was reserved or resident."""
BLOCK_BYTES = 0.36 * GIB
"""Bytes of a layer: under a budget, the arithmetic of today may keep one more or less on the device
than when it was measured."""


PACKED_SINCE = datetime(2026, 11, 28, 23, 34, tzinfo=UTC)
"""When weights that text goes through came to be packed in host memory."""


def without_packing(*args: Any) -> Computation:
    return replace(gpu_computation(*args), packs=False)


def recomputed(row: Row) -> Expectation:
    """Returns what the arithmetic says today of a case that was measured before.

    Args:
        row: Of a case that was run, so that its dtype is known.

    Raises:
        ConfigError: The suite has no such case any more, or one with other options; or it does
            not fit its budget.
    """
    assert row.dtype is not None
    scale = Scale(
        model=row.model,
        num_steps=row.num_steps,
        num_jobs=row.num_jobs,
        resolution=Resolution(height=row.height, width=row.width),
    )
    if row.scripted_tokens is not None:
        scale = replace(scale, text_tokens=row.scripted_tokens)
    (case,) = chosen_cases(suite_cases(Suite(row.suite), scale), [row.case])
    # Some cases have more jobs than the scale says.
    case = replace(case, num_jobs=row.num_jobs)
    if case.setting != row.setting:
        raise ConfigError(
            f"{row.suite}, {row.case}: expected the options {row.setting!r} that were measured, "
            f"found {case.setting!r}: measure it again"
        )
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if row.started_at < PACKED_SINCE:
            patch.setattr(expected, "gpu_computation", without_packing)
        manifest = write_manifest(case, scale, Path(folder))
        return expectation(case, row.model, manifest, row.dtype)


def _recorded() -> Sequence[object]:
    """Returns the rows of every file that have a peak of device memory."""
    rows = [
        pytest.param(row, id=f"{file.stem}-{row.case}")
        for file in sorted(FOLDER.glob("*.parquet"))
        for row in read_file(file)
        if row.status == DONE and row.peak_reserved_bytes
    ]
    nothing = pytest.mark.skip(reason="no profile of a GPU is recorded in docs/measured yet")
    return rows or [pytest.param(None, id="nothing", marks=nothing)]


def check(row: Row) -> None:
    """Fails unless the arithmetic of today is close to what was measured."""
    expected_row = recomputed(row)
    placement = expected_row.placements.leanest
    assert row.vram_mode == placement.mode
    assert row.peak_reserved_bytes is not None
    expected = float(placement.device_bytes)
    if row.budget_bytes is not None:
        assert max(placement.device_bytes, row.peak_reserved_bytes) <= row.budget_bytes
        off = row.peak_reserved_bytes - expected
        expected += min(max(off, -BLOCK_BYTES), BLOCK_BYTES)
    ratio = expected / row.peak_reserved_bytes
    assert LOWEST <= ratio <= HIGHEST, f"{row.case}: expected / reserved is {ratio:.3f}"
    if row.peak_rss_bytes is not None:
        ratio = expected_row.placements.host_bytes / row.peak_rss_bytes
        assert LOWEST <= ratio <= HIGHEST, f"{row.case}: expected / resident is {ratio:.3f}"
    if row.host_budget_bytes is not None:
        assert row.peak_rss_bytes is not None
        assert row.peak_rss_bytes <= row.host_budget_bytes


@pytest.mark.parametrize("row", _recorded())
def test_expected_peaks_are_close_to_measured_ones(row: Row) -> None:
    check(row)


@pytest.mark.parametrize("case", ["full", "low"])
@pytest.mark.parametrize(
    ("ratio", "close"), [(0.96, False), (0.98, True), (1.0, True), (1.09, True), (1.11, False)]
)
def test_an_estimate_that_is_off_is_found(case: str, ratio: float, close: bool) -> None:
    row = result(case)
    placement = recomputed(row).placements.leanest
    row = replace(
        row, peak_reserved_bytes=placement.device_bytes, peak_rss_bytes=placement.host_bytes
    )
    device = replace(row, peak_reserved_bytes=round(placement.device_bytes / ratio))
    host = replace(row, peak_rss_bytes=round(placement.host_bytes / ratio))
    for off, what in ((device, "reserved"), (host, "resident")):
        if close:
            check(off)
        else:
            with pytest.raises(AssertionError, match=f"expected / {what} is"):
                check(off)


def test_more_host_memory_than_the_budget_is_found() -> None:
    row = result(
        "7gib-cpu20gib",
        suite="budgets",
        setting="--max-memory 0=7GiB,cpu=20GiB",
        budget_bytes=7 * GIB,
        host_budget_bytes=20 * GIB,
    )
    placement = recomputed(row).placements.leanest
    row = replace(
        row,
        vram_mode=placement.mode,
        peak_reserved_bytes=placement.device_bytes,
        peak_rss_bytes=20 * GIB + 1,
    )
    with pytest.raises(AssertionError):
        check(row)
    check(replace(row, peak_rss_bytes=20 * GIB))


def test_another_placement_than_the_measured_one_is_found() -> None:
    with pytest.raises(AssertionError):
        check(result("low", vram_mode="balanced"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setting": "--vram-mode balanced"}, "expected the options '--vram-mode balanced'"),
        ({"case": "lean"}, "found 'lean'"),
    ],
)
def test_a_case_that_is_no_longer_run_so_is_measured_again(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        recomputed(replace(result("low"), **changes))
