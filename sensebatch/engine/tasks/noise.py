"""The noise that images start from, drawn a pass ahead of its use and forgotten with it.

It is as large as the image in float32, so that of two batches would take as much of the host as
all else that is prepared. Drawn again, it is the same: it follows from the job's seed. For a GPU it
is drawn into pinned memory, so that nobody waits for its copy.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

ROOM_BYTES = 96 << 20
"""Most bytes of noise that wait to be used; one image always fits. As much as a pass takes."""


_Event: TypeAlias = "weakref.ref[Noise] | int | None"
"""Noise that is announced, bytes that are free again, or the end."""


class Starting(Protocol):
    """What an image starts from: noise, or a tensor."""

    def to(self, device: torch.device | str, /) -> Tensor:
        """Returns it on a device, float32 `[3, height, width]`, already scaled."""


class Place(Protocol):
    """Memory that noise can be drawn into, for others to use once this object is deleted."""

    flat: Tensor
    """The memory, uint8."""

    def send(self, tensor: Tensor, device: torch.device | str, /) -> Tensor:
        """Returns a copy on the device of a tensor that lies there, without waiting for it."""


Take: TypeAlias = Callable[[int], Place | None]
"""Returns a place of so many bytes; None where there is none, and ordinary memory is to be used."""


class Noise:
    """The noise of one image.

    Args:
        draw: Returns it, on the CPU; each time the same. It lies in the memory that is given,
            float32 `[numbers]`; in new memory if that is None.
        num_bytes: What it takes.
    """

    def __init__(self, draw: Callable[[Tensor | None], Tensor], num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._draw = draw
        self._drawn: Tensor | None = None
        self._place: Place | None = None
        self._is_used = False
        self._lock = threading.Lock()
        self._used: Callable[[], object] = lambda: None

    def to(self, device: torch.device | str, /) -> Tensor:
        """Returns the noise on a device, and forgets it."""
        with self._lock:
            drawn = self._draw(None) if self._drawn is None else self._drawn
            place = self._place
            self._drawn, self._place, self._is_used = None, None, True
            used, self._used = self._used, lambda: None
        try:
            return drawn.to(device) if place is None else place.send(drawn, device)
        finally:
            # So that what is drawn next can take its place.
            del place
            used()

    def draw_ahead(self, used: Callable[[], object], take: Take) -> bool:
        """Draws the noise, unless it was used already; returns whether it waits to be used.

        Args:
            used: Is called once, when it has been.
            take: Returns what it is drawn into.
        """
        with self._lock:
            if not self._is_used:
                place = take(self.num_bytes)
                self._drawn = self._draw(None if place is None else place.flat.view(torch.float32))
                self._place, self._used = place, used
            return not self._is_used


class NoiseAhead:
    """Draws noise in a thread of its own, in the order in which it was announced.

    Args:
        room_bytes: Most that waits to be used; a single one may be larger.
        take: Returns what noise is drawn into; is called by that thread.
    """

    def __init__(self, room_bytes: int = ROOM_BYTES, take: Take = lambda _: None) -> None:
        # Noise may be freed at any moment and in any thread, where only such a queue can be used.
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._thread = threading.Thread(
            target=_draw_all, args=(self._events, room_bytes, take), name="noise", daemon=True
        )
        self._starting = threading.Lock()
        # Not as the process ends: a thread that then frees pinned memory aborts it.
        weakref.finalize(self, self._events.put, None).atexit = False

    def close(self) -> None:
        """Ends the thread, and returns once it has; no more noise can be announced."""
        self._events.put(None)
        with self._starting:
            if self._thread.ident is not None:
                self._thread.join()

    def announce(self, noise: Noise) -> None:
        """Lets noise be drawn as soon as there is room for it; called from any thread."""
        with self._starting:
            if self._thread.ident is None:
                self._thread.start()
        self._events.put(weakref.ref(noise))


def _draw_all(events: SimpleQueue[_Event], room_bytes: int, take: Take) -> None:
    """Draws what is announced until there is nobody who might announce more."""
    announced: deque[weakref.ref[Noise]] = deque()
    waiting_bytes = 0
    while (event := events.get()) is not None:
        if isinstance(event, int):
            waiting_bytes -= event
        else:
            announced.append(event)
        while announced:
            room = room_bytes - waiting_bytes
            taken = _drawn(announced[0](), room, not waiting_bytes, events, take)
            if taken is None:
                break
            waiting_bytes += taken
            announced.popleft()


def _drawn(
    noise: Noise | None, room_bytes: int, is_first: bool, events: SimpleQueue[_Event], take: Take
) -> int | None:
    """Draws noise if nobody has used or dropped it; returns its bytes, None if it has to wait."""
    if noise is None:
        return 0
    if noise.num_bytes > room_bytes and not is_first:
        return None
    # Also where it is never used, because its job is given back or its image was kept.
    freed = weakref.finalize(noise, events.put, noise.num_bytes)
    freed.atexit = False
    try:
        waits = noise.draw_ahead(freed, take)
    except (MemoryError, RuntimeError):
        # The host has no memory left. Whoever uses it draws it then, or says what is wrong.
        waits = False
    if not waits:
        freed()
    return noise.num_bytes
