"""Makes the batches of a training run: examples of one image size, packed into rows.

A batch is a pure function of the seed and the step, so a resumed run sees what an uninterrupted one
would have seen. Rows have a fixed length.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from sensebatch.engine.model.tokenizer import Tokenizer
from sensebatch.resolutions import Resolution
from sensebatch.tiny.layout import (
    Sequence,
    asked_sequence,
    cond_sequence,
    img_cond_sequence,
    uncond_sequence,
)
from sensebatch.tiny.world.draw import plan_drawing
from sensebatch.tiny.world.edits import edit
from sensebatch.tiny.world.examples import Example, text_to_image
from sensebatch.tiny.world.questions import ask_together
from sensebatch.tiny.world.scene import Scene, Split, sample_resolution
from sensebatch.tiny.world.stories import story

IGNORED = -100
"""Stands for the number of a sequence where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingConfig:
    """What a batch holds."""

    num_rows: int = 64
    """Rows of examples with images to be denoised."""
    question_rows: int = 192
    """Rows of questions, which the generation path is spared."""
    row_tokens: int = 416
    """Prompt and answer tokens of a row, in which the longest example must fit."""
    row_slots: int = 4
    """How many images are denoised in a row."""
    slot_tokens: int = 64
    """Image tokens of the largest image."""
    text_to_image: float = 0.42
    edit: float = 0.4
    """Shares of the examples with images; the rest are stories."""
    asked: int = 6
    """The most questions about one image or two."""
    think: float = 0.3
    edit_think: float = 0.1
    uncond: float = 0.08
    """Share of the examples that are seen without any condition."""
    img_cond: float = 0.08
    """Share of edits and stories that are seen with their images alone."""
    patience: int = 24
    """A batch is full after so many examples in succession have fit nowhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Packed sequences as arrays.

    R rows, P of them with images to be denoised, U prompt tokens, S slots, C images, I images that
    are read, F of them that are blended, D images that are denoised, L learned tokens.
    """

    resolution: Resolution
    pattern: torch.Tensor
    """int64 `[C]`, of the images of the batch, each once, as `plan_drawing` makes it."""
    soft: torch.Tensor
    shape: torch.Tensor
    geometry: torch.Tensor
    colour: torch.Tensor
    """The other arrays of the same drawing."""
    token_ids: torch.Tensor
    """int32 `[R, U]`."""
    positions: torch.Tensor
    """int32 `[3, R, U]`."""
    sequence: torch.Tensor
    """int32 `[R, U]`, which of the row's sequences a token is of; `IGNORED` after the last."""
    fork: torch.Tensor
    """int32 `[R, U]`, which of the questions of a sequence a token is of; 0 if of all."""
    label_place: torch.Tensor
    """int64 `[L]`, places in the flattened rows after which the network must choose a token."""
    label: torch.Tensor
    """int64 `[L]`, that token."""
    answer_weight: torch.Tensor
    """float32 `[L]`, its weight if it is of the answer to a question, else 0."""
    image_scene: torch.Tensor
    """int64 `[I]`, the images that the understanding path reads."""
    faint_read: torch.Tensor
    """int64 `[F]`, which of these are blended with other images."""
    faint_scene: torch.Tensor
    """int64 `[F]`, the other images."""
    image_tokens: torch.Tensor
    """int64 `[I, image tokens]`, their places in the flattened rows."""
    slot_sequence: torch.Tensor
    """int64 `[P, S]`, the sequence of each denoised image; `IGNORED` in an empty slot."""
    slot_prefix: torch.Tensor
    """int64 `[P, S]`, the place in the row up to which the image sees its sequence."""
    slot_t: torch.Tensor
    """int64 `[P, S]`, position t of the image's tokens."""
    drawn_slot: torch.Tensor
    """int64 `[D]`, the filled slots among all flattened slots."""
    drawn_scene: torch.Tensor
    """int64 `[D]`, the image in each of them."""


def sample_example(
    rng: np.random.Generator, config: PackingConfig, resolution: Resolution
) -> Example:
    """Returns a training example of a random task that draws."""
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
    """Returns an example as a random guidance branch sees it, mostly the conditional one."""
    example = sample_example(rng, config, resolution)
    draw = rng.random()
    if draw < config.uncond:
        return uncond_sequence(tokenizer, example, rng)
    if draw < config.uncond + config.img_cond and example.task.spec.takes_images:
        return img_cond_sequence(tokenizer, example)
    return cond_sequence(tokenizer, example)


