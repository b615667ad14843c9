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

    Every pass is computed all the same, and only its choice is replaced, so that a job costs what
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


def decode_text(
    first: Mapping[int, int],
    limits: Mapping[int, int],
    step: Step,
    *,
    stop_before: frozenset[int],
    stop_after: frozenset[int] = frozenset(),
    scripts: Mapping[int, Sequence[int]] | None = None,
) -> dict[int, Decoded]:
    """Decodes until every sequence has ended. Sequences that have not share each step.

    Args:
        first: The first choice of each sequence.
        limits: Most tokens of each sequence; checked after a token, so at least one is taken.
        step: Caches one token of some sequences and returns their next choices.
        stop_before: Choices that end a sequence and are not cached.
        stop_after: Tokens that end a sequence once they are cached.
        scripts: Choices that replace the network's for some sequences; at least as many as the
            sequence's limit.

    Returns:
        The text of each sequence, by the keys of `first`.
    """
    decoded = {index: Decoded() for index in first}
    scripts = scripts or {}
    choices = {index: scripts[index][0] if index in scripts else first[index] for index in first}
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
                choices[index] = scripts[index][len(said)] if index in scripts else choice
    return decoded
