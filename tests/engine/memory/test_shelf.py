"""Images that are kept lie in two places in turn."""

from __future__ import annotations

import pytest
import torch

from sensebatch.engine.memory.shelf import Shelf


def test_a_copy_stays_until_the_next_but_one() -> None:
    shelf = Shelf(pin=False)
    first, second, third = (torch.full((2, 3), float(number)) for number in range(3))
    copies = [shelf.copy(first), shelf.copy(second)]
    first.zero_().add_(9)
    assert [copy.tolist() for copy in copies] == [[[0.0] * 3] * 2, [[1.0] * 3] * 2]
    again = shelf.copy(third)
    assert again.data_ptr() == copies[0].data_ptr()
    assert copies[1].tolist() == second.tolist()


def test_places_grow_to_what_is_copied() -> None:
    shelf = Shelf(pin=False)
    small, large = torch.arange(4.0), torch.arange(12.0, dtype=torch.float64).view(3, 4)
    for tensor in (small, small, large, large, small):
        copy = shelf.copy(tensor)
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)


def test_both_places_are_made_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = Shelf._make

    def noted(shelf: Shelf, number: int, num_bytes: int) -> None:
        made.append(num_bytes)
        make(shelf, number, num_bytes)

    monkeypatch.setattr(Shelf, "_make", noted)
    shelf = Shelf(pin=False)
    shelf.copy(torch.zeros(4))
    assert made == [16, 16]
    for _ in range(3):
        shelf.copy(torch.zeros(4))
    assert made == [16, 16]
