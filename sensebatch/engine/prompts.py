"""The chat layout: what the network reads before it draws or writes. Token ids; no torch.

A prompt consists of text, special tokens and images. Adjacent text is encoded as one run, which
is how the reference's tokenizer sees the text between two special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sensebatch.checkpoint.tokenizer import (
    IM_END,
    IM_START,
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
    THINK_END,
    THINK_START,
)
from sensebatch.engine.model.tokenizer import Tokenizer
from sensebatch.errors import JobError
from sensebatch.jobs import IMAGE_MARK
from sensebatch.tasks import Branch, Task


class Grid(NamedTuple):
    """The size of an image in tokens."""

    height: int
    width: int


class ImageSpan(NamedTuple):
    """The context tokens of an input image: `[start, start + grid.height * grid.width)`."""

    start: int
    grid: Grid

    @property
    def end(self) -> int:
        """The index after the last context token."""
        return self.start + self.grid.height * self.grid.width


class Segment(NamedTuple):
    """A run of tokens `[start, end)` that are masked alike.

    Every token attends to everything before its segment. Inside its segment, a text token attends
    to itself and what precedes it, an image token to the whole image.
    """

    start: int
    end: int
    is_image: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The tokens of one branch of one job."""

    token_ids: tuple[int, ...]
    images: tuple[ImageSpan, ...] = ()
    """The input images in the job's order."""
    num_system: int = 0
    """How many tokens at the start belong to the system turn, which jobs have in common."""

    @property
    def system_ids(self) -> tuple[int, ...]:
        """The tokens of the system turn."""
        return self.token_ids[: self.num_system]

    def after_system(self) -> Prompt:
        """Returns what follows the system turn."""
        start = self.num_system
        images = tuple(ImageSpan(image.start - start, image.grid) for image in self.images)
        return Prompt(token_ids=self.token_ids[start:], images=images)


@dataclass(frozen=True, slots=True)
class _Special:
    """A special token of the layout."""

    token: str


Piece = str | _Special | Grid
"""Text, a special token, or an image of so many tokens between `<img>` and `</img>`."""


def cond_prompt(
    tokenizer: Tokenizer,
    *,
    task: Task,
    system: str,
    prompt: str,
    grids: Sequence[Grid],
    think: bool,
    history: Sequence[tuple[str, str]] = (),
) -> Prompt:
    """Returns the conditional branch: the system prompt, the images and the user's words.

    Args:
        tokenizer: The checkpoint's.
        task: Its row says where images without a mark go and how the assistant's turn begins.
        system: The system prompt; without one there is no system turn. `<think>` and `</think>` in
            it are the special tokens, as the official prompts mean them.
        prompt: The user's words. `<image>` marks are places of images; all else is plain text.
        grids: The sizes of the input images, in order.
        think: Whether the network thinks first; an interleave job only may.
        history: The questions before, each with its answer; then every image has a mark.

    Raises:
        JobError: The prompt has more marks than there are images.
    """
    before, asked = _place_all(task, prompt, history, grids)
    turns = [*before, *_user_turn(asked), *_assistant_start(task, think)]
    system_turn = _system_turn(system)
    whole = _encode(tokenizer, [*system_turn, *turns])
    # The user's turn begins with a special token, so no run of text crosses the border.
    return replace(whole, num_system=len(_encode(tokenizer, system_turn).token_ids))


def img_cond_prompt(tokenizer: Tokenizer, *, task: Task, grids: Sequence[Grid]) -> Prompt:
    """Returns the image-conditional branch: the input images without words.

    It has no `<img>` if the network writes first: the one that it decodes is appended.
    """
    ending = [_Special(IMG_START)] if task.spec.prompt.opens_image else []
    return _encode(tokenizer, [*_user_turn(grids), *ending])


def uncond_prompt(tokenizer: Tokenizer) -> Prompt:
    """Returns the unconditional branch, which is the same for every task: an empty user turn."""
    return _encode(tokenizer, [*_user_turn([]), _Special(IMG_START)])


def branch_prompts(
    tokenizer: Tokenizer,
    branches: Iterable[Branch],
    *,
    task: Task,
    system: str,
    prompt: str,
    grids: Sequence[Grid],
    think: bool,
    history: Sequence[tuple[str, str]] = (),
) -> dict[Branch, Prompt]:
    """Returns a job's prompts by branch; see `cond_prompt`."""
    prompts: dict[Branch, Prompt] = {}
    for branch in branches:
        if branch is Branch.COND:
            prompts[branch] = cond_prompt(
                tokenizer,
                task=task,
                system=system,
                prompt=prompt,
                grids=grids,
                think=think,
                history=history,
            )
        elif branch is Branch.IMG_COND:
            prompts[branch] = img_cond_prompt(tokenizer, task=task, grids=grids)
        else:
            prompts[branch] = uncond_prompt(tokenizer)
    return prompts


