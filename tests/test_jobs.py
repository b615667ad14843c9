"""Ids as disks compare them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sensebatch.jobs import folded_id


@given(st.text(max_size=20))
def test_ids_that_differ_in_case_or_accents_encoding_collide(text: str) -> None:
    assert folded_id(text) == folded_id(text.casefold())


def test_composed_and_decomposed_letters_collide() -> None:
    assert folded_id("e\u0301") == folded_id("É")
