"""Greedy decoding of several sequences in step. Token ids only; the network is a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Step = Callable[[Sequence[tuple[int, int]]], Sequence[int]]
"""[(sequence, token)] -> the next choice of each, in that order, with the tokens cached."""


@dataclass(slots=True, kw_only=True)
class Decoded:
    """What one sequence said."""

    tokens: list[int] = field(default_factory=list)
    """All cached."""
    stopped_by: int | None = None
    """The choice that ended it and was not cached; None at the limit or after a last token."""


def greedy_decode(
    first: Mapping[int, int],
    limits: Mapping[int, int],
    step: Step,
    *,
    stop_before: frozenset[int],
    stop_after: frozenset[int] = frozenset(),
) -> dict[int, Decoded]:
    """Decodes until every sequence has ended; all that go on share each step.

    Args:
        first: The first choice of each sequence.
        limits: Most tokens of each sequence; looked at after a token, so at least one is taken.
        step: Caches one token of some sequences and returns their next choices.
        stop_before: Choices that end a sequence and are not cached.
        stop_after: Tokens that end a sequence once cached.

    Returns:
        What each sequence said, by the keys of `first`.
    """
    decoded = {index: Decoded() for index in first}
    choices = dict(first)
    while choices:
        for index in [index for index, choice in choices.items() if choice in stop_before]:
            decoded[index].stopped_by = choices.pop(index)
        if not choices:
            break
        taken = list(choices.items())
        following = step(taken)
        for (index, token), choice in zip(taken, following, strict=True):
            said = decoded[index].tokens
            said.append(token)
            if token in stop_after or len(said) >= limits[index]:
                del choices[index]
            else:
                choices[index] = choice
    return decoded
