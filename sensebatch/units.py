"""Counts, bytes and seconds as people write them."""

from __future__ import annotations

MIB = 1 << 20
GIB = 1 << 30


def duration(seconds: float) -> str:
    """Returns a duration to read at a glance: `48 s`, `12 min`, `7 h 05 min`."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def counted(count: int, noun: str) -> str:
    """Returns a count with its noun: `1 job`, `2,000 jobs`, `3 batches`, `0 tries`."""
    return f"{count:,} {noun if count == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """Returns the plural of a noun that has a regular one."""
    if noun.endswith("y") and noun[-2] not in "aeou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("ch", "s", "sh", "x")) else f"{noun}s"
