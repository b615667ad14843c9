"""Batches of a training run: examples of one picture size, packed into rows of a fixed length.

A batch is a pure function of the seed and the step, whoever makes it, so a resumed run sees what
an uninterrupted one would have seen.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from sensebatch.engine.model.tokenizer import Tokenizer
from sensebatch.resolutions import Resolution
from sensebatch.tiny.layout import (
    Sequence,
    cond_sequence,
    img_cond_sequence,
    uncond_sequence,
)
from sensebatch.tiny.world.draw import Drawing, plan_drawing
from sensebatch.tiny.world.edits import edit
from sensebatch.tiny.world.examples import Example, text_to_image
from sensebatch.tiny.world.scene import Scene, Split, sample_resolution
from sensebatch.tiny.world.stories import story

IGNORED = -100
"""Number of a sequence where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingConfig:
    """What a batch holds."""

    num_rows: int = 128
    row_tokens: int = 416
    """Prompt and answer tokens of a row; the longest example must fit."""
    row_slots: int = 4
    """Pictures denoised in a row."""
    slot_tokens: int = 64
    """Image tokens of the largest picture."""
    text_to_image: float = 0.42
    edit: float = 0.40
    """Parts of the examples; the rest are stories."""
    think: float = 0.3
    edit_think: float = 0.1
    uncond: float = 0.08
    """Part of the examples seen without any condition."""
    img_cond: float = 0.08
    """Part of edits and stories seen with their images alone."""
    patience: int = 24
    """Examples in a row that fit nowhere, after which a batch is full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Rows of packed sequences as arrays.

    R rows, U prompt tokens, S slots, I pictures that are read, D pictures that are denoised,
    L learned tokens.
    """

    resolution: Resolution
    drawing: Drawing
    """Every picture of the batch once."""
    token_ids: torch.Tensor
    """int64 `[R, U]`."""
    positions: torch.Tensor
    """int64 `[3, R, U]`."""
    sequence: torch.Tensor
    """int64 `[R, U]`, which of the row's sequences; `IGNORED` behind the last."""
    label_place: torch.Tensor
    """int64 `[L]`, places in the flattened rows behind which the network has to say a token."""
    label: torch.Tensor
    """int64 `[L]`, that token."""
    image_scene: torch.Tensor
    """int64 `[I]`, the picture that the understanding path reads."""
    image_tokens: torch.Tensor
    """int64 `[I, image tokens]`, where it is in the flattened rows."""
    slot_sequence: torch.Tensor
    """int64 `[R, S]`, the sequence a denoised picture belongs to; `IGNORED` in an empty slot."""
    slot_prefix: torch.Tensor
    """int64 `[R, S]`, the picture sees its sequence up to this place of the row."""
    slot_t: torch.Tensor
    """int64 `[R, S]`, position t of the picture's tokens."""
    drawn_slot: torch.Tensor
    """int64 `[D]`, the filled slots among all of them, flattened."""
    drawn_scene: torch.Tensor
    """int64 `[D]`, the picture of each."""


def sample_example(
    rng: np.random.Generator, config: PackingConfig, resolution: Resolution
) -> Example:
    """Returns a training example of a random task."""
    draw = rng.random()
    if draw < config.text_to_image:
        think = rng.random() < config.think
        return text_to_image(rng, Split.TRAIN, resolution, think=think)
    if draw < config.text_to_image + config.edit:
        return edit(rng, Split.TRAIN, resolution, think=rng.random() < config.edit_think)
    return story(rng, Split.TRAIN, resolution, think=rng.random() < config.think)


def sample_sequence(
    rng: np.random.Generator, tokenizer: Tokenizer, config: PackingConfig, resolution: Resolution
) -> Sequence:
    """Returns an example as one of the guidance branches sees it, mostly the conditional one."""
    example = sample_example(rng, config, resolution)
    draw = rng.random()
    if draw < config.uncond:
        return uncond_sequence(tokenizer, example, rng)
    if draw < config.uncond + config.img_cond and example.task.spec.takes_images:
        return img_cond_sequence(tokenizer, example)
    return cond_sequence(tokenizer, example)


def pack(sequences: Iterator[Sequence], config: PackingConfig) -> list[list[Sequence]]:
    """Returns rows of sequences, first fit, until `patience` of them in a row fit nowhere."""
    rows: list[list[Sequence]] = [[] for _ in range(config.num_rows)]
    free_tokens = np.full(config.num_rows, config.row_tokens)
    free_slots = np.full(config.num_rows, config.row_slots)
    misses = 0
    for sequence in sequences:
        tokens, slots = len(sequence.token_ids), len(sequence.slots)
        fitting = np.flatnonzero((free_tokens >= tokens) & (free_slots >= slots))
        if not len(fitting):
            misses += 1
            if misses == config.patience:
                break
            continue
        misses = 0
        row = int(fitting[0])
        rows[row].append(sequence)
        free_tokens[row] -= tokens
        free_slots[row] -= slots
    return rows


