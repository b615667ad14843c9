"""The published profiling tables, as data. Nothing here was measured with sensebatch.

All are of one H100 with 80 GB, bfloat16, 50 steps, guidance 4, 2048x2048 (interleave 2048x1152).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sensebatch.profile.suites import Suite

PUBLISHED_STEPS = 50
"""Denoising steps of every published figure."""
RELEASE = "release"
LATER = "later"
OFFLOADED_HEAD = "u1.5"

SOURCES: Mapping[str, str] = {
    RELEASE: "profiling tables published with SenseNova-U1-8B-MoT: one H100 80 GB, bf16, "
    'flash-attention, timestep shift 3; budgets as `--device_map auto --max_memory "0=NGiB,'
    'cpu=80GiB"`, balanced with asynchronous prefetch, low with synchronous swapping',
    LATER: "later upstream work on the same model: one H100, SDPA; host RSS 42 GiB in every "
    "offload mode",
    OFFLOADED_HEAD: "upstream work on SenseNova-U1.5, with embeddings and head offloaded too",
}
"""What was measured there and how, by the name that a figure carries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One row of a published table; None where the table says nothing. GiB are 2^30 bytes."""

    suite: Suite
    case: str
    source: str
    load_allocated_gib: float | None = None
    load_reserved_gib: float | None = None
    load_rss_gib: float | None = None
    peak_allocated_gib: float | None = None
    peak_reserved_gib: float | None = None
    peak_rss_gib: float | None = None
    seconds_per_image: float | None = None
    image_tok_per_s: float | None = None
    budget_gib: float | None = None
    """Budget of the card's memory; None without one."""


def _task(case: str, peak: tuple[float, float], rss: float, s: float, tok: float) -> Published:
    return Published(
        suite=Suite.TASKS,
        case=case,
        source=RELEASE,
        load_allocated_gib=32.77,
        load_reserved_gib=33.10,
        peak_allocated_gib=peak[0],
        peak_reserved_gib=peak[1],
        peak_rss_gib=rss,
        seconds_per_image=s,
        image_tok_per_s=tok,
    )


def _budget(
    gib: int, load: float, peak: tuple[float, float], rss: tuple[float, float], s: float, tok: float
) -> Published:
    return Published(
        suite=Suite.BUDGETS,
        case=f"{gib}gib",
        source=RELEASE,
        load_allocated_gib=load,
        load_rss_gib=rss[0],
        peak_allocated_gib=peak[0],
        peak_reserved_gib=peak[1],
        peak_rss_gib=rss[1],
        seconds_per_image=s,
        image_tok_per_s=tok,
        budget_gib=gib,
    )


def _mode(
    case: str,
    source: str,
    peak: tuple[float, float],
    s: float | None = None,
    tok: float | None = None,
    rss: tuple[float | None, float | None] = (None, None),
    suite: Suite = Suite.MODES,
) -> Published:
    return Published(
        suite=suite,
        case=case,
        source=source,
        load_rss_gib=rss[0],
        peak_allocated_gib=peak[0],
        peak_reserved_gib=peak[1],
        peak_rss_gib=rss[1],
        seconds_per_image=s,
        image_tok_per_s=tok,
    )


PUBLISHED = (
    _task("t2i", (34.83, 35.82), 5.59, 22.108, 185.27),
    _task("t2i-think", (35.02, 35.94), 5.58, 38.342, 106.83),
    _task("edit", (39.50, 41.32), 5.61, 25.871, 155.74),
    _task("interleave", (49.22, 69.18), 5.63, 49.353, 46.68),
    _mode("full", RELEASE, (34.83, 35.82), 22.108, 185.27, suite=Suite.BUDGETS),
    _budget(27, 25.71, (27.76, 28.31), (5.62, 10.27), 87.692, 46.71),
    _budget(20, 18.52, (20.58, 21.12), (5.59, 19.50), 174.961, 23.41),
    _budget(13, 11.33, (13.39, 13.93), (5.62, 24.12), 250.757, 16.33),
    _budget(9, 7.74, (9.79, 10.33), (5.55, 28.76), 290.039, 14.12),
    _budget(7, 5.58, (7.64, 8.18), (5.56, 28.76), 316.323, 12.95),
    _mode("full", RELEASE, (34.83, 35.82), 22.108, 185.27),
    _mode("balanced", RELEASE, (6.78, 12.50), 112.394, 36.44, (0.95, 47.18)),
    _mode("low", RELEASE, (5.34, 5.85), 130.191, 31.46, (0.98, 47.22)),
    Published(suite=Suite.MODES, case="full", source=LATER, seconds_per_image=20.9),
    _mode("fast", LATER, (19.7, 20.4), 22.9, rss=(None, 42.0)),
    _mode("balanced", LATER, (5.7, 9.3), 31.5, rss=(None, 42.0)),
    _mode("low", LATER, (5.0, 5.5), 51.5, rss=(None, 42.0)),
    _mode("fast", OFFLOADED_HEAD, (17.3, 17.9)),
    _mode("balanced", OFFLOADED_HEAD, (3.3, 6.6)),
    _mode("low", OFFLOADED_HEAD, (2.60, 2.85)),
)
"""Every published row, by suite, in the order of our cases."""
_ALSO_OF_SPEED = ("t2i", "edit")
"""Tasks that suite `speed` has as well."""


def published(suite: Suite) -> tuple[Published, ...]:
    """Returns the published rows of a suite."""
    if suite is Suite.SPEED:
        return tuple(
            replace(row, suite=suite)
            for row in published(Suite.TASKS)
            if row.case in _ALSO_OF_SPEED
        )
    return tuple(row for row in PUBLISHED if row.suite is suite)
