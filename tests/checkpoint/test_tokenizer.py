"""Whether a folder has a tokenizer, as far as its files say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sensebatch.checkpoint.files import TINY_FOLDER, read_folder
from sensebatch.checkpoint.summary import summarise
from sensebatch.checkpoint.tokenizer import SPECIAL_TOKENS, check_tokenizer
from sensebatch.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded checkpoint."""
    return Path(shutil.copytree(TINY_FOLDER, tmp_path / "checkpoint"))


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def test_the_embedded_tokenizer_is_complete(folder: Path) -> None:
    check_tokenizer(folder)
    assert summarise(read_folder(folder)).is_usable


def test_a_checkpoint_without_a_tokenizer_is_not_usable(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    summary = summarise(read_folder(folder))
    assert not summary.is_usable
    assert "tokenizer.json or as vocab.json with merges.txt, found neither" in str(
        summary.tokenizer_problem
    )
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match="found neither"):
        check_tokenizer(folder)


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_a_missing_token_that_prompts_need_is_named(folder: Path, token: str) -> None:
    def without(content: dict[str, Any]) -> None:
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != token]

    edit(folder / "tokenizer.json", without)
    with pytest.raises(CheckpointError, match=f"not found: {re.escape(token)}$"):
        check_tokenizer(folder)


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_are_found_wherever_transformers_looks_for_them(
    folder: Path, name: str
) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("")
    ids = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    listed: object = ids
    if name == "tokenizer_config.json":
        listed = {"added_tokens_decoder": {str(i): {"content": token} for token, i in ids.items()}}
    (folder / name).write_text(json.dumps(listed))
    check_tokenizer(folder)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"[]", "expected a JSON object, found list"),
        (b'{"a":' * 100_000, "nested more than 100 deep"),
        (b"\xef\xbb\xbf{}", "without a byte order mark"),
        (b'{"added_tokens_decoder": 5, "added_tokens": [1, {"content": []}]}', None),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_what_transformers_cannot_read_is_refused_by_name(
    folder: Path, name: str, content: bytes, complaint: str | None
) -> None:
    (folder / name).write_bytes(content)
    if complaint is None:
        check_tokenizer(folder)
        return
    with pytest.raises(CheckpointError, match=complaint) as raised:
        check_tokenizer(folder)
    assert name in str(raised.value)
