"""A plot of speed against device memory, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from sensebatch.profile.published import PUBLISHED_STEPS, RELEASE, published
from sensebatch.profile.rows import Row
from sensebatch.profile.suites import Suite
from sensebatch.units import GIB

PLOT_NAME = "profile.png"

Point = tuple[float, float]
"""GiB of the budget, or of the reserved peak where there is none; image tokens a second at the
published number of steps."""


def measured_points(rows: Iterable[Row]) -> list[Point]:
    """Returns our points by memory; those without a device peak or with a host budget have none.

    An image of fewer steps than the published ones counts for proportionally less.
    """
    points = []
    for row in rows:
        size = row.budget_bytes or row.peak_reserved_bytes
        if size and row.image_tok_per_s and row.host_budget_bytes is None:
            share = row.num_steps / PUBLISHED_STEPS
            points.append((size / GIB, row.image_tok_per_s * share))
    return sorted(points)


def published_points(suite: Suite) -> list[Point]:
    """Returns the points of the tables published with the release, by memory."""
    return sorted(
        (row.budget_gib or row.peak_reserved_gib, row.image_tok_per_s)
        for row in published(suite)
        if row.source == RELEASE
        and row.image_tok_per_s is not None
        and row.peak_reserved_gib is not None
    )


def plot(folder: Path, rows: Sequence[Row]) -> str:
    """Draws speed against memory into a folder, and returns a line that says what became of it.

    Suites whose cases differ in more than memory have no such plot.
    """
    suite = Suite(rows[0].suite)
    ours = measured_points(rows)
    if suite in (Suite.TASKS, Suite.SPEED, Suite.NIGHT):
        return f"no plot: the cases of suite {suite} differ in more than memory"
    if not ours:
        return "no plot: no case has a budget or a peak of device memory"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return 'no plot: matplotlib is not installed (pip install "sensebatch[profile]")'
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*ours, strict=True), marker="o", label=f"sensebatch, {_work(rows)}")
    theirs = published_points(suite)
    axes.plot(
        *zip(*theirs, strict=True),
        marker="s",
        label="published, one H100 80 GB, 2048x2048, 50 steps",
    )
    axes.set_xlabel("device memory, GiB (budget, or reserved peak without one)")
    axes.set_ylabel(f"image tokens a second, by steps / {PUBLISHED_STEPS}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / PLOT_NAME
    figure.savefig(path, dpi=150)
    return f"plot {path}"


def _work(rows: Iterable[Row]) -> str:
    """Returns what was done and on what, so that nobody compares a scaled-down run unawares."""
    row = next(row for row in rows if row.image_tok_per_s)
    return f"{row.device}, {row.model}, {row.width}x{row.height}, {row.num_steps} steps"
