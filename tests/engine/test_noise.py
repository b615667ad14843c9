"""Noise that is drawn ahead of its use, without a network."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch import Tensor

from sensebatch.engine.tasks.noise import Noise, NoiseAhead

CPU = torch.device("cpu")
PATIENCE_S = 60.0


class Drawn:
    """Draws images of twelve bytes and remembers which."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._changed = threading.Condition()

    def noise(self, number: int) -> Noise:
        return Noise(self._drawing(number), 12)

    def _drawing(self, number: int) -> Callable[[Tensor | None], Tensor]:
        def draw(out: Tensor | None) -> Tensor:
            with self._changed:
                self.numbers.append(number)
                self._changed.notify_all()
            noise = torch.empty(3, 1, 1) if out is None else out.view(3, 1, 1)
            return noise.fill_(number)

        return draw

    def wait_for(self, *numbers: int) -> None:
        """Returns once exactly these were drawn, in this order."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.numbers) >= len(numbers), PATIENCE_S)
            assert self.numbers == list(numbers)


@pytest.fixture
def drawn() -> Drawn:
    return Drawn()


def test_noise_is_drawn_in_its_order_as_far_as_there_is_room(drawn: Drawn) -> None:
    ahead = NoiseAhead(room_bytes=30)
    waiting = [drawn.noise(number) for number in range(5)]
    for one in waiting:
        ahead.announce(one)
    drawn.wait_for(0, 1)
    assert waiting[0].to(CPU).flatten().tolist() == [0.0] * 3
    drawn.wait_for(0, 1, 2)
    del waiting[1]  # Dropped, and never used.
    drawn.wait_for(0, 1, 2, 3)


def test_noise_is_drawn_where_it_is_used_first_and_not_again(drawn: Drawn) -> None:
    ahead = NoiseAhead(room_bytes=12)
    first, early, last = (drawn.noise(number) for number in range(3))
    for one in (first, early, last):
        ahead.announce(one)
    drawn.wait_for(0)
    assert early.to(CPU)[0].item() == 1
    first.to(CPU)
    drawn.wait_for(0, 1, 2)
    assert last.to(CPU)[0].item() == 2
    drawn.wait_for(0, 1, 2)


def test_noise_that_is_larger_than_the_room_is_drawn_alone(drawn: Drawn) -> None:
    ahead = NoiseAhead(room_bytes=1)
    waiting = [drawn.noise(number) for number in range(2)]
    for one in waiting:
        ahead.announce(one)
    drawn.wait_for(0)
    waiting[0].to(CPU)
    drawn.wait_for(0, 1)


def test_noise_is_forgotten_once_it_was_used_and_the_same_again(drawn: Drawn) -> None:
    noise = drawn.noise(7)
    assert torch.equal(noise.to(CPU), noise.to(CPU))
    drawn.wait_for(7, 7)
    assert noise._drawn is None


def test_thread_ends_with_the_engine_that_it_drew_for(drawn: Drawn) -> None:
    ahead = NoiseAhead()
    noise = drawn.noise(1)
    ahead.announce(noise)
    drawn.wait_for(1)
    thread = ahead._thread
    del ahead
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_closing_waits_for_the_thread(drawn: Drawn) -> None:
    ahead = NoiseAhead()
    ahead.close()
    ahead = NoiseAhead()
    ahead.announce(drawn.noise(0))
    thread = ahead._thread
    ahead.close()
    assert not thread.is_alive()


def test_threads_that_announce_at_the_same_time_start_one_thread(
    drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = NoiseAhead()
    both, start = threading.Barrier(2), ahead._thread.start
    waiting = [drawn.noise(number) for number in range(2)]
    errors: list[BaseException] = []

    def late() -> None:
        # The other thread gets here as well if nothing holds it back.
        with suppress(threading.BrokenBarrierError):
            both.wait(0.2)
        start()

    def announce(noise: Noise) -> None:
        try:
            ahead.announce(noise)
        except RuntimeError as error:
            errors.append(error)

    monkeypatch.setattr(ahead._thread, "start", late)
    threads = [threading.Thread(target=announce, args=(noise,)) for noise in waiting]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not errors
    for noise in waiting:
        assert noise.to(CPU).shape == (3, 1, 1)


def test_noise_that_the_host_has_no_memory_for_is_drawn_where_it_is_used(drawn: Drawn) -> None:
    full = [True]

    def draw(_: Tensor | None) -> Tensor:
        if full[0]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return torch.ones(3, 1, 1)

    ahead, large, later = NoiseAhead(room_bytes=12), Noise(draw, 12), drawn.noise(1)
    ahead.announce(large)
    ahead.announce(later)
    drawn.wait_for(1)
    with pytest.raises(RuntimeError, match="allocate"):
        large.to(CPU)
    full.clear()
    full.append(False)
    assert large.to(CPU)[0].item() == 1


class Slot:
    """Memory for one image's noise; notes where noise was sent from it."""

    def __init__(self) -> None:
        self.flat = torch.zeros(12, dtype=torch.uint8)
        self.sent: list[object] = []

    def send(self, tensor: Tensor, device: torch.device | str) -> Tensor:
        assert tensor.data_ptr() == self.flat.data_ptr()
        self.sent.append(device)
        return tensor.clone()


