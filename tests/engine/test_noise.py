"""Noise that is drawn ahead of its use, without a network."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch import Tensor

from sensebatch.engine.tasks.noise import Noise, NoiseAhead

CPU = torch.device("cpu")
PATIENCE_S = 60.0


class Drawn:
    """Draws images of ten bytes and remembers which."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._changed = threading.Condition()

    def noise(self, number: int) -> Noise:
        return Noise(self._drawing(number), 10)

    def _drawing(self, number: int) -> Callable[[], Tensor]:
        def draw() -> Tensor:
            with self._changed:
                self.numbers.append(number)
                self._changed.notify_all()
            return torch.full((3, 1, 1), float(number))

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
    ahead = NoiseAhead(room_bytes=25)
    waiting = [drawn.noise(number) for number in range(5)]
    for one in waiting:
        ahead.announce(one)
    drawn.wait_for(0, 1)
    assert waiting[0].to(CPU).flatten().tolist() == [0.0] * 3
    drawn.wait_for(0, 1, 2)
    del waiting[1]  # Dropped, and never used.
    drawn.wait_for(0, 1, 2, 3)


def test_noise_is_drawn_where_it_is_used_first_and_not_again(drawn: Drawn) -> None:
    ahead = NoiseAhead(room_bytes=10)
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

    def draw() -> Tensor:
        if full[0]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return torch.ones(3, 1, 1)

    ahead, large, later = NoiseAhead(room_bytes=10), Noise(draw, 10), drawn.noise(1)
    ahead.announce(large)
    ahead.announce(later)
    drawn.wait_for(1)
    with pytest.raises(RuntimeError, match="allocate"):
        large.to(CPU)
    full.clear()
    full.append(False)
    assert large.to(CPU)[0].item() == 1
