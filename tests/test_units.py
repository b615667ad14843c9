from __future__ import annotations

import pytest

from sensebatch.units import counted, duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.7, "1 min"), (3600, "1 h 00 min"), (25500, "7 h 05 min")],
)
def test_durations_are_read_at_a_glance(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "noun", "words"),
    [
        (1, "job", "1 job"),
        (2000, "job", "2,000 jobs"),
        (0, "batch", "0 batches"),
        (1, "batch", "1 batch"),
        (2, "process", "2 processes"),
        (3, "try", "3 tries"),
        (3, "day", "3 days"),
    ],
)
def test_one_is_singular_and_all_else_is_plural(count: int, noun: str, words: str) -> None:
    assert counted(count, noun) == words