class Slots:
    """Hands out so many slots."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.live: weakref.WeakSet[Slot] = weakref.WeakSet()
        self.sent: list[object] = []

    def take(self, num_bytes: int) -> Slot | None:
        assert num_bytes == 12
        if len(self.live) == self.count:
            return None
        slot = Slot()
        slot.sent = self.sent
        self.live.add(slot)
        return slot


def test_noise_that_is_drawn_ahead_is_sent_from_a_place_that_is_then_free(drawn: Drawn) -> None:
    slots = Slots(1)
    ahead = NoiseAhead(room_bytes=12, take=slots.take)
    waiting = [drawn.noise(number) for number in range(2)]
    for one in waiting:
        ahead.announce(one)
    drawn.wait_for(0)
    for number, one in enumerate(waiting):
        assert one.to(CPU).flatten().tolist() == [number] * 3
        drawn.wait_for(0, 1)
    assert slots.sent == [CPU, CPU]
    assert not slots.live
    # Drawn where it is used, it takes the ordinary way.
    assert waiting[0].to(CPU)[0].item() == 0
    assert slots.sent == [CPU, CPU]


def test_noise_that_is_never_used_leaves_its_place_to_others(drawn: Drawn) -> None:
    slots = Slots(2)
    ahead = NoiseAhead(room_bytes=12, take=slots.take)
    first, second = drawn.noise(1), drawn.noise(2)
    ahead.announce(first)
    ahead.announce(second)
    drawn.wait_for(1)
    del first
    drawn.wait_for(1, 2)
    second.to(CPU)
    assert not slots.live


def test_noise_without_a_place_is_drawn_ahead_into_ordinary_memory(drawn: Drawn) -> None:
    slots = Slots(1)
    ahead = NoiseAhead(take=slots.take)
    waiting = [drawn.noise(number) for number in range(3)]
    for one in waiting:
        ahead.announce(one)
    drawn.wait_for(0, 1, 2)
    assert [one.to(CPU)[0].item() for one in waiting] == [0, 1, 2]
    drawn.wait_for(0, 1, 2)
    assert slots.sent == [CPU]


def test_a_place_that_is_lost_to_an_error_lets_noise_be_drawn_ahead_all_the_same(
    drawn: Drawn,
) -> None:
    class Full(Slot):
        def send(self, _tensor: Tensor, _device: torch.device | str) -> Tensor:
            raise RuntimeError("out of memory on the device")

    ahead = NoiseAhead(room_bytes=12, take=lambda _: Full())
    waiting = [drawn.noise(number) for number in range(2)]
    for one in waiting:
        ahead.announce(one)
    drawn.wait_for(0)
    with pytest.raises(RuntimeError, match="device"):
        waiting[0].to(CPU)
    drawn.wait_for(0, 1)
    assert waiting[0].to(CPU)[0].item() == 0
