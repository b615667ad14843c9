from __future__ import annotations

import pytest

from sensebatch.units import duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.7, "1 min"), (3600, "1 h 00 min"), (25500, "7 h 05 min")],
)
def test_durations_are_read_at_a_glance(seconds: float, words: str) -> None:
    assert duration(seconds) == words
