"""Decodes the texts of several batches together, and says which of them have the device's memory.

Weights that are streamed come once for all of them, and each batch makes the operations that it
would make alone. Caches get room a few tokens at a time: texts that there is no room for wait in
host memory, and what room texts do not take holds weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sensebatch.engine import graphs
from sensebatch.engine.decoding import Choose, Decoder, new_decoder, step_together
from sensebatch.engine.device.memory import translated_out_of_memory
from sensebatch.engine.model.kv_cache import KVCache, part_caches, room_bytes
from sensebatch.engine.model.lockstep import run_together
from sensebatch.engine.sampling.text import Writing
from sensebatch.errors import OutOfMemoryError
from sensebatch.plan import passes

if TYPE_CHECKING:
    from sensebatch.engine.runner import Runner


@dataclass(slots=True, kw_only=True, eq=False)
class Text:
    """The text of a batch, to be decoded after what its sequences have cached."""

    caches: Sequence[KVCache]
    """The cache of each sequence, wherever it is."""
    writing: Writing
    """Its sequences are numbered from 0."""
    choose: Choose | None = None
    """Chooses by logits; None takes the most probable tokens."""
    ending: Sequence[int] = ()
    """Tokens that are cached after each sequence when all have ended."""
    is_last: bool = False
    """Whether nothing comes after it, so that caches are freed."""
    decoder: Decoder | None = None
    """None while it waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRoom:
    """The device's memory for texts and, beside them, for weights."""

    num_bytes: int
    fill: Callable[[int], None]
    """Keeps as many blocks of weights on the device as fit so many bytes."""


def write_together(runner: Runner, texts: Sequence[Text], room: TextRoom | None) -> None:
    """Decodes texts until all have ended, and caches what comes after each.

    Args:
        runner: The network.
        texts: One of each batch; those before come first where there is no room for all.
        room: Memory for them; None where weights have nothing to give up.
    """
    tokens = passes.ROOM_TOKENS if room is None else passes.TEXT_ROOM_TOKENS
    recorder = graphs.new_recorder(runner.network.device)
    pending, left = list(texts), 0
    active: list[Text] = []
    numbers = itertools.count(1)
    while True:
        steps = [(text, taken) for text in active if (taken := text.writing.taken())]
        if not steps or not left:
            ended = [text for text in active if not text.writing.taken()]
            finish_texts(runner, ended)
            pending = [text for text in pending if text not in ended]
            if not pending:
                return
            active, left = _make_rooms(runner, pending, room, tokens, recorder), tokens
            steps = [(text, taken) for text in active if (taken := text.writing.taken())]
            if not steps:
                continue
        runner.report_token(
            next(numbers), sum(len(taken) for _, taken in steps) if texts[1:] else 0
        )
        _step(steps)
        left -= 1


def finish_texts(runner: Runner, texts: Sequence[Text]) -> None:
    """Caches what comes after texts that have ended; their caches then wait where limits say."""
    endings = [
        runner.appending([(cache, text.ending) for cache in text.caches])
        for text in texts
        if text.ending
    ]
    if endings:
        run_together(endings)
    for text in texts:
        text.decoder = None
        if text.is_last:
            for cache in text.caches:
                cache.free()
            continue
        if runner.limits.park is None:
            part_caches(text.caches)
        runner.park(text.caches)


def _step(steps: Sequence[tuple[Text, Sequence[tuple[int, int]]]]) -> None:
    taken = [(text.decoder, of_text) for text, of_text in steps if text.decoder is not None]
    for (text, _), chosen in zip(steps, step_together(taken), strict=True):
        text.writing.follow(chosen)


def _make_rooms(
    runner: Runner,
    pending: Sequence[Text],
    room: TextRoom | None,
    tokens: int,
    recorder: graphs.Recorder | None = None,
) -> list[Text]:
    """Makes room for more tokens of as many texts as it holds, and returns these."""
    active = list(pending) if room is None else _that_fit(pending, room.num_bytes, tokens)
    for text in pending:
        if text not in active:
            text.decoder = None
            runner.park(text.caches)
    waiting = [*active]
    if room is not None:
        # Before caches grow.
        room.fill(left_bytes(room, active, tokens))
        try:
            with translated_out_of_memory("text found no room"):
                _give_rooms(runner, waiting, tokens, recorder)
        except OutOfMemoryError:
            # There is as much as was counted, but in holes that are too small.
            pass
        if waiting:
            room.fill(0)
    _give_rooms(runner, waiting, tokens, recorder)
    return active


def _give_rooms(
    runner: Runner, waiting: list[Text], tokens: int, recorder: graphs.Recorder | None
) -> None:
    """Makes room for more tokens of texts, which then no longer wait.

    Where memory runs out, the others still do; it can be called again.
    """
    while waiting:
        text = waiting[0]
        wanted = _wanted(text, tokens)
        if text.decoder is not None:
            text.decoder.grow(wanted)
        else:
            text.decoder = new_decoder(
                runner.network,
                text.caches,
                max(text.writing.left, 1),
                extend=runner.appending,
                # Weights may move whenever there is more text.
                as_graph=False,
                choose=text.choose,
                room_tokens=wanted,
                # Steps are made one after the other, so all may use the same memory.
                recorder=recorder,
            )
        waiting.pop(0)


def left_bytes(room: TextRoom, active: Sequence[Text], tokens: int) -> int:
    """Returns what the rooms of texts leave for weights.

    Args:
        room: Memory for both.
        active: Those that get a room.
        tokens: See `_wanted`.
    """
    rooms = [room_bytes(text.caches, _wanted(text, tokens)) for text in active]
    # While caches grow, a layer of a text is there twice.
    twice = max(rooms) // active[0].caches[0].num_layers
    return max(room.num_bytes - sum(rooms) - twice, 0)


def _wanted(text: Text, tokens: int) -> int:
    """Returns the tokens that a text gets room for; no more than it may still write."""
    return min(tokens, max(text.writing.left, 1))


def _that_fit(pending: Sequence[Text], num_bytes: int, tokens: int) -> list[Text]:
    """Returns the first texts whose rooms fit so many bytes; at least one."""
    active: list[Text] = []
    for text in pending:
        num_bytes -= room_bytes(text.caches, _wanted(text, tokens))
        if num_bytes >= 0 or not active:
            active.append(text)
    return active