def make_batch(seed: int, step: int, tokenizer: Tokenizer, config: PackingConfig) -> PackedBatch:
    """Returns the batch of a step."""
    rng = np.random.default_rng((seed, step))
    resolution = sample_resolution(rng)

    def sequences() -> Iterator[Sequence]:
        while True:
            yield sample_sequence(rng, tokenizer, config, resolution)

    return collate(pack(sequences(), config), config)


def collate(rows: list[list[Sequence]], config: PackingConfig) -> PackedBatch:
    """Returns rows of sequences, all with pictures of one size, as arrays."""
    token_ids = np.zeros((len(rows), config.row_tokens), dtype=np.int64)
    sequence = np.full_like(token_ids, IGNORED)
    positions = np.zeros((3, *token_ids.shape), dtype=np.int64)
    scenes: dict[Scene, int] = {}
    label_place: list[int] = []
    label: list[int] = []
    image_scene: list[int] = []
    image_tokens: list[np.ndarray] = []
    for row, number, start, member in _placed(rows):
        end = start + len(member.token_ids)
        token_ids[row, start:end] = member.token_ids
        positions[:, row, start:end] = member.positions
        sequence[row, start:end] = number
        first = row * config.row_tokens + start
        label_place += [first + index - 1 for index in member.learned]
        label += [member.token_ids[index] for index in member.learned]
        for span, scene in member.images:
            image_scene.append(scenes.setdefault(scene, len(scenes)))
            image_tokens.append(np.arange(first + span.start, first + span.end))
    slots = _collate_slots(rows, config, scenes)
    resolution = next(iter(scenes)).resolution
    read = np.array(image_tokens, dtype=np.int64).reshape(-1, resolution.image_tokens)
    return PackedBatch(
        resolution=resolution,
        drawing=plan_drawing(list(scenes)),
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        sequence=torch.from_numpy(sequence),
        label_place=torch.tensor(label_place, dtype=torch.int64),
        label=torch.tensor(label, dtype=torch.int64),
        image_scene=torch.tensor(image_scene, dtype=torch.int64),
        image_tokens=torch.from_numpy(read),
        **slots,
    )


def _placed(rows: list[list[Sequence]]) -> Iterator[tuple[int, int, int, Sequence]]:
    """Yields (row, number in the row, first token in the row, sequence)."""
    for row, members in enumerate(rows):
        start = 0
        for number, member in enumerate(members):
            yield row, number, start, member
            start += len(member.token_ids)


def _collate_slots(
    rows: list[list[Sequence]], config: PackingConfig, scenes: dict[Scene, int]
) -> dict[str, Any]:
    """Returns the fields of a batch that say what is denoised; numbers scenes that are new."""
    sequence = np.full((len(rows), config.row_slots), IGNORED, dtype=np.int64)
    prefix, t = np.zeros_like(sequence), np.zeros_like(sequence)
    used = [0] * len(rows)
    drawn_slot: list[int] = []
    drawn_scene: list[int] = []
    for row, number, start, member in _placed(rows):
        for drawn in member.slots:
            slot = used[row]
            used[row] += 1
            drawn_slot.append(row * config.row_slots + slot)
            drawn_scene.append(scenes.setdefault(drawn.scene, len(scenes)))
            sequence[row, slot] = number
            prefix[row, slot] = start + drawn.prefix
            t[row, slot] = member.positions[0, drawn.prefix - 1] + 1
    return {
        "slot_sequence": torch.from_numpy(sequence),
        "slot_prefix": torch.from_numpy(prefix),
        "slot_t": torch.from_numpy(t),
        "drawn_slot": torch.tensor(drawn_slot, dtype=torch.int64),
        "drawn_scene": torch.tensor(drawn_scene, dtype=torch.int64),
    }


class Batches(Dataset[bytes]):
    """Batches by step, pickled, for worker processes.

    As tensors they would pass through shared memory, a file handle each, and run out of them.

    Args:
        seed: Of the run.
        first_step: The step of the first batch.
        num_steps: Steps from there on.
        tokenizer: Of the world.
        config: What a batch holds.
    """

    def __init__(
        self,
        *,
        seed: int,
        first_step: int,
        num_steps: int,
        tokenizer: Tokenizer,
        config: PackingConfig,
    ) -> None:
        self._seed = seed
        self._first_step = first_step
        self._num_steps = num_steps
        self._tokenizer = tokenizer
        self._config = config

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, index: int) -> bytes:
        step = self._first_step + index
        return pickle.dumps(make_batch(self._seed, step, self._tokenizer, self._config))
