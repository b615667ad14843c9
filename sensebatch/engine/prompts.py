"""The chat layout: what the network reads before it draws or writes. Token ids; no torch.

A prompt is text runs, special tokens and places for images. Adjacent text is encoded as one
run, as the reference's tokenizer sees it between two special tokens.
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
from sensebatch.tasks import AssistantStart, Branch, Task


class Grid(NamedTuple):
    """An image in tokens."""

    height: int
    width: int


class ImageSpan(NamedTuple):
    """Where an input image's context tokens are: `[start, start + grid.height * grid.width)`."""

    start: int
    grid: Grid

    @property
    def end(self) -> int:
        """The index behind the last context token."""
        return self.start + self.grid.height * self.grid.width


class Segment(NamedTuple):
    """A run of tokens `[start, end)` that are masked alike.

    A token sees everything before its segment; inside, text sees itself and what is before it,
    an image sees itself whole.
    """

    start: int
    end: int
    is_image: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The tokens of one branch of one job."""

    token_ids: tuple[int, ...]
    images: tuple[ImageSpan, ...] = ()
    """Input images in the order in which the job names them."""
    num_system: int = 0
    """Leading tokens of the system turn, which the job has in common with others."""

    @property
    def system_ids(self) -> tuple[int, ...]:
        """The tokens of the system turn."""
        return self.token_ids[: self.num_system]

    def behind_system(self) -> Prompt:
        """Returns the prompt without its system turn."""
        start = self.num_system
        images = tuple(ImageSpan(image.start - start, image.grid) for image in self.images)
        return Prompt(token_ids=self.token_ids[start:], images=images)


@dataclass(frozen=True, slots=True)
class _Special:
    """A special token of the layout."""

    token: str


Piece = str | _Special | Grid
"""Text, a special token, or an image of that many tokens with `<img>` and `</img>` around."""


def cond_prompt(
    tokenizer: Tokenizer,
    *,
    task: Task,
    system: str,
    prompt: str,
    grids: Sequence[Grid],
    think: bool,
) -> Prompt:
    """Returns the conditional branch: the system prompt, the images and the user's words.

    Args:
        tokenizer: Of the checkpoint.
        task: Decides how images without a mark are placed, and whether `<img>` ends the prompt.
        system: System prompt; empty leaves the system turn out. `<think>` and `</think>` in it
            are the tokens, as the official prompts mean them.
        prompt: The user's; `<image>` marks are places of images, everything else is plain text.
        grids: The input images in tokens, in order.
        think: Whether the network is to think (t2i, edit) or may (interleave).

    Raises:
        JobError: The prompt has more marks than there are images.
    """
    turns = [
        *_user_turn(_place_images(task, prompt, grids)),
        *_assistant_start(task, think),
    ]
    system_turn = _system_turn(system)
    whole = _encode(tokenizer, [*system_turn, *turns])
    # The user's turn begins with a special token, where no run of text goes on.
    return replace(whole, num_system=len(_encode(tokenizer, system_turn).token_ids))


def img_cond_prompt(tokenizer: Tokenizer, *, task: Task, grids: Sequence[Grid]) -> Prompt:
    """Returns the image-conditional branch of edit and interleave: the images without words.

    That of interleave has no `<img>` yet: the one that is decoded is appended to it.
    """
    draws = task.spec.prompt.start is AssistantStart.IMAGE
    ending = [_Special(IMG_START)] if draws else []
    return _encode(tokenizer, [*_user_turn(grids), *ending])


def uncond_prompt(tokenizer: Tokenizer) -> Prompt:
    """Returns the unconditional branch, the same for every task: an empty user turn."""
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
) -> dict[Branch, Prompt]:
    """Returns a job's prompts by branch: `cond`, `img_cond`, `uncond`; see `cond_prompt`."""
    prompts: dict[Branch, Prompt] = {}
    for branch in branches:
        if branch is Branch.COND:
            prompts[branch] = cond_prompt(
                tokenizer, task=task, system=system, prompt=prompt, grids=grids, think=think
            )
        elif branch is Branch.IMG_COND:
            prompts[branch] = img_cond_prompt(tokenizer, task=task, grids=grids)
        else:
            prompts[branch] = uncond_prompt(tokenizer)
    return prompts


def after_think(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the ids appended behind a think text of t2i and edit, however it ended."""
    return _encode(tokenizer, ["\n\n", _Special(IMG_START)]).token_ids


def positions(prompt: Prompt) -> npt.NDArray[np.int64]:
    """Returns each token's position, int64 `[3, tokens]`, rows t, h, w.

    Text counts t up with h = w = 0. The context tokens of an image share one t and carry their
    row and column; `</img>` has the next t.
    """
    num_tokens = len(prompt.token_ids)
    step = np.ones(num_tokens, dtype=np.int64)
    rows = np.zeros((2, num_tokens), dtype=np.int64)
    for span in prompt.images:
        step[span.start + 1 : span.end] = 0
        rows[:, span.start : span.end] = np.indices(span.grid).reshape(2, -1)
    return np.concatenate([(np.cumsum(step) - 1)[None], rows])


def segments(prompt: Prompt) -> list[Segment]:
    """Returns the prompt as text and image runs in order, covering every token once."""
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
    """Returns what is put into the network's mouth."""
    draws = task.spec.prompt.start is AssistantStart.IMAGE
    if think:
        return [_Special(THINK_START), "\n"] if draws else []
    empty: list[Piece] = [_Special(THINK_START), "\n\n", _Special(THINK_END), "\n\n"]
    return [*empty, _Special(IMG_START)] if draws else empty


def _place_images(task: Task, prompt: str, grids: Sequence[Grid]) -> list[Piece]:
    """Returns the user's words with the images at their marks; those without a mark come first."""
    if not task.spec.takes_images:
        return [prompt]
    num_marks = prompt.count(IMAGE_MARK)
    if num_marks > len(grids):
        raise JobError(
            f"prompt: expected at most {len(grids)} {IMAGE_MARK} marks, one for each image, "
            f"found {num_marks}"
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