def sample_questions(
    rng: np.random.Generator, tokenizer: Tokenizer, config: PackingConfig, resolution: Resolution
) -> Sequence:
    """Returns questions about the same image or the same two."""
    return asked_sequence(tokenizer, ask_together(rng, Split.TRAIN, resolution, config.asked))


def pack(
    sequences: Iterator[Sequence], config: PackingConfig, num_rows: int
) -> list[list[Sequence]]:
    """Returns rows of sequences by first fit, until `patience` in succession fit nowhere."""
    rows: list[list[Sequence]] = [[] for _ in range(num_rows)]
    free_tokens = np.full(num_rows, config.row_tokens)
    free_slots = np.full(num_rows, config.row_slots)
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

    def sequences(sample: Callable[..., Sequence]) -> Iterator[Sequence]:
        while True:
            yield sample(rng, tokenizer, config, resolution)

    rows = pack(sequences(sample_sequence), config, config.num_rows)
    rows += pack(sequences(sample_questions), config, config.question_rows)
    return collate(rows, config)


def collate(rows: list[list[Sequence]], config: PackingConfig) -> PackedBatch:
    """Returns rows of sequences as arrays; all images have one size.

    Only the first `num_rows` of the rows have images to be denoised.
    """
    token_ids = np.zeros((len(rows), config.row_tokens), dtype=np.int32)
    sequence, fork = np.full_like(token_ids, IGNORED), np.zeros_like(token_ids)
    positions = np.zeros((3, *token_ids.shape), dtype=np.int32)
    scenes: dict[Scene, int] = {}
    label_place: list[int] = []
    label: list[int] = []
    image_scene: list[int] = []
    image_tokens: list[np.ndarray] = []
    answer_weight: list[float] = []
    faint: list[tuple[int, int]] = []
    for row, number, start, member in _placed(rows):
        end = start + len(member.token_ids)
        token_ids[row, start:end] = member.token_ids
        positions[:, row, start:end] = member.positions
        sequence[row, start:end] = number
        for question, place in enumerate(member.forks, start=1):
            fork[row, start + place : end] = question
        first = row * config.row_tokens + start
        label_place += [first + index - 1 for index in member.learned]
        label += [member.token_ids[index] for index in member.learned]
        # Long answers count more than short ones, but not by all of their tokens.
        weights = [count**-0.5 for count in member.answers for _ in range(count)]
        answer_weight += weights or [0.0] * len(member.learned)
        if member.faint is not None:
            faint.append((len(image_scene), scenes.setdefault(member.faint, len(scenes))))
        for span, scene in member.images:
            image_scene.append(scenes.setdefault(scene, len(scenes)))
            image_tokens.append(np.arange(first + span.start, first + span.end))
    slots = _collate_slots(rows[: config.num_rows], config, scenes)
    resolution = next(iter(scenes)).resolution
    read = np.array(image_tokens, dtype=np.int64).reshape(-1, resolution.image_tokens)
    return PackedBatch(
        resolution=resolution,
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        sequence=torch.from_numpy(sequence),
        fork=torch.from_numpy(fork),
        label_place=torch.tensor(label_place, dtype=torch.int64),
        label=torch.tensor(label, dtype=torch.int64),
        answer_weight=torch.tensor(answer_weight, dtype=torch.float32),
        image_scene=torch.tensor(image_scene, dtype=torch.int64),
        faint_read=torch.tensor([read for read, _ in faint], dtype=torch.int64),
        faint_scene=torch.tensor([scene for _, scene in faint], dtype=torch.int64),
        image_tokens=torch.from_numpy(read),
        **slots,
        **_collate_drawing(list(scenes)),
    )


def _collate_drawing(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """Returns the fields of a batch from which its images are painted."""
    drawing = plan_drawing(scenes)
    return {
        name: torch.from_numpy(getattr(drawing, name))
        for name in ("pattern", "soft", "shape", "geometry", "colour")
    }


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
    """Returns the fields of a batch about denoised images, and numbers new scenes."""
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
    """Makes batches by step in worker processes, and pickles them.

    Tensors would pass through shared memory and use up its file handles.

    Args:
        seed: The run's seed.
        first_step: The step of the first batch.
        num_steps: How many steps there are from then on.
        tokenizer: The world's.
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
