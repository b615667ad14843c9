"""Reads the golden vectors of tests/golden, and rebuilds the models and tokenizer they came from.

The rules are those of tests/golden/README.md.
"""

from __future__ import annotations

import functools
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sensebatch.checkpoint.architecture import Architecture, parse_architecture
from sensebatch.errors import CheckpointError

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = ("dense_fm", "dense_pixel", "moe")
SEEDS = {"dense_fm": 1000, "dense_pixel": 2000, "moe": 3000}
TOLERANCE = 1e-4
SPECIAL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<think>",
    "</think>",
    "<|endoftext|>",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One golden case; tensors are read when asked for."""

    config: str
    name: str
    kind: str
    params: dict[str, Any]
    strings: dict[str, str]
    outputs: dict[str, Any]
    weight_edits: list[dict[str, Any]]
    entries: dict[str, dict[str, Any]]

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def tensor(self, name: str) -> torch.Tensor:
        """Returns a tensor of the case by its name in the case."""
        entry = self.entries[name]
        with safe_open(GOLDEN / self.config / entry["file"], "pt") as file:
            return file.get_tensor(entry["key"])


@functools.cache
def _cases(config: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / config / "cases.json").read_text())["cases"]


def load_cases(config: str, *kinds: str) -> list[Case]:
    """Returns the cases of a folder, all of them or those of some kinds."""
    return [
        Case(
            config=config,
            entries=case["tensors"],
            **{
                key: case[key]
                for key in ("name", "kind", "params", "strings", "outputs", "weight_edits")
            },
        )
        for case in _cases(config)
        if not kinds or case["kind"] in kinds
    ]


def load_case(config: str, name: str) -> Case:
    """Returns one case."""
    return next(case for case in load_cases(config) if case.name == name)


def case_ids(*kinds: str, configs: Sequence[str] = CONFIGS) -> list[tuple[str, str]]:
    """Returns (config, name) of every case of some kinds, to parametrize a test with."""
    return [(config, case.name) for config in configs for case in load_cases(config, *kinds)]


def golden_config(config: str) -> dict[str, Any]:
    """Returns the parsed config.json of a golden model."""
    return json.loads((GOLDEN / config / "config.json").read_text())


def golden_architecture(config: str) -> Architecture:
    """Returns the shape of a golden model."""
    return parse_architecture(golden_config(config))


def weights_manifest(config: str) -> list[dict[str, Any]]:
    """Returns what every weight of a golden model must look like."""
    return json.loads((GOLDEN / config / "weights_manifest.json").read_text())


def rule_tensor(name: str, shape: Sequence[int], seed: int) -> torch.Tensor:
    """Returns a weight of a golden model, float32, drawn by the rule of its name and shape."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    drawn = torch.randn(tuple(shape), generator=generator)
    if len(shape) == 1 and name.endswith("weight") and "norm" in name:
        return 1 + 0.1 * drawn
    if len(shape) == 1:
        return 0.02 * drawn
    if name.endswith("embed_tokens.weight"):
        return 0.5 * drawn
    return drawn / math.sqrt(math.prod(shape[1:]))


def rule_weights(config: str, edits: Sequence[Mapping[str, Any]] = ()) -> dict[str, torch.Tensor]:
    """Returns all weights of a golden model, with a case's edits of `lm_head` applied."""
    weights = {
        entry["name"]: rule_tensor(entry["name"], entry["shape"], SEEDS[config])
        for entry in weights_manifest(config)
    }
    head = weights["language_model.lm_head.weight"]
    pristine = head.clone()
    for edit in edits:
        source = edit["row"] if edit["op"] == "scale" else edit["src_row"]
        head[edit["row"]] = edit["value"] * pristine[source]
    return weights


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest absolute difference over the largest expected magnitude."""
    assert actual.shape == expected.shape, f"{actual.shape} instead of {expected.shape}"
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max())


class ByteTokenizer:
    """The tokenizer of the golden models: UTF-8 bytes and eight special tokens."""

    _SPECIAL = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))

    @property
    def eos_id(self) -> int:
        return self.token_id("<|im_end|>")

    def token_id(self, token: str) -> int:
        if token not in SPECIAL_TOKENS:
            raise CheckpointError(f"tokenizer: expected the token {token}, not found")
        return 256 + SPECIAL_TOKENS.index(token)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_special(self, text: str) -> list[int]:
        """Returns the ids of a whole query, special tokens matched first."""
        ids: list[int] = []
        end = 0
        for match in self._SPECIAL.finditer(text):
            ids += [*text[end : match.start()].encode(), self.token_id(match.group())]
            end = match.end()
        return ids + list(text[end:].encode())

    def decode(self, ids: Sequence[int]) -> str:
        kept = {self.token_id(token): token.encode() for token in ("<think>", "</think>")}
        pieces = (bytes([i]) if i < 256 else kept.get(i, b"") for i in ids)
        return b"".join(pieces).decode(errors="replace")

    def join(self, ids: Sequence[int]) -> str:
        """Returns the text with every special token spelled out."""
        pieces = (bytes([i]) if i < 256 else SPECIAL_TOKENS[i - 256].encode() for i in ids)
        return b"".join(pieces).decode(errors="replace")
