"""The embedded checkpoint is what its rule makes, complete and small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sensebatch.checkpoint.files import TINY_FOLDER, check_tensors, open_checkpoint
from sensebatch.engine.model.tokenizer import HFTokenizer
from sensebatch.tiny.build import build


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build(folder)
    return folder


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_rebuilding_gives_the_committed_files(rebuilt: Path, name: str) -> None:
    assert (rebuilt / name).read_text() == (TINY_FOLDER / name).read_text()


def test_rebuilding_gives_the_committed_weights(rebuilt: Path) -> None:
    committed = load_file(TINY_FOLDER / "model.safetensors")
    again = load_file(rebuilt / "model.safetensors")
    assert again.keys() == committed.keys()
    for name, weight in committed.items():
        # Another CPU may draw another last bit, which can round to the next bfloat16.
        assert torch.allclose(again[name].float(), weight.float(), rtol=2**-7, atol=1e-6), name


def test_embedded_checkpoint_is_complete_and_small() -> None:
    checkpoint = open_checkpoint("tiny")
    check_tensors(checkpoint)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"BF16"}
    assert sum(file.stat().st_size for file in TINY_FOLDER.iterdir()) < 12_000_000


def test_tokenizer_fills_the_vocabulary() -> None:
    tokenizer = HFTokenizer(TINY_FOLDER)
    vocab_size = open_checkpoint("tiny").architecture.vocab_size
    assert tokenizer.token_id("<|endoftext|>") == vocab_size - 1
