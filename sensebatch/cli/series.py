"""How many images were accepted, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sensebatch.cli.messages import counted

if TYPE_CHECKING:
    from sensebatch.store.acceptance import Series

MAX_SHORT = 20


def series_lines(series: Sequence[Series]) -> Iterator[str]:
    """Yields how many images were accepted of those that were judged, and what came short."""
    if not series:
        return
    wanted, judged = sum(one.keep for one in series), sum(one.judged for one in series)
    accepted = sum(one.accepted for one in series)
    passed = sum(one.passed for one in series)
    rate = f"; {100 * passed / judged:.0f}% of {judged:,} judged would do" if judged else ""
    yield f"  accepted {accepted:,} of {counted(wanted, 'image')} wanted{rate}"
    short = [one for one in series if one.is_short]
    for one in short[:MAX_SHORT]:
        tries = "1 try" if one.tries == 1 else f"{one.tries:,} tries"
        yield f"  short    {one.name}: {one.accepted} of {one.keep} after {tries}"
    if len(short) > MAX_SHORT:
        yield f"  ... and {len(short) - MAX_SHORT:,} more; status --json lists all"