def after_think(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the ids that lead from a think text, however it ended, to the image."""
    return _encode(tokenizer, ["\n\n", _Special(IMG_START)]).token_ids


def positions(prompt: Prompt) -> npt.NDArray[np.int64]:
    """Returns each token's position, int64 `[3, tokens]`, in rows t, h, w.

    Text counts t up and has h = w = 0. The context tokens of an image share one t and have their
    row and column as h and w; `</img>` has the next t.
    """
    num_tokens = len(prompt.token_ids)
    step = np.ones(num_tokens, dtype=np.int64)
    rows = np.zeros((2, num_tokens), dtype=np.int64)
    for span in prompt.images:
        step[span.start + 1 : span.end] = 0
        rows[:, span.start : span.end] = np.indices(span.grid).reshape(2, -1)
    return np.concatenate([(np.cumsum(step) - 1)[None], rows])


def segments(prompt: Prompt) -> list[Segment]:
    """Returns the text and image segments of a prompt in order; together they cover every token."""
    runs: list[Segment] = []
    end = 0
    for span in prompt.images:
        runs += [Segment(end, span.start, False), Segment(span.start, span.end, True)]
        end = span.end
    return [*runs, Segment(end, len(prompt.token_ids), False)]


def _system_turn(system: str) -> list[Piece]:
    if not system:
        return []
    parts = re.split(f"({THINK_START}|{THINK_END})", system)
    content = [_Special(part) if part in (THINK_START, THINK_END) else part for part in parts]
    return [_Special(IM_START), "system\n", *content, _Special(IM_END), "\n"]


def _user_turn(content: Iterable[Piece]) -> list[Piece]:
    header: list[Piece] = [_Special(IM_START), "user\n"]
    return [*header, *content, _Special(IM_END), "\n", _Special(IM_START), "assistant\n"]


def _assistant_start(task: Task, think: bool) -> list[Piece]:
    """Returns the beginning of the assistant's turn."""
    rule = task.spec.prompt
    if think:
        return [_Special(THINK_START), "\n"] if rule.opens_thought else []
    pieces: list[Piece] = []
    if rule.empty_thought:
        pieces += [_Special(THINK_START), "\n\n", _Special(THINK_END), "\n\n"]
    if rule.opens_image:
        pieces.append(_Special(IMG_START))
    return pieces


def _place_all(
    task: Task, prompt: str, history: Sequence[tuple[str, str]], grids: Sequence[Grid]
) -> tuple[list[Piece], list[Piece]]:
    """Returns the turns before the user's last words, and these words, with images in them.

    Source: upstream's chat with a history, in which marks of all turns are replaced in their order
    and none is added.
    """
    before: list[Piece] = []
    left = list(grids)
    for question, answer in history:
        asked, said = (
            _place_images(task, text, [left.pop(0) for _ in range(_marks(text, left))])
            for text in (question, answer)
        )
        before += [*_user_turn(asked), *said, _Special(IM_END), "\n"]
    if history and prompt.count(IMAGE_MARK) != len(left):
        raise JobError(
            f"history: expected an {IMAGE_MARK} mark for each image of a conversation, found "
            f"{len(left)} images for the last question, which has {prompt.count(IMAGE_MARK)}"
        )
    return before, _place_images(task, prompt, left)


def _marks(text: str, grids: Sequence[Grid]) -> int:
    return min(text.count(IMAGE_MARK), len(grids))


def _place_images(task: Task, prompt: str, grids: Sequence[Grid]) -> list[Piece]:
    """Returns the user's words with images at their marks, and those without a mark in front."""
    if not task.spec.takes_images:
        return [prompt]
    num_marks = prompt.count(IMAGE_MARK)
    if num_marks > len(grids):
        raise JobError(
            f"prompt: expected at most one {IMAGE_MARK} mark per image, found {num_marks} for "
            f"{len(grids)}"
        )
    if task.spec.prompt.numbered and num_marks == 0 and len(grids) > 1:
        prefix = "".join(f"Image-{i}:{IMAGE_MARK}\n" for i in range(1, len(grids) + 1))
    else:
        prefix = f"{IMAGE_MARK}\n" * (len(grids) - num_marks)
    first, *rest = (prefix + prompt).split(IMAGE_MARK)
    pieces: list[Piece] = [first]
    for grid, text in zip(grids, rest, strict=True):
        pieces += [grid, text]
    return pieces


def _encode(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> Prompt:
    ids: list[int] = []
    images: list[ImageSpan] = []
    run = ""
    for piece in pieces:
        if isinstance(piece, str):
            run += piece
            continue
        ids += tokenizer.encode(run) if run else []
        run = ""
        if isinstance(piece, _Special):
            ids.append(tokenizer.token_id(piece.token))
            continue
        ids.append(tokenizer.token_id(IMG_START))
        images.append(ImageSpan(len(ids), piece))
        ids += [tokenizer.token_id(IMG_CONTEXT)] * (piece.height * piece.width)
        ids.append(tokenizer.token_id(IMG_END))
    ids += tokenizer.encode(run) if run else []
    return Prompt(token_ids=tuple(ids), images=tuple(images))
