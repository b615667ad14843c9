"""The checkpoint's tokenizer: text stays text, special tokens come only from their names."""

from __future__ import annotations

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from sensebatch.checkpoint.files import TINY_FOLDER
from sensebatch.checkpoint.tokenizer import SPECIAL_TOKENS
from sensebatch.engine.model.tokenizer import HFTokenizer, cut_literals
from sensebatch.errors import CheckpointError, JobError


@pytest.fixture(scope="module")
def tokenizer() -> HFTokenizer:
    return HFTokenizer(TINY_FOLDER)


def copied(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_FOLDER / name, tmp_path / name)
    return tmp_path


def test_plain_text_is_encoded_as_the_tokenizer_itself_does(tokenizer: HFTokenizer) -> None:
    text = "user\nA red circle on the left, 日本, 2048x2048"
    raw = Tokenizer.from_file(str(TINY_FOLDER / "tokenizer.json"))
    assert tokenizer.encode(text) == raw.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_threads_encode_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, busy, gate = HFTokenizer(TINY_FOLDER), threading.Lock(), threading.Barrier(4)
    inner, overlaps = tokenizer._tokenizer, []

    def encode(text: str, **options: bool) -> list[int]:
        overlaps.append(not busy.acquire(blocking=False))
        time.sleep(0.001)
        ids: list[int] = inner.encode(text, **options)
        if not overlaps[-1]:
            busy.release()
        return ids

    monkeypatch.setattr(tokenizer, "_tokenizer", Mock(encode=encode))

    def prepare(_: int) -> list[list[int]]:
        gate.wait()
        return [tokenizer.encode("a red circle") for _ in range(5)]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(prepare, range(4)))
    assert not any(overlaps)
    assert found == 4 * [5 * [inner.encode("a red circle", add_special_tokens=False)]]


words = st.sampled_from([*SPECIAL_TOKENS, "<|endoftext|>", "<", "<|", "<<img>", "</", "a", " "])


@given(st.lists(words | st.text(max_size=3), max_size=8).map("".join))
def test_text_never_becomes_a_special_token(tokenizer: HFTokenizer, text: str) -> None:
    text = text.encode(errors="ignore").decode()
    special = {tokenizer.token_id(token) for token in (*SPECIAL_TOKENS, "<|endoftext|>")}
    assert special.isdisjoint(tokenizer.encode(text))


@given(st.lists(st.sampled_from(["ab", "aba", "b", "a", "x"]), max_size=12).map("".join))
def test_cut_text_holds_no_literal_and_loses_nothing(text: str) -> None:
    parts = cut_literals(text, ["aba", "bb", "xx"])
    assert "".join(parts) == text
    assert not any(literal in part for part in parts for literal in ("aba", "bb", "xx"))
    if not any(literal in text for literal in ("aba", "bb", "xx")):
        assert len(parts) <= 1


def test_lookalike_that_normalises_to_a_special_token_is_the_jobs_error(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["normalized"] = True
    content["normalizer"] = {"type": "NFKC"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(JobError, match="lookalike of the special token <img>"):
        HFTokenizer(folder).encode("\uff1cimg\uff1e")


def test_nothing_is_put_before_or_after_a_text(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    folder = copied(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    number = tokenizer.token_id("<|endoftext|>")
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [end, text, end],
        "pair": [text, text],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [number], "tokens": ["<|endoftext|>"]}
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert HFTokenizer(folder).encode("a cat") == tokenizer.encode("a cat")


def test_half_a_character_is_the_jobs_error(tokenizer: HFTokenizer) -> None:
    with pytest.raises(JobError, match="expected valid Unicode"):
        tokenizer.encode("a \ud800 b")


def test_decoding_shows_think_tags_and_no_other_special_token(tokenizer: HFTokenizer) -> None:
    names = ["<think>", "<img>", "<IMG_CONTEXT>", "</img>", "</think>", "<|im_end|>"]
    names.append("<|endoftext|>")
    ids = [*tokenizer.encode("so ."), *map(tokenizer.token_id, names), tokenizer.encode("é")[0]]
    assert tokenizer.decode(ids) == "so .<think></think>\ufffd"
    assert tokenizer.decode([100_000, -1]) == ""


def test_end_of_turn_ends_decoding(tokenizer: HFTokenizer) -> None:
    assert tokenizer.eos_id == tokenizer.token_id("<|im_end|>")


def test_unknown_token_is_named(tokenizer: HFTokenizer) -> None:
    with pytest.raises(CheckpointError, match="expected the token <video>, not found"):
        tokenizer.token_id("<video>")


def test_tokenizer_without_the_layouts_tokens_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"<IMG_CONTEXT>"', '"<OTHER>"'))
    with pytest.raises(CheckpointError, match="not found: <IMG_CONTEXT>"):
        HFTokenizer(folder)


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    shutil.copy(TINY_FOLDER / "config.json", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"expected a tokenizer, as tokenizer\.json or"):
        HFTokenizer(tmp_path)


def test_a_tokenizer_that_transformers_cannot_load_is_refused(tmp_path: Path) -> None:
    shutil.copy(TINY_FOLDER / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": 5}')
    with pytest.raises(CheckpointError, match="expected a tokenizer that transformers can load"):
        HFTokenizer(tmp_path)


def test_python_files_of_the_folder_are_not_executed(
    tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    folder = copied(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_neo_chat.NEOChatConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_neo_chat.py").write_text("raise SystemExit('executed')")
    assert HFTokenizer(folder).encode("a cat") == tokenizer.encode("a cat")


def test_official_layout_of_tokenizer_files_is_read(tmp_path: Path) -> None:
    """The official folders name Qwen2Tokenizer and may hold vocab.json and merges.txt alone."""
    text = "user\na red circle, and <img> as text"
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(
        [text] * 3,
        trainers.BpeTrainer(
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
        ),
    )
    model = json.loads(trained.to_str())["model"]
    assert model["merges"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    special = (*SPECIAL_TOKENS, "<|endoftext|>")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "unk_token": None,
        "pad_token": "<|endoftext|>",
        "added_tokens_decoder": {
            str(number): {"content": token, "special": "think" not in token, **flags}
            for number, token in enumerate(special, start=len(model["vocab"]))
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copy(TINY_FOLDER / "config.json", tmp_path / "config.json")
    official = HFTokenizer(tmp_path)
    ids = official.encode(text)
    assert official.token_id("<img>") not in ids
    assert official.decode(ids) == text
    first = "user\na red circle"
    assert official.encode(first) == trained.encode(first).ids
    assert official.eos_id == len(model["vocab"]) + special.index("<|im_end|>")
    assert official.decode([official.token_id("<think>"), official.eos_id]) == "<think>"
