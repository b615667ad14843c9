"""How many images were accepted, and what waits for some that were not: as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sensebatch.store.acceptance import HeldJob, Series
from sensebatch.store.status import Acceptance
from sensebatch.units import counted

FILE_WIDTH = 80
"""Columns of a file."""
FIGURES_WIDTH = 38
"""Columns beside the name of a series."""
MAX_SHORT = 20
"""Series that came short of which a line is printed."""
MAX_GROUPS = 100
"""Series of which the table has a line."""
MAX_HELD = 3
"""Jobs that are named of those that wait."""


def acceptance_lines(found: Acceptance, *, with_short: bool = True) -> Iterator[str]:
    """Yields how many images were accepted of those that were judged, and what came short.

    Args:
        found: What became of tries.
        with_short: Whether series that came short are named.
    """
    if found.series:
        yield f"  accepted {_total(found.series)}"
    short = [one for one in found.series if one.is_short] if with_short else []
    for one in short[:MAX_SHORT]:
        tries = counted(one.tries, "try")
        yield f"  short    {one.name}: {one.accepted} of {one.keep} after {tries}"
    if len(short) > MAX_SHORT:
        yield f"  ... and {len(short) - MAX_SHORT:,} more; status --json lists all"
    for is_dropped in (False, True):
        held = [one for one in found.held if one.is_dropped is is_dropped]
        if held:
            yield f"  held     {_held(held, is_dropped=is_dropped)}"


def acceptance_table(found: Acceptance, columns: int = FILE_WIDTH) -> Iterator[str]:
    """Yields a line for each series, with what share of its images passed; the worst first.

    Args:
        found: What is known.
        columns: How many there are for a line; a longer name has one of its own.
    """
    if not found.series:
        return
    yield f"acceptance      {_total(found.series, noun='')}"
    worst = sorted(found.series, key=lambda one: (not one.is_short, _rate(one), one.name))
    shown = worst[:MAX_GROUPS]
    most = max(columns - FIGURES_WIDTH, len("prompt group"))
    names = (len(one.name) for one in shown if len(one.name) <= most)
    width = max(len("prompt group"), *names, 0)
    yield f"  {'prompt group':<{width}}  accepted  judged  pass rate"
    for one in shown:
        rate = f"{_rate(one):.0%}" if one.judged else "-"
        accepted = f"{one.accepted}/{one.keep}"
        short = "  short" if one.is_short else ""
        name = one.name
        if len(name) > width:
            yield f"  {name}"
            name = ""
        yield f"  {name:<{width}}  {accepted:>8}  {one.judged:>6}  {rate:>9}{short}"
    if len(worst) > MAX_GROUPS:
        yield f"  ... and {len(worst) - MAX_GROUPS:,} more; sensebatch status --json lists all"
    yield from acceptance_lines(Acceptance(held=found.held))


def _total(series: Sequence[Series], *, noun: str = "image") -> str:
    wanted, judged = sum(one.keep for one in series), sum(one.judged for one in series)
    accepted = sum(one.accepted for one in series)
    passed = sum(one.passed for one in series)
    rate = f"; {passed:,} of {judged:,} judged passed ({passed / judged:.0%})" if judged else ""
    images = counted(wanted, noun) if noun else f"{wanted:,}"
    return f"{accepted:,} of {images} wanted{rate}"


def _rate(series: Series) -> float:
    return series.passed / series.judged if series.judged else 1.0


def _held(held: Sequence[HeldJob], *, is_dropped: bool) -> str:
    """Returns which jobs wait, and what for."""
    what = "rejected images that were removed" if is_dropped else "tries that were not needed"
    return starting_from(what, [(one.job, one.starts_from) for one in held])


def starting_from(what: str, jobs: Sequence[tuple[str, str]]) -> str:
    """Returns a line that names jobs and what they start from.

    Args:
        what: What all of them start from.
        jobs: The id of each, and that of the job it starts from.
    """
    number = "1 job starts" if len(jobs) == 1 else f"{len(jobs):,} jobs start"
    pairs = [f"{job} (@{parent})" for job, parent in jobs[:MAX_HELD]]
    more = f" and {len(jobs) - MAX_HELD:,} more" if len(jobs) > MAX_HELD else ""
    return f"{number} from {what}: {', '.join(pairs)}{more}"
