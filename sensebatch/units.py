"""Bytes and seconds as people write them."""

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
