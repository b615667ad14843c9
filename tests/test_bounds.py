"""The bounds of the tests end what goes beyond them."""

from __future__ import annotations

import pytest

from tests.bounds import TooLongError, bounded


def compute_for_ever() -> None:
    while True:
        pass


def test_a_loop_without_end_is_ended() -> None:
    with pytest.raises(TooLongError), bounded(cpu_s=0.05):
        compute_for_ever()


def test_more_memory_than_allowed_is_refused() -> None:
    with pytest.raises(MemoryError), bounded(memory_bytes=2**26):
        bytearray(2**28)
    assert len(bytearray(2**28)) == 2**28
