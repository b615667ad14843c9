"""Results as Markdown: our tables, the published figures beside them, and the commands. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sensebatch.jobs import Quality
from sensebatch.profile.published import PUBLISHED_STEPS, SOURCES, Published, published
from sensebatch.profile.rows import DONE, Row
from sensebatch.profile.suites import SQUARE, WIDE, Scale, Suite, suite_cases
from sensebatch.units import GIB

NOTHING = "-"
OURS = "sensebatch"
PUBLISHED_HEAD = (
    "case", "source", "load alloc / res GiB", "peak alloc / res GiB", "RSS load → gen GiB",
    "s/image", "tok/s",
)  # fmt: skip
"""The columns of the published tables, in their order."""


def format_markdown(rows: Sequence[Row], missing: Sequence[str] = ()) -> str:
    """Returns the results of one suite as a document.

    Args:
        rows: At least one, from `rows.with_ratios`; all of one suite.
        missing: Cases that were to be run and were not, or not to their end.
    """
    suite = Suite(rows[0].suite)
    parts = [
        f"# Profile: {suite}",
        _conditions(rows),
        "## Speed",
        _first_table(suite, rows),
        "## Memory",
        _memory_table(rows),
    ]
    if published(suite):
        parts += [
            "## Beside the published figures",
            _published_note(suite, rows),
            _published_table(suite, rows),
            _sources(suite),
        ]
    failed = [row for row in rows if row.status != DONE]
    if failed:
        lines = [f"- {row.case}: {row.error}" for row in failed]
        parts += ["## Not done", "\n".join(lines)]
    if missing:
        parts += ["## Missing", f"The suite was stopped before these were done: {_all(missing)}."]
    commands = "\n".join(row.command for row in rows)
    parts += ["## Commands", f"```\n{commands}\n```"]
    return "\n\n".join(parts) + "\n"


def published_markdown(suite: Suite) -> str:
    """Returns the published figures of a suite alone, as a table with its sources."""
    lines = [_published_line(row) for row in published(suite)]
    return f"{_table(PUBLISHED_HEAD, lines, words=2)}\n\n{_sources(suite)}"


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


def _first_table(suite: Suite, rows: Sequence[Row]) -> str:
    if suite is Suite.QUALITY:
        return _quality_table(rows)
    return _speed_table(rows) if any(row.images for row in rows) else _answers_table(rows)


def _quality_table(rows: Sequence[Row]) -> str:
    """Returns evaluations, seconds and the distance to the converged images."""
    exact = next((row.seconds_per_image for row in rows if row.case == Quality.EXACT), None)
    head = [
        "case", "steps", "evaluations", "s/image", "of exact", "PSNR dB", "SSIM",
    ]  # fmt: skip
    lines = [
        [
            row.case if row.status == DONE else f"{row.case} ({row.status})",
            str(row.num_steps),
            _figure(row.evaluations, 0),
            _figure(row.seconds_per_image, 3),
            _figure(row.seconds_per_image / exact if row.seconds_per_image and exact else None, 3),
            _figure(row.psnr_db, 1),
            _figure(row.ssim, 4),
        ]
        for row in rows
    ]
    return _table(head, lines)


def _speed_table(rows: Sequence[Row]) -> str:
    head = [
        "case", "options", "mode taken", "images", "s/step", "steady s/step", "limit s/step",
        "s/image", "limit s/image", "tok/s", "ratio", "steady tok/s", "steady ratio", "text tokens",
        "text tok/s", "waited %", "rest %",
    ]  # fmt: skip
    lines = [
        [
            row.case if row.status == DONE else f"{row.case} ({row.status})",
            f"`{row.setting}`" if row.setting else NOTHING,
            row.vram_mode or NOTHING,
            _figure(row.images, 0),
            _figure(row.step_s, 4),
            _figure(row.steady_step_s, 4),
            _figure(row.limit_step_s, 4),
            _figure(row.seconds_per_image, 3),
            _figure(row.limit_s / row.images if row.limit_s and row.images else None, 3),
            _figure(row.image_tok_per_s, 2),
            _figure(row.ratio_to_baseline, 3),
            _figure(row.steady_image_tok_per_s, 2),
            _figure(row.steady_ratio_to_baseline, 3),
            _figure(row.text_tokens, 0),
            _figure(row.text_tok_per_s, 1),
            _figure(None if row.wait_share is None else 100 * row.wait_share, 2),
            _figure(None if row.rest_share is None else 100 * row.rest_share, 2),
        ]
        for row in rows
    ]
    return _table(head, lines, words=3)


def _answers_table(rows: Sequence[Row]) -> str:
    """Returns the speeds of jobs that draw nothing."""
    head = [
        "case", "options", "mode taken", "jobs", "jobs/s", "steady jobs/s", "limit s",
        "text tokens", "text tok/s", "waited %",
    ]  # fmt: skip
    lines = [
        [
            row.case if row.status == DONE else f"{row.case} ({row.status})",
            f"`{row.setting}`" if row.setting else NOTHING,
            row.vram_mode or NOTHING,
            _figure(row.jobs_done, 0),
            _figure(row.jobs_per_s, 2),
            _figure(row.steady_jobs_per_s, 2),
            _figure(row.limit_s, 1),
            _figure(row.text_tokens, 0),
            _figure(row.text_tok_per_s, 1),
            _figure(None if row.wait_share is None else 100 * row.wait_share, 2),
        ]
        for row in rows
    ]
    return _table(head, lines, words=3)


def _memory_table(rows: Sequence[Row]) -> str:
    head = [
        "case", "peak alloc / res GiB", "expected GiB", "expected / reserved", "load s",
        "of it compile s", "load alloc / res GiB", "RSS load → gen GiB",
    ]  # fmt: skip
    lines = [
        [
            row.case,
            _pair(_gib(row.peak_allocated_bytes), _gib(row.peak_reserved_bytes)),
            _figure(_gib(row.expected_peak_bytes), 2),
            _figure(row.expected_ratio, 3),
            _figure(row.load_s, 2),
            _figure(row.compile_s, 2),
            _pair(_gib(row.load_peak_allocated_bytes), _gib(row.load_peak_reserved_bytes)),
            _rss(_gib(row.load_peak_rss_bytes), _gib(row.peak_rss_bytes)),
        ]
        for row in rows
    ]
    return _table(head, lines)


def _published_note(suite: Suite, rows: Sequence[Row]) -> str:
    compared = {row.case for row in published(suite)}
    scaled = any(
        row.num_steps != PUBLISHED_STEPS
        or row.height not in (WIDE.height, SQUARE.height)
        or row.model.endswith("tiny")
        for row in rows
        if row.case in compared
    )
    if scaled:
        return (
            "These cases were scaled down: their figures and the published ones are not of the "
            "same work."
        )
    return f"The lines of {OURS} are ours, each below those that were published of its case."


def _published_table(suite: Suite, rows: Sequence[Row]) -> str:
    ours = {row.case: row for row in rows}
    theirs = published(suite)
    in_order = [case.name for case in suite_cases(suite, Scale())]
    lines = []
    for case in dict.fromkeys([*in_order, *ours]):
        lines += [_published_line(row) for row in theirs if row.case == case]
        if case in ours:
            lines.append(_our_line(ours[case]))
    return _table(PUBLISHED_HEAD, lines, words=2)


def _published_line(row: Published) -> list[str]:
    return [
        row.case,
        row.source,
        _pair(row.load_allocated_gib, row.load_reserved_gib),
        _pair(row.peak_allocated_gib, row.peak_reserved_gib),
        _rss(row.load_rss_gib, row.peak_rss_gib),
        _figure(row.seconds_per_image, 3),
        _figure(row.image_tok_per_s, 2),
    ]


def _our_line(row: Row) -> list[str]:
    return [
        row.case,
        OURS,
        _pair(_gib(row.load_peak_allocated_bytes), _gib(row.load_peak_reserved_bytes)),
        _pair(_gib(row.peak_allocated_bytes), _gib(row.peak_reserved_bytes)),
        _rss(_gib(row.load_peak_rss_bytes), _gib(row.peak_rss_bytes)),
        _figure(row.seconds_per_image, 3),
        _figure(row.image_tok_per_s, 2),
    ]


def _sources(suite: Suite) -> str:
    used = dict.fromkeys(row.source for row in published(suite))
    return "\n".join(f"- {name}: {SOURCES[name]}." for name in used)


def _rss(load: float | None, generation: float | None) -> str:
    if load is None and generation is None:
        return NOTHING
    return f"{_figure(load, 2)} → {_figure(generation, 2)}"


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
