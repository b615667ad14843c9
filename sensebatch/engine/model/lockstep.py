"""Passes that go through the same blocks of weights side by side, each block lent once for all.

A pass is a generator: it asks for the block that it needs next, and computes with it until it asks
for another one. So several passes share blocks that have to be streamed, and each of them makes the
operations that it would make alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias, TypeVar

from torch import nn

T = TypeVar("T")

Lend: TypeAlias = Callable[[int], AbstractContextManager[nn.Module]]
"""Lends the block of a number with its weights on the device while the context is open."""
Asked: TypeAlias = tuple[Lend, int]
"""What lends the block that a pass needs next, and the block's number."""
Pass: TypeAlias = Generator[Asked, nn.Module, T]
"""Yields what it asks for, is sent the block, and returns what it computed."""


def run(one: Pass[T]) -> T:
    """Returns what a pass computes."""
    (found,) = run_together([one])
    return found


def run_together(passes: Sequence[Pass[T]]) -> list[T]:
    """Returns what passes compute that ask for the same blocks in the same order."""
    asked = [next(one) for one in passes]
    found: list[T] = []
    while not found:
        lend, number = asked[0]
        assert all(one == asked[0] for one in asked), "passes must ask for the same blocks"
        with lend(number) as block:
            for index, one in enumerate(passes):
                try:
                    asked[index] = one.send(block)
                except StopIteration as end:
                    found.append(end.value)
    assert len(found) == len(passes), "passes must end after the same block"
    return found
