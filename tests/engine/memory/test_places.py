"""Places that a GPU's copies go through are used again, and never before a copy is done."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sensebatch.engine.memory import places as places_module
from sensebatch.engine.memory.lanes import CpuLane
from sensebatch.engine.memory.places import Place, Places
from sensebatch.errors import OutOfMemoryError

CPU = torch.device("cpu")


class Pinned:
    """Counts what is pinned."""

    alive = 0
    tried = 0
    most = 1 << 40

    def __init__(self, _: Tensor) -> None:
        Pinned.tried += 1
        if Pinned.alive >= Pinned.most:
            raise OutOfMemoryError("pinning failed")
        Pinned.alive += 1
        self._is_pinned = True

    def __del__(self) -> None:
        Pinned.alive -= hasattr(self, "_is_pinned")


class Noted(CpuLane):
    """Notes which marks are set and waited for."""

    def __init__(self) -> None:
        self.events: list[tuple[str, object]] = []

    def new_mark(self) -> object:
        return object()

    def computed(self, mark: object) -> None:
        self.events.append(("set", mark))

    def finish(self, mark: object) -> None:
        self.events.append(("finished", mark))


@pytest.fixture(autouse=True)
def pinned(monkeypatch: pytest.MonkeyPatch) -> type[Pinned]:
    monkeypatch.setattr(places_module, "PinnedMemory", Pinned)
    monkeypatch.setattr(Pinned, "alive", 0)
    monkeypatch.setattr(Pinned, "tried", 0)
    return Pinned


def taken(places: Places, num_bytes: int) -> Place:
    place = places.take(num_bytes)
    assert place is not None
    assert place.flat.shape == (num_bytes,)
    return place


def test_a_place_is_used_again_once_it_is_deleted(pinned: type[Pinned]) -> None:
    places = Places(CpuLane())
    first, second = taken(places, 8), taken(places, 8)
    where = [one.flat.data_ptr() for one in (first, second)]
    assert len(set(where)) == 2
    del first
    third = taken(places, 8)
    assert third.flat.data_ptr() == where[0]
    assert pinned.alive == 2
    del second, third
    # The one that was given back first, whose copy is most likely done.
    assert taken(places, 8).flat.data_ptr() == where[1]
    assert pinned.alive == 2


def test_a_place_is_not_used_again_before_what_lay_there_is_sent() -> None:
    lane = Noted()
    places = Places(lane)
    place = taken(places, 8)
    tensor = place.flat.view(torch.float32).fill_(3)
    sent = place.send(tensor, CPU)
    assert sent.data_ptr() != tensor.data_ptr()
    assert torch.equal(sent, tensor)
    ((what, mark),) = lane.events
    assert what == "set"
    del place
    taken(places, 8)
    assert lane.events == [("set", mark), ("finished", mark)]


def test_places_of_another_size_are_unpinned_once_nothing_is_sent_from_them(
    pinned: type[Pinned],
) -> None:
    lane = Noted()
    places = Places(lane)
    large = [taken(places, 100) for _ in range(3)]
    del large
    assert pinned.alive == 3
    small = taken(places, 10)
    assert pinned.alive == 1
    assert [what for what, _ in lane.events] == ["finished"] * 3
    del small
    again = taken(places, 100)
    assert pinned.alive == 1
    del again
    # One of a last, smaller batch.
    taken(places, 60)
    assert pinned.tried == 5


def test_pinning_is_given_up_after_one_refusal(
    pinned: type[Pinned], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinned, "most", 1)
    places = Places(CpuLane())
    place = taken(places, 8)
    assert [places.take(8) for _ in range(3)] == [None] * 3
    assert pinned.tried == 2
    del place
    taken(places, 8)


def test_a_host_without_memory_has_no_places(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_bytes: int, _device: torch.device) -> Tensor:
        raise OutOfMemoryError("the host has no memory")

    monkeypatch.setattr(places_module, "new_buffer", refuse)
    assert Places(CpuLane()).take(8) is None


def test_what_is_brought_stays_as_long_as_a_view_of_it(pinned: type[Pinned]) -> None:
    lane = Noted()
    places = Places(lane)
    images = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 4)
    expected = images.numpy().copy()
    array = places.bring(images)
    images.zero_()
    view = array[1][:2]
    where = array.ctypes.data
    del array
    other = places.bring(images)
    assert other.ctypes.data != where
    assert np.array_equal(view, expected[1][:2])
    del view
    assert places.bring(images).ctypes.data == where
    assert pinned.alive == 2
    (_, first), (_, second), *last = lane.events
    assert first is not second
    assert last == [("finished", first), ("set", first)]


def test_what_is_brought_keeps_its_numbers() -> None:
    places = Places(CpuLane())
    for tensor in (torch.arange(6.0).view(2, 3), torch.arange(20, dtype=torch.uint8)):
        array = places.bring(tensor)
        assert array.shape == tensor.shape
        assert np.array_equal(array, tensor.numpy())


def test_more_than_may_be_pinned_goes_to_ordinary_memory(pinned: type[Pinned]) -> None:
    places = Places(CpuLane(), most_bytes=25)
    arrays = [places.bring(torch.full((10,), number, dtype=torch.uint8)) for number in range(4)]
    assert pinned.alive == 2
    assert [array.tolist() for array in arrays] == [[number] * 10 for number in range(4)]
    del arrays
    # Those that do not suit make room.
    assert places.bring(torch.ones(25, dtype=torch.uint8)).tolist() == [1] * 25
    assert pinned.alive == 1


def test_passes_of_two_sizes_in_turn_pin_nothing_again(pinned: type[Pinned]) -> None:
    places = Places(CpuLane())
    before: list[np.ndarray] = []
    for _ in range(4):
        batch = [places.bring(torch.zeros(size, dtype=torch.uint8)) for size in (80, 10)]
        before = batch
    assert len(before) == 2
    assert pinned.tried == pinned.alive == 4
