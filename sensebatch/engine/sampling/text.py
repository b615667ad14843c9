"""Decodes the text of several sequences in step. Knows token ids; the network is a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sensebatch.jobs import Sampling

Step = Callable[[Sequence[tuple[int, int]]], Sequence[int]]
"""[(sequence, token)] -> the next choice of each, in that order; caches the tokens."""


@dataclass(slots=True, kw_only=True)
class Decoded:
    """The text of one sequence."""

    tokens: list[int] = field(default_factory=list)
    """Its tokens, all of them cached."""
    stopped_by: int | None = None
    """The choice that ended it and was not cached; None if a limit or a cached token ended it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """The choices of jobs with synthetic weights, whose own choices mean nothing.

    Every pass is computed, and only its choice is replaced, so that a job costs what
    its settings ask for.
    """

    word: int
    """A token of ordinary text."""
    image_start: int
    """The token that begins an image."""

    def thought(self, sampling: Sampling) -> list[int]:
        """Returns the choices of a job that thinks: text up to its limit."""
        return [self.word] * sampling.max_think_tokens

    def answer(self, sampling: Sampling) -> list[int]:
        """Returns the choices of an answer: text up to its limit."""
        return [self.word] * sampling.max_new_tokens

    def to_image(self, sampling: Sampling) -> list[int]:
        """Returns the choices up to an interleave job's next image: an even share of its text."""
        share = max(sampling.max_new_tokens // sampling.max_images, 1)
        return [self.word] * share + [self.image_start]


class Writing:
    """The text of several sequences while it is decoded. Those that have not ended share each step.

    Args:
        first: The first choice of each sequence.
        limits: Most tokens of each sequence; checked after a token, so at least one is taken.
        stop_before: Choices that end a sequence and are not cached.
        stop_after: Tokens that end a sequence once they are cached.
        scripts: Choices that replace the network's for some sequences; at least as many as the
            sequence's limit.
    """

    def __init__(
        self,
        first: Mapping[int, int],
        limits: Mapping[int, int],
        *,
        stop_before: frozenset[int],
        stop_after: frozenset[int] = frozenset(),
        scripts: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self._limits = limits
        self._stop_before, self._stop_after = stop_before, stop_after
        self._scripts = scripts or {}
        self.decoded = {index: Decoded() for index in first}
        """The text of each sequence so far, by the keys of `first`."""
        self._choices = {index: self._said(index, choice) for index, choice in first.items()}

    @property
    def most_tokens(self) -> int:
        """The most tokens of any sequence."""
        return max(self._limits.values())

    @property
    def left(self) -> int:
        """The most tokens that a sequence may still write; 0 once all have ended."""
        left = (self._limits[index] - len(self.decoded[index].tokens) for index in self._choices)
        return max(left, default=0)

    def taken(self) -> list[tuple[int, int]]:
        """Returns (sequence, token) of the next step; nothing if every sequence has ended."""
        choices = self._choices
        for index in [index for index, one in choices.items() if one in self._stop_before]:
            self.decoded[index].stopped_by = choices.pop(index)
        return list(choices.items())

    def follow(self, choices: Sequence[int]) -> None:
        """Takes the next choices after the tokens of a step, which are cached."""
        taken = list(self._choices.items())
        for (index, token), choice in zip(taken, choices, strict=True):
            said = self.decoded[index].tokens
            said.append(token)
            if token in self._stop_after or len(said) >= self._limits[index]:
                del self._choices[index]
            else:
                self._choices[index] = self._said(index, choice)

    def _said(self, index: int, choice: int) -> int:
        """Returns a sequence's next choice, or what its script has in its place."""
        if index not in self._scripts:
            return choice
        return self._scripts[index][len(self.decoded[index].tokens)]


def decode_text(writing: Writing, step: Step) -> dict[int, Decoded]:
    """Returns the text of each sequence, decoded until every one has ended.

    Args:
        writing: What has not begun.
        step: Caches one token of some sequences and returns their next choices.
    """
    while taken := writing.taken():
        writing.follow(step(taken))
    return writing.decoded
