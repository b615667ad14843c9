"""Whether a checkpoint has a tokenizer, from its files. No torch, and no transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sensebatch.bounded import BYTE_ORDER_MARK, read_file
from sensebatch.checkpoint.files import read_json
from sensebatch.errors import CheckpointError

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
IMG_START = "<img>"
IMG_END = "</img>"
IMG_CONTEXT = "<IMG_CONTEXT>"
THINK_START = "<think>"
THINK_END = "</think>"
SPECIAL_TOKENS = (IM_START, IM_END, IMG_START, IMG_END, IMG_CONTEXT, THINK_START, THINK_END)
"""The tokens that prompts are laid out with; every checkpoint must have them."""

TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
MAX_TOKENIZER_BYTES = 2**28
"""Largest file of a tokenizer that is read."""


def check_tokenizer(folder: Path) -> None:
    """Checks that a folder has a tokenizer with the tokens that prompts are laid out with.

    Raises:
        CheckpointError: A file is missing or cannot be read, or a token is not found.
    """
    names = {name for name in TOKENIZER_FILES if (folder / name).exists()}
    if "tokenizer.json" not in names and not names >= {"vocab.json", "merges.txt"}:
        raise CheckpointError(
            f"{folder}: expected a tokenizer, as tokenizer.json or as vocab.json with merges.txt, "
            "found neither"
        )
    found: set[str] = set()
    for name in sorted(names - {"merges.txt"}):
        found.update(_tokens(name, _read(folder / name)))
    check_tokens(folder, found)


def check_tokens(folder: Path, found: set[str]) -> None:
    """Checks that prompts can be laid out with these added tokens.

    Raises:
        CheckpointError: One is not found.
    """
    missing = [token for token in SPECIAL_TOKENS if token not in found]
    if missing:
        raise CheckpointError(
            f"tokenizer of {folder}: expected the tokens {' '.join(SPECIAL_TOKENS)}; "
            f"not found: {' '.join(missing)}"
        )


def _read(file: Path) -> dict[str, Any]:
    content = read_json(file, MAX_TOKENIZER_BYTES)
    if read_file(file, MAX_TOKENIZER_BYTES).startswith(BYTE_ORDER_MARK):
        raise CheckpointError(
            f"{file}: expected JSON without a byte order mark, which transformers cannot read"
        )
    return content


def _tokens(name: str, content: Mapping[str, Any]) -> Iterator[str]:
    """Yields the added tokens that a file names."""
    if name == "added_tokens.json":
        yield from content
    elif name == "tokenizer.json":
        yield from _contents(content.get("added_tokens"))
    elif name == "tokenizer_config.json":
        added = content.get("added_tokens_decoder")
        yield from _contents(list(added.values()) if isinstance(added, dict) else None)


def _contents(tokens: object) -> Iterator[str]:
    for token in tokens if isinstance(tokens, list) else []:
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            yield token["content"]
