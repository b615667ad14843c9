"""The noise that images start from, drawn a pass ahead of its use and forgotten with it.

It is as large as the image in float32, so that of two batches would take as much of the host as
all else that is prepared. Drawn again, it is the same: it follows from the job's seed.
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


class Noise:
    """The noise of one image.

    Args:
        draw: Returns it, on the CPU; each time the same.
        num_bytes: What it takes.
    """

    def __init__(self, draw: Callable[[], Tensor], num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._draw = draw
        self._drawn: Tensor | None = None
        self._is_used = False
        self._lock = threading.Lock()
        self._used: Callable[[], object] = lambda: None

    def to(self, device: torch.device | str, /) -> Tensor:
        """Returns the noise on a device, and forgets it."""
        with self._lock:
            drawn = self._draw() if self._drawn is None else self._drawn
            self._drawn, self._is_used = None, True
            used, self._used = self._used, lambda: None
        used()
        return drawn.to(device)

    def draw_ahead(self, used: Callable[[], object]) -> bool:
        """Draws the noise, unless it was used already; returns whether it waits to be used.

        Args:
            used: Is called once, when it has been.
        """
        with self._lock:
            if not self._is_used:
                self._drawn, self._used = self._draw(), used
            return not self._is_used


class NoiseAhead:
    """Draws noise in a thread of its own, in the order in which it was announced.

    Args:
        room_bytes: Most that waits to be used; a single one may be larger.
    """

    def __init__(self, room_bytes: int = ROOM_BYTES) -> None:
        # Noise may be freed at any moment and in any thread, where only such a queue can be used.
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._thread = threading.Thread(
            target=_draw_all, args=(self._events, room_bytes), name="noise", daemon=True
        )
        self._starting = threading.Lock()
        weakref.finalize(self, self._events.put, None)

    def announce(self, noise: Noise) -> None:
        """Lets noise be drawn as soon as there is room for it; called from any thread."""
        with self._starting:
            if self._thread.ident is None:
                self._thread.start()
        self._events.put(weakref.ref(noise))


def _draw_all(events: SimpleQueue[_Event], room_bytes: int) -> None:
    """Draws what is announced until there is nobody who might announce more."""
    announced: deque[weakref.ref[Noise]] = deque()
    waiting_bytes = 0
    while (event := events.get()) is not None:
        if isinstance(event, int):
            waiting_bytes -= event
        else:
            announced.append(event)
        while announced:
            taken = _drawn(announced[0](), room_bytes - waiting_bytes, not waiting_bytes, events)
            if taken is None:
                break
            waiting_bytes += taken
            announced.popleft()


def _drawn(
    noise: Noise | None, room_bytes: int, is_first: bool, events: SimpleQueue[_Event]
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
        waits = noise.draw_ahead(freed)
    except (MemoryError, RuntimeError):
        # The host has no memory left. Whoever uses it draws it then, or says what is wrong.
        waits = False
    if not waits:
        freed()
    return noise.num_bytes
