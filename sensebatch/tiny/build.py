"""Builds the embedded checkpoint: `python -m sensebatch.tiny.build [FOLDER]`.

A network of the official architecture, small enough for a laptop, with untrained weights from a
fixed rule: its pictures are noise and its words are chance, but every path of a run is real.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from sensebatch.checkpoint.architecture import Architecture, parse_architecture
from sensebatch.checkpoint.files import TINY_FOLDER
from sensebatch.checkpoint.tensors import expected_tensors
from sensebatch.engine.model.tokenizer import (
    IM_END,
    IMG_START,
    SPECIAL_TOKENS,
    THINK_END,
    THINK_START,
)
from sensebatch.tiny.corpus import sentences

SEED = 19
"""Chosen among a few dozen: with it interleave jobs draw and end, and thinking mostly ends."""
VOCAB_SIZE = 1024
END_OF_TEXT = "<|endoftext|>"
STEERED = {IMG_START: 3.4, IM_END: 2.8, THINK_END: 2.0}
"""Tokens made likely, by how much: without them an untrained network hardly ever draws in an
interleave job, and never stops before the limit."""


def train_tokenizer() -> Tokenizer:
    """Returns a byte-level BPE tokenizer, so that any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = [*SPECIAL_TOKENS, END_OF_TEXT]
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE - len(added),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    for token in added:
        # Think tags are shown in decoded text, as the official tokenizer shows them.
        special = token not in (THINK_START, THINK_END)
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return tokenizer


def tiny_config() -> dict[str, Any]:
    """Returns the content of `config.json`."""
    return {
        "architectures": ["NEOChatModel"],
        "model_type": "neo_chat",
        "template": "neo1_0",
        "patch_size": 16,
        "downsample_ratio": 0.5,
        "use_pixel_head": True,
        "fm_head_layers": 2,
        "concat_time_token_num": 0,
        "noise_scale": 1.0,
        "noise_scale_mode": "resolution",
        "noise_scale_base_image_seq_len": 64,
        "noise_scale_max_value": 4.0,
        "add_noise_scale_embedding": True,
        "vision_config": {"hidden_size": 192, "patch_size": 16, "rope_theta_vision": 10000.0},
        "llm_config": {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 5000000.0,
            "rope_theta_hw": 10000.0,
            "attention_bias": False,
            "tie_word_embeddings": False,
        },
    }


def tiny_weights(arch: Architecture, token_ids: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Returns the weights by name, bfloat16; each is drawn from a generator of its own.

    Args:
        arch: The network's shape.
        token_ids: Ids of at least the `STEERED` tokens.
    """
    weights = {name: _drawn(name, spec.shape) for name, spec in expected_tensors(arch).items()}
    head = weights["language_model.lm_head.weight"]
    for token, factor in STEERED.items():
        head[token_ids[token]] *= factor
    return {name: weight.to(torch.bfloat16) for name, weight in weights.items()}


def build(folder: Path) -> None:
    """Writes the checkpoint: configuration, weights and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": IM_END,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
        },
    )
    config = tiny_config()
    _write_json(folder / "config.json", config)
    weights = tiny_weights(parse_architecture(config), tokenizer.get_vocab())
    file = folder / "model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors leaves it readable by its owner alone


def _drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns a float32 weight that keeps the size of what passes through it."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + SEED)
    drawn = torch.randn(shape, generator=generator)
    if len(shape) == 1 and "norm" in name:
        return 1 + 0.1 * drawn
    if len(shape) == 1:
        return 0.02 * drawn
    if "embed_tokens" in name:
        # Small beside what the layers add, so that words depend on more than the last one.
        return 0.25 * drawn
    return drawn / math.sqrt(math.prod(shape[1:]))


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else TINY_FOLDER)
