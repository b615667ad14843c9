"""The embedded checkpoint's tokenizer: every word of its world is a token, other text is bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sensebatch.checkpoint.tokenizer import IM_END, SPECIAL_TOKENS, THINK_END, THINK_START
from sensebatch.resolutions import BUCKETS_TINY
from sensebatch.tiny.world.edits import edit
from sensebatch.tiny.world.examples import Example, text_to_image
from sensebatch.tiny.world.questions import ask
from sensebatch.tiny.world.scene import Split
from sensebatch.tiny.world.stories import story

GENERATION_PROMPT = "You draw and edit pictures."
"""The system prompt of t2i and edit in the embedded checkpoint's training."""
INTERLEAVE_PROMPT = "You answer with words and pictures."
"""The system prompt of interleave in the embedded checkpoint's training."""
END_OF_TEXT = "<|endoftext|>"
LAYOUT_TEXT = "system\nuser\nassistant\n\n\nImage-1:\nImage-2:\nImage-3:\nImage-4:\n"
SURVEY_EXAMPLES = 6000
"""How many examples of each task words are collected from."""
MAX_KNOWN = 100_000
"""How many texts a tokenizer remembers; many are short and come again."""
_WORD_SCORE, _BYTE_SCORE = -1.0, -20.0


def example_texts(example: Example) -> list[str]:
    """Returns every text of an example."""
    said = [part for part in example.answer if isinstance(part, str)]
    thought = [] if example.think is None else [f"{example.think}\n"]
    return [example.prompt, *thought, *said]


@lru_cache(maxsize=1)
def world_words() -> tuple[str, ...]:
    """Returns the world's words in the byte alphabet, with and without a leading space."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rng = np.random.default_rng(0)
    size = BUCKETS_TINY["1:1"]
    words: set[str] = set()
    for text in (GENERATION_PROMPT, INTERLEAVE_PROMPT, LAYOUT_TEXT, "\n", "\n\n"):
        words.update(word for word, _ in splitter.pre_tokenize_str(text))
    for sample in (text_to_image, edit, story):
        for index in range(SURVEY_EXAMPLES):
            for text in example_texts(sample(rng, Split.TRAIN, size, think=index % 2 == 0)):
                words.update(word for word, _ in splitter.pre_tokenize_str(text))
    for _ in range(SURVEY_EXAMPLES):
        for text in example_texts(ask(rng, Split.TRAIN, size)):
            words.update(word for word, _ in splitter.pre_tokenize_str(text))
    # A user may begin with any word, and with a capital where the world has none.
    for word in [w for w in words if re.fullmatch("Ġ?[a-z]+", w)]:
        words.add(word.removeprefix("Ġ"))
    return tuple(sorted(words))


def build_tokenizer() -> Tokenizer:
    """Returns the tokenizer, which encodes any text and decodes it unchanged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [word for word in world_words() if len(word) > 1]
    pieces = [(byte, _BYTE_SCORE) for byte in alphabet] + [(word, _WORD_SCORE) for word in words]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=None, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for token in (*SPECIAL_TOKENS, END_OF_TEXT):
        # Decoded text shows think tags, as with the official tokenizer.
        special = token not in (THINK_START, THINK_END)
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    return tokenizer


class WorldTokenizer:
    """Implements the engine's `Tokenizer` without transformers, fast enough for training."""

    def __init__(self) -> None:
        self._tokenizer = build_tokenizer()
        self._ids: dict[str, int] = self._tokenizer.get_vocab()
        self._known: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        return len(self._ids)

    @property
    def ids(self) -> Mapping[str, int]:
        """The id of every token."""
        return self._ids

    @property
    def eos_id(self) -> int:
        """The id of `<|im_end|>`."""
        return self._ids[IM_END]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the world's plain text, which never spells out a special token."""
        found = self._known.get(text)
        if found is None:
            found = self._tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._known) < MAX_KNOWN:
                self._known[text] = found
        return list(found)

    def token_id(self, token: str) -> int:
        """Returns the id of a special token."""
        return self._ids[token]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids without special tokens."""
        return str(self._tokenizer.decode(list(ids)))
