"""Results as Markdown: our tables, the published figures beside them, and the commands. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sensebatch.profile.published import SOURCES, Published, published
from sensebatch.profile.rows import DONE, Row
from sensebatch.profile.suites import Suite
from sensebatch.vram import GIB

PUBLISHED_STEPS = 50
NOTHING = "-"


def format_markdown(rows: Sequence[Row]) -> str:
    """Returns the results of one suite as a document.

    Args:
        rows: Of `rows.with_ratios`, at least one; all of one suite.
    """
    suite = Suite(rows[0].suite)
    parts = [
        f"# Profile: {suite}",
        _conditions(rows),
        "## Speed and memory",
        _speed_table(rows),
        "## Load",
        _load_table(rows),
        "## Beside the published figures",
        _published_note(rows),
        _published_table(suite, rows),
        _sources(suite),
    ]
    failed = [row for row in rows if row.status != DONE]
    if failed:
        lines = [f"- {row.case}: {row.error}" for row in failed]
        parts += ["## Failed", "\n".join(lines)]
    commands = "\n".join(row.command for row in rows)
    parts += ["## Commands", f"```\n{commands}\n```"]
    return "\n\n".join(parts) + "\n"


def published_markdown(suite: Suite) -> str:
    """Returns the published figures of a suite alone, as a table with its sources."""
    head = [
        "case", "source", "load alloc / res GiB", "load RSS GiB", "peak alloc / res GiB",
        "peak RSS GiB", "s/image", "tok/s",
    ]  # fmt: skip
    lines = [
        [
            row.case,
            row.source,
            _pair(row.load_allocated_gib, row.load_reserved_gib),
            _figure(row.load_rss_gib, 2),
            _pair(row.peak_allocated_gib, row.peak_reserved_gib),
            _figure(row.peak_rss_gib, 2),
            _figure(row.seconds_per_image, 3),
            _figure(row.image_tok_per_s, 2),
        ]
        for row in published(suite)
    ]
    return f"{_table(head, lines, words=2)}\n\n{_sources(suite)}"


def _conditions(rows: Sequence[Row]) -> str:
    facts: dict[str, list[object]] = {
        "model": [row.model for row in rows],
        "device": [row.device for row in rows],
        "dtype": [row.dtype for row in rows],
        "attention": [row.attn_backend for row in rows],
        "steps": [row.num_steps for row in rows],
        "jobs a case": [row.num_jobs for row in rows],
        "size": [f"{row.width}x{row.height}" for row in rows],
        "torch": [row.torch_version for row in rows],
        "sensebatch": [row.sensebatch_version for row in rows],
        "date (UTC)": [row.started_at.date().isoformat() for row in rows],
    }
    return "\n".join(f"- {name}: {_all(values)}" for name, values in facts.items())


def _all(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None)) or NOTHING


def _speed_table(rows: Sequence[Row]) -> str:
    head = [
        "case", "memory options", "mode taken", "images", "s/step", "s/image", "tok/s", "ratio",
        "peak alloc / res GiB", "RSS GiB", "expected GiB", "expected / reserved",
    ]  # fmt: skip
    lines = [
        [
            row.case if row.status == DONE else f"{row.case} (failed)",
            f"`{row.setting}`" if row.setting else NOTHING,
            row.vram_mode or NOTHING,
            NOTHING if row.images is None else f"{row.images:,}",
            _figure(row.step_s, 4),
            _figure(row.seconds_per_image, 3),
            _figure(row.image_tok_per_s, 2),
            _figure(row.ratio_to_baseline, 3),
            _pair(_gib(row.peak_allocated_bytes), _gib(row.peak_reserved_bytes)),
            _figure(_gib(row.peak_rss_bytes), 2),
            _figure(_gib(row.expected_peak_bytes), 2),
            _figure(row.expected_ratio, 3),
        ]
        for row in rows
    ]
    return _table(head, lines, words=3)


def _load_table(rows: Sequence[Row]) -> str:
    head = ["case", "s", "peak alloc / res GiB", "RSS GiB"]
    lines = [
        [
            row.case,
            _figure(row.load_s, 2),
            _pair(_gib(row.load_peak_allocated_bytes), _gib(row.load_peak_reserved_bytes)),
            _figure(_gib(row.load_peak_rss_bytes), 2),
        ]
        for row in rows
    ]
    return _table(head, lines)


def _published_note(rows: Sequence[Row]) -> str:
    scaled = any(
        row.num_steps != PUBLISHED_STEPS or row.height not in (1152, 2048) for row in rows
    ) or any(row.model.endswith("tiny") for row in rows)
    if scaled:
        return (
            "These cases were scaled down: their figures and the published ones are not of the "
            "same work."
        )
    return "Published figure first, ours behind the arrow."


def _published_table(suite: Suite, rows: Sequence[Row]) -> str:
    head = [
        "case", "source", "s/image", "tok/s", "peak alloc / res GiB", "peak RSS GiB",
        "load alloc / res GiB", "load RSS GiB",
    ]  # fmt: skip
    ours = {row.case: row for row in rows}
    theirs = published(suite)
    lines = [_beside(row, ours.get(row.case)) for row in theirs]
    named = {row.case for row in theirs}
    empty = Published(suite=suite, case="", source=NOTHING)
    for case, row in ours.items():
        if case not in named:
            lines.append([case, *_beside(empty, row)[1:]])
    return _table(head, lines, words=2)


def _beside(theirs: Published, ours: Row | None) -> list[str]:
    speed = (None, None) if ours is None else (ours.seconds_per_image, ours.image_tok_per_s)
    return [
        theirs.case,
        theirs.source,
        _arrow(_figure(theirs.seconds_per_image, 3), _figure(speed[0], 3)),
        _arrow(_figure(theirs.image_tok_per_s, 2), _figure(speed[1], 2)),
        _arrow(_pair(theirs.peak_allocated_gib, theirs.peak_reserved_gib), _peak(ours, "peak")),
        _arrow(_figure(theirs.peak_rss_gib, 2), _rss(ours, "peak")),
        _arrow(
            _pair(theirs.load_allocated_gib, theirs.load_reserved_gib), _peak(ours, "load_peak")
        ),
        _arrow(_figure(theirs.load_rss_gib, 2), _rss(ours, "load_peak")),
    ]


def _peak(row: Row | None, which: str) -> str:
    if row is None:
        return NOTHING
    sizes = [getattr(row, f"{which}_{kind}_bytes") for kind in ("allocated", "reserved")]
    return _pair(*(_gib(size) for size in sizes))


def _rss(row: Row | None, which: str) -> str:
    return NOTHING if row is None else _figure(_gib(getattr(row, f"{which}_rss_bytes")), 2)


def _sources(suite: Suite) -> str:
    used = dict.fromkeys(row.source for row in published(suite))
    return "\n".join(f"- {name}: {SOURCES[name]}." for name in used)


def _arrow(theirs: str, ours: str) -> str:
    return f"{theirs} → {ours}"


def _gib(size: int | None) -> float | None:
    """Returns GiB; None also for 0, which is what a CPU says of device memory."""
    return size / GIB if size else None


def _figure(value: float | None, places: int) -> str:
    return NOTHING if value is None else f"{value:,.{places}f}"


def _pair(first: float | None, second: float | None) -> str:
    if first is None and second is None:
        return NOTHING
    return f"{_figure(first, 2)} / {_figure(second, 2)}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """Returns a table; all columns but the first `words` are figures."""
    rule = ["---" if index < words else "---:" for index in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))
