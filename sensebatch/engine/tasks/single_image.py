"""Text to image and editing: one image a job, perhaps after a think text.

The two tasks differ in their prompts and guidance only, which know the task themselves. Prompts
and thoughts of a batch go through the network together, then its images are drawn in passes of
a few jobs. The images of a pass that has another one after it are kept. A run that continues from
them reads and thinks again, and then draws only the passes that are not kept whole: a pass among
other neighbours might end in other bytes. So a stop is heeded before a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from sensebatch.checkpoint.tokenizer import THINK_END
from sensebatch.contract import Channel, Kept, KeptImage
from sensebatch.engine.prompts import after_think
from sensebatch.engine.runner import PassLimits, Runner
from sensebatch.engine.sampling.guidance import COND
from sensebatch.engine.sampling.text import Script, Writing
from sensebatch.engine.tasks.denoise import Canvas, denoise, passes
from sensebatch.engine.tasks.keeping import Keeper
from sensebatch.engine.tasks.registry import TaskRunner, WritesTogether
from sensebatch.engine.tasks.state import PreparedJob, RunningJob, start_jobs, take_pixels
from sensebatch.engine.writing import Text
from sensebatch.errors import JobError
from sensebatch.jobs import Batch, Failure, FinishReason, Job, JobResult

Thought = Sequence[int] | None
"""Tokens of a think text; None for a job that does not think."""
Begun: TypeAlias = tuple[list[RunningJob], list[Thought]]
"""Jobs of a batch whose prompts are read, and what they have thought."""


def run_single_image(
    runner: Runner,
    jobs: Sequence[PreparedJob],
    *,
    kept: Kept,
    channel: Channel,
    script: Script | None = None,
) -> list[JobResult | Failure]:
    """Runs t2i or edit jobs of one group.

    Args:
        runner: The network.
        jobs: The jobs of a batch, all with or all without think, of one size and number of steps.
        kept: Images that were drawn before.
        channel: Keeps finished images while others are drawn.
        script: What they think, for synthetic weights.

    Returns:
        A result for each job; a failure for one whose image is not finite.

    Raises:
        BatchStoppedError: A stop was heeded, before a pass or in a thought.
        Exception: What keeping an image raised.
    """
    return finish(runner, begin(runner, jobs, script), kept, channel)


def finish(runner: Runner, begun: Begun, kept: Kept, channel: Channel) -> list[JobResult | Failure]:
    """Draws the images of jobs that have thought; see `run_single_image`."""
    running, thoughts = begun
    drawn_before = [
        _kept_image(kept[index] if index < len(kept) else (), thought)
        for index, thought in enumerate(thoughts)
    ]
    finished: list[np.ndarray | Failure] = []
    drawing = running[0].job.drawing
    assert drawing is not None
    together = passes(runner, len(running), drawing.resolution)
    with Keeper(channel) as keeper:
        for number, members in enumerate(together):
            images = [image for image in drawn_before[members] if image is not None]
            if len(images) == len(drawn_before[members]):
                runner.num_kept_images += len(images)
                for image in images:
                    on_device = torch.from_numpy(image[None]).to(runner.network.device)
                    finished += _pixels(runner, on_device)
                continue
            runner.heed_stop()
            place = (number, len(together))
            pixels, drawn = _draw(runner, running[members], thoughts[members], place=place)
            finished += pixels
            if drawn:
                keeper.keep(list(enumerate(drawn, start=members.start)))
    return [
        _result(runner, state.job, drawn, thought)
        for state, drawn, thought in zip(running, finished, thoughts, strict=True)
    ]


def begin(runner: Runner, jobs: Sequence[PreparedJob], script: Script | None = None) -> Begun:
    """Reads the prompts of jobs and lets them think; returns them with their thoughts."""
    (begun,) = begin_together(runner, [jobs], script)
    return begun


def begin_together(
    runner: Runner, batches: Sequence[Sequence[PreparedJob]], script: Script | None = None
) -> list[Begun]:
    """Returns what `begin` returns of each batch of one group; they think together."""
    thinks = batches[0][0].job.think
    begun = [start_jobs(runner, jobs, decodes=thinks) for jobs in batches]
    if not thinks:
        return [(running, [None] * len(running)) for running in begun]
    thoughts = think(runner, begun, script)
    return [(running, [*said]) for running, said in zip(begun, thoughts, strict=True)]


def draw(runner: Runner, running: Sequence[RunningJob], place: tuple[int, int] = (0, 1)) -> Tensor:
    """Returns the images of a pass, float32 `[J, 3, height, width]`; see `denoise`."""
    canvases = []
    for state in running:
        assert state.prepared.noise is not None
        canvases.append(
            Canvas(guidance=state.guidance, caches=state.caches, noise=state.prepared.noise)
        )
    drawing = running[0].job.drawing
    assert drawing is not None
    return denoise(
        runner,
        canvases,
        drawing=drawing,
        place=place,
    )


def _draw(
    runner: Runner,
    running: Sequence[RunningJob],
    thoughts: Sequence[Thought],
    *,
    place: tuple[int, int],
) -> tuple[list[np.ndarray | Failure], list[KeptImage]]:
    """Draws a pass and leaves nothing of it on the device.

    Returns:
        What `_pixels` makes of each image, and the images if they are to be kept: another pass
        follows, and all of them are finite.
    """
    images = draw(runner, running, place)
    number, count = place
    is_kept = number + 1 < count
    # The pixels come after it, so that it is there when they are.
    copied = runner.copy_images(images) if is_kept else None
    pixels = _pixels(runner, images)
    if copied is None or any(isinstance(one, Failure) for one in pixels):
        return pixels, []
    of_jobs = zip(copied.numpy(), thoughts, strict=True)
    return pixels, [KeptImage(image=i, tokens=tuple(thought or ())) for i, thought in of_jobs]


def _kept_image(kept: Sequence[KeptImage], thought: Thought) -> np.ndarray | None:
    """Returns the image kept for a job, if it was drawn after the same thought.

    The last one, since a pass that was not kept whole was drawn and kept again.
    """
    tokens = tuple(thought or ())
    return next((one.image for one in reversed(kept) if one.tokens == tokens), None)


def _pixels(runner: Runner, images: Tensor) -> list[np.ndarray | Failure]:
    """Returns each image as uint8 `[height, width, 3]`, or the failure of its job."""
    return [
        Failure.of(found) if isinstance(found, JobError) else found
        for found in take_pixels(runner, images)
    ]


def _result(
    runner: Runner, job: Job, drawn: np.ndarray | Failure, thought: Thought
) -> JobResult | Failure:
    num_tokens = len(thought or ())
    if isinstance(drawn, Failure):
        return replace(drawn, think_tokens=num_tokens)
    if thought is None:
        return JobResult(images=(drawn,))
    return JobResult(
        images=(drawn,),
        text=runner.tokenizer.decode(thought),
        think_tokens=num_tokens,
        finish_reason=_finish_reason(runner, job, thought),
    )


def _finish_reason(runner: Runner, job: Job, thought: Sequence[int]) -> FinishReason:
    """Returns why a thought ended."""
    if thought and thought[-1] == runner.tokenizer.token_id(THINK_END):
        return FinishReason.COMPLETE
    if len(thought) >= job.sampling.max_think_tokens:
        return FinishReason.TOKEN_LIMIT
    return FinishReason.UNFINISHED_THOUGHT


def think(
    runner: Runner, batches: Sequence[Sequence[RunningJob]], script: Script | None = None
) -> list[list[list[int]]]:
    """Decodes the think text of every job and caches what leads over to the image.

    Args:
        runner: The network.
        batches: The jobs of each batch, their prompts cached.
        script: What they think, for synthetic weights.

    Returns:
        The tokens of each job of each batch, with `</think>` if the network wrote it.
    """
    texts = [_thought(runner, running, script) for running in batches]
    runner.write(texts)
    return [[said.tokens for said in text.writing.decoded.values()] for text in texts]


def _thought(runner: Runner, running: Sequence[RunningJob], script: Script | None) -> Text:
    """Returns what the jobs of a batch are to think."""
    first, scripts = {}, {}
    for index, state in enumerate(running):
        assert state.choice is not None
        first[index] = state.choice
        if script is not None:
            scripts[index] = script.thought(state.job.sampling)
    return Text(
        caches=[state.caches[COND] for state in running],
        writing=Writing(
            first,
            {index: state.job.sampling.max_think_tokens for index, state in enumerate(running)},
            stop_before=frozenset({runner.tokenizer.eos_id}),
            stop_after=frozenset({runner.tokenizer.token_id(THINK_END)}),
            scripts=scripts,
        ),
        ending=after_think(runner.tokenizer),
    )


def _draws_once(batch: Batch, limits: PassLimits) -> bool:
    """Returns whether the images of a batch are drawn in one pass."""
    drawing = batch.group.drawing
    assert drawing is not None
    return len(batch.jobs) <= limits.together(drawing.resolution)


RUNNER = TaskRunner(
    run=run_single_image,
    draws_once=_draws_once,
    together=WritesTogether(write=begin_together, finish=finish),
)
