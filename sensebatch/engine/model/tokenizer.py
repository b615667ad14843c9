"""Turns text into token ids and back. Knows the vocabulary, not the layout of prompts.

Special tokens come from `token_id` alone: text that spells one out stays text.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from sensebatch.checkpoint.tokenizer import (
    IM_END,
    SPECIAL_TOKENS,
    THINK_END,
    THINK_START,
    check_tokenizer,
    check_tokens,
)
from sensebatch.errors import CheckpointError, JobError


class Tokenizer(Protocol):
    """What prompts and decoding need of a tokenizer."""

    @property
    def eos_id(self) -> int:
        """The token that ends a turn, and decoding with it."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of plain text, never those of special tokens."""

    def token_id(self, token: str) -> int:
        """Returns the id of a special token.

        Raises:
            CheckpointError: The vocabulary lacks it.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, without special tokens except `<think>` and `</think>`.

        Ids outside the vocabulary add nothing; malformed UTF-8 becomes U+FFFD.
        """


class HFTokenizer:
    """The tokenizer of a checkpoint folder, read through transformers without remote code.

    Args:
        folder: Holds `tokenizer_config.json` and the vocabulary.

    Raises:
        CheckpointError: The folder has no tokenizer that transformers can load, or it lacks one
            of the special tokens of the chat layout.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = _load(folder)
        # Settings of a tokenizer's own are changed by its first call, which some versions refuse
        # while another thread encodes.
        self._encoding = threading.Lock()
        added = self._tokenizer.added_tokens_decoder
        self._ids = {token.content: index for index, token in added.items()}
        single = [content for content in self._ids if len(content) == 1]
        if single:
            raise CheckpointError(
                f"tokenizer of {folder}: expected added tokens of two characters or more, "
                f"found {single[0]!r}"
            )
        check_tokens(folder, set(self._ids))
        kept = {self._ids[THINK_START], self._ids[THINK_END]}
        flagged = {index for index, token in added.items() if token.special}
        layout = {self._ids[token] for token in SPECIAL_TOKENS}
        self._skipped = (flagged | layout) - kept
        self._num_tokens = len(self._tokenizer)

    @property
    def eos_id(self) -> int:
        """The id of `<|im_end|>`."""
        return self._ids[IM_END]

    def token_id(self, token: str) -> int:
        """See `Tokenizer.token_id`."""
        if token not in self._ids:
            raise CheckpointError(f"tokenizer: expected the token {token}, not found")
        return self._ids[token]

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`.

        Raises:
            JobError: The text is not valid Unicode, or the tokenizer's Unicode normalisation turns
                it into a special token, so that it cannot stay text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise JobError(f"prompt: expected valid Unicode: {error}") from error
        ids: list[int] = []
        with self._encoding:
            for part in cut_literals(text, self._ids):
                ids += self._tokenizer.encode(part, add_special_tokens=False)
        special = set(self._ids.values())
        for index in ids:
            if index in special:
                token = self._tokenizer.convert_ids_to_tokens(index)
                raise JobError(
                    f"prompt: expected plain text, found a lookalike of the special token {token}"
                )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        kept = [i for i in ids if i not in self._skipped and 0 <= i < self._num_tokens]
        return str(
            self._tokenizer.decode(
                kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


def cut_literals(text: str, literals: Iterable[str]) -> list[str]:
    """Cuts a text into parts, none of which contains a literal.

    Every occurrence is cut after its first character, so that a tokenizer that is given one part
    at a time cannot match it. Text without a literal stays whole.

    Args:
        text: What a user wrote.
        literals: Strings of two characters or more.
    """
    cuts: set[int] = set()
    for literal in literals:
        start = text.find(literal)
        while start >= 0:
            cuts.add(start + 1)
            start = text.find(literal, start + 1)
    bounds = [0, *sorted(cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds) if a < b]


def _load(folder: Path) -> Any:
    # First, because transformers reads without bounds.
    check_tokenizer(folder)
    # Imported late: it takes half a second, and tests build prompts without it.
    from transformers import AutoTokenizer
    from transformers.utils import logging

    # The folder's config.json does not name a model that transformers knows, so it would warn.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: expected a tokenizer that transformers can load, found: {error}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
