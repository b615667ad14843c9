"""The plot's points, and what is said where there is no plot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sensebatch.profile.plot import PLOT_NAME, measured_points, plot, published_points
from sensebatch.profile.suites import Suite
from sensebatch.units import GIB
from tests.profile.results import result

BUDGET = {"suite": "budgets", "budget_bytes": 9 * GIB}


def test_points_are_by_budget_or_by_reserved_peak() -> None:
    rows = [
        result("full", image_tok_per_s=200.0, num_steps=50),
        # A fifth of the steps, so a fifth of the work.
        result("9gib", image_tok_per_s=950.0, num_steps=10, **BUDGET),
        result("both", host_budget_bytes=20 * GIB, **BUDGET),
        result("failed", image_tok_per_s=None),
        result("cpu", peak_reserved_bytes=0),
    ]
    assert measured_points(rows) == [(9.0, 190.0), (35.0, 200.0)]


def test_published_curve_is_that_of_the_release() -> None:
    assert published_points(Suite.BUDGETS) == [
        (7, 12.95), (9, 14.12), (13, 16.33), (20, 23.41), (27, 46.71), (35.82, 185.27)
    ]  # fmt: skip
    assert published_points(Suite.MODES) == [(5.85, 31.46), (12.50, 36.44), (35.82, 185.27)]


def test_without_matplotlib_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = plot(tmp_path, [result("9gib", **BUDGET)])
    assert said.startswith("no plot: matplotlib is not installed")
    assert list(tmp_path.iterdir()) == []


def test_no_plot_without_points(tmp_path: Path) -> None:
    for suite in ("tasks", "speed"):
        assert plot(tmp_path, [result("t2i", suite=suite)]).startswith("no plot: ")
    assert plot(tmp_path, [result("full", image_tok_per_s=None)]).startswith("no plot: ")


def test_a_plot_is_an_image_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    said = plot(tmp_path, [result("full"), result("9gib", **BUDGET)])
    assert said == f"plot {tmp_path / PLOT_NAME}"
    assert (tmp_path / PLOT_NAME).read_bytes().startswith(b"\x89PNG")
