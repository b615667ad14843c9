"""The embedded checkpoint is complete, small, and of the shape that training writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sensebatch.checkpoint.files import TINY_FOLDER, check_tensors, open_checkpoint
from sensebatch.checkpoint.system_prompts import resolve_system_prompts
from sensebatch.engine.model.tokenizer import HFTokenizer
from sensebatch.tasks import Task
from sensebatch.tiny.export import network_config
from sensebatch.tiny.vocabulary import (
    END_OF_TEXT,
    GENERATION_PROMPT,
    INTERLEAVE_PROMPT,
    build_tokenizer,
)

pytestmark = pytest.mark.slow

MAX_BYTES = 12_000_000


def test_embedded_checkpoint_is_complete_and_small() -> None:
    checkpoint = open_checkpoint("tiny")
    check_tensors(checkpoint)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"BF16"}
    assert sum(file.stat().st_size for file in TINY_FOLDER.iterdir()) < MAX_BYTES


def test_tokenizer_fills_the_vocabulary() -> None:
    tokenizer = HFTokenizer(TINY_FOLDER)
    vocab_size = open_checkpoint("tiny").architecture.vocab_size
    assert tokenizer.token_id(END_OF_TEXT) == vocab_size - 1


def test_training_would_write_the_committed_configuration_and_tokenizer(tmp_path: Path) -> None:
    config = json.loads((TINY_FOLDER / "config.json").read_text())
    assert config == network_config(open_checkpoint("tiny").architecture.vocab_size)
    build_tokenizer().save(str(tmp_path / "tokenizer.json"))
    committed = json.loads((TINY_FOLDER / "tokenizer.json").read_text())
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == committed


def test_system_prompts_are_those_of_the_training() -> None:
    prompts = resolve_system_prompts(open_checkpoint("tiny"))
    assert prompts.of_task(Task.T2I).text == prompts.of_task(Task.EDIT).text == GENERATION_PROMPT
    assert prompts.of_task(Task.INTERLEAVE).text == INTERLEAVE_PROMPT
