"""Interleaved text and pictures: jobs advance together in rounds of writing and drawing.

A round decodes every job to its next `<img>` (or its end), draws the pictures of all jobs that
want one together, keeps them, and re-encodes them into the prefixes. A run that continues from kept
images goes through the same operations with these in place of the denoising, so that it ends in the
same bytes. A stop is heeded on either side of the drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sensebatch.checkpoint.tokenizer import IMG_START
from sensebatch.contract import Channel, Kept, KeptImage
from sensebatch.engine.decoding import end_text
from sensebatch.engine.model.kv_cache import KVCache
from sensebatch.engine.preprocess import drawn_to_patches, to_uint8
from sensebatch.engine.prompts import Grid
from sensebatch.engine.runner import Extension, PassLimits, Runner
from sensebatch.engine.sampling.guidance import COND, IMG_COND
from sensebatch.engine.sampling.text import Script, greedy_decode
from sensebatch.engine.tasks.denoise import Canvas, denoise, draw_noise, passes
from sensebatch.engine.tasks.registry import TaskRunner
from sensebatch.engine.tasks.state import PreparedJob, RunningJob, check_finite, start_jobs
from sensebatch.errors import JobError
from sensebatch.jobs import IMAGE_MARK, Batch, Failure, Job, JobResult
from sensebatch.resolutions import PATCH_PIXELS, Resolution


@dataclass(slots=True, kw_only=True, eq=False)
class Story:
    """One job while it is written."""

    state: RunningJob
    index: int
    """Of the job in its batch; names its kept images."""
    resolutions: Sequence[Resolution]
    """Of each picture; the last serves all that follow."""
    kept: Sequence[KeptImage] = ()
    """Pictures an interrupted run has drawn."""
    num_kept: int = 0
    """Those of them that were taken."""
    text: str = ""
    choices: list[int] = field(default_factory=list)
    """Every greedy choice so far."""
    num_text_tokens: int = 0
    images: list[np.ndarray] = field(default_factory=list)
    """Finished pictures, uint8 `[height, width, 3]`."""
    last: Tensor | None = None
    """The last of them until it is read back, float32 `[3, height, width]` in host memory."""
    error: JobError | None = None

    @property
    def resolution(self) -> Resolution:
        """Of the next picture."""
        return self.resolutions[min(len(self.images), len(self.resolutions) - 1)]


def run_interleave(
    runner: Runner,
    jobs: Sequence[PreparedJob],
    kept: Kept,
    channel: Channel,
    script: Script | None = None,
    *,
    resolutions: Sequence[Sequence[Resolution]] | None = None,
) -> list[JobResult | Failure]:
    """Runs interleave jobs of one group.

    Args:
        runner: The network.
        jobs: Of a batch.
        kept: Images that were drawn before.
        channel: Keeps finished images while others are drawn.
        script: What they write, for synthetic weights.
        resolutions: The size of each image of each job; None draws all at the job's size.

    Returns:
        A result for each job; a failure for one with an image that is not finite.

    Raises:
        BatchStoppedError: A stop was heeded, before pictures were drawn or behind drawn ones
            that others follow, or in text before the first.
    """
    running = start_jobs(runner, jobs, decodes=True)
    stories = [
        Story(
            state=state,
            index=index,
            resolutions=_sizes(state.job) if resolutions is None else resolutions[index],
            kept=kept[index] if index < len(kept) else (),
        )
        for index, state in enumerate(running)
    ]
    writing = stories
    while writing:
        drawing = _write(runner, writing, script)
        _let_go(writing, drawing)
        if drawing:
            runner.heed_stop()
        _draw(runner, drawing, channel)
        writing = [
            story
            for story in drawing
            if story.error is None and len(story.images) < story.state.job.sampling.max_images
        ]
        _let_go(drawing, writing)
        if writing:
            runner.heed_stop()
            _read_back(runner, writing)
    runner.num_kept_images = sum(story.num_kept for story in stories if story.error is None)
    return [_result(story) for story in stories]


def _sizes(job: Job) -> list[Resolution]:
    assert job.resolution is not None
    return [job.resolution]


def _let_go(stories: Sequence[Story], going_on: Sequence[Story]) -> None:
    """Frees the memory of stories that have ended, while others go on."""
    for story in stories:
        if story not in going_on:
            story.state.caches.clear()
            story.last = None


def _write(runner: Runner, stories: Sequence[Story], script: Script | None) -> list[Story]:
    """Decodes every story to its next picture or its end; returns those that want a picture."""
    image_start = runner.tokenizer.token_id(IMG_START)
    caches = [story.state.caches[COND] for story in stories]
    first, limits, scripts = {}, {}, {}
    for place, story in enumerate(stories):
        assert story.state.choice is not None
        first[place] = story.state.choice
        limits[place] = story.state.job.sampling.max_new_tokens - story.num_text_tokens
        if script is not None:
            scripts[place] = script.to_image(story.state.job.sampling)
            limits[place] = len(scripts[place])
    with runner.decoding():
        decoded = greedy_decode(
            first,
            limits,
            runner.text_step(caches, max(limits.values())),
            stop_before=frozenset({runner.tokenizer.eos_id, image_start}),
            scripts=scripts,
        )
    drawing = []
    for place, story in enumerate(stories):
        said = decoded[place]
        story.text += runner.tokenizer.decode(said.tokens)
        story.choices += said.tokens
        story.num_text_tokens += len(said.tokens)
        if said.stopped_by == image_start:
            story.choices.append(image_start)
            drawing.append(story)
    return drawing


def _draw(runner: Runner, stories: Sequence[Story], channel: Channel) -> None:
    """Draws the next picture of every story, those of one size together, or takes a kept one."""
    if not stories:
        return
    image_start = runner.tokenizer.token_id(IMG_START)
    with runner.prefilling(decodes=False):
        caches = [cache for story in stories for cache in _growing(story)]
        runner.bring(caches)
        runner.append_tokens([(cache, [image_start]) for cache in caches])
        conds = [story.state.caches[COND] for story in stories]
        end_text(runner.network, conds, _tokens_read_back(runner, stories))
        runner.park(caches)
    by_size: dict[Resolution, list[tuple[Story, Tensor]]] = {}
    for story in stories:
        # Drawn also where a kept picture makes it needless: the generator must move on.
        generator = story.state.prepared.generator
        noise = draw_noise(runner.network.arch, story.resolution, generator)
        image = _kept_image(story)
        if image is None:
            by_size.setdefault(story.resolution, []).append((story, noise))
        else:
            story.num_kept += 1
            _finish_image(story, image.to(runner.network.device))
    for resolution, group in by_size.items():
        _denoise_stories(runner, group, resolution, channel)


def _tokens_read_back(runner: Runner, stories: Sequence[Story]) -> int:
    """Returns the most tokens of an image that will be read back into a cache on the device."""
    if runner.limits.park is not None:
        return 0
    followed = [
        story.resolution.image_tokens + 1
        for story in stories
        if len(story.images) + 1 < story.state.job.sampling.max_images
    ]
    return max(followed, default=0)


def _growing(story: Story) -> list[KVCache]:
    """Returns the caches that pictures are added to, the conditional one first."""
    caches = story.state.caches
    return [caches[branch] for branch in (COND, IMG_COND) if branch in caches]


def _kept_image(story: Story) -> Tensor | None:
    """Returns the kept image that comes next, if it was drawn after the same text."""
    number = len(story.images)
    if number >= len(story.kept) or list(story.kept[number].tokens) != story.choices:
        return None
    return torch.from_numpy(story.kept[number].image)


def _denoise_stories(
    runner: Runner,
    group: Sequence[tuple[Story, Tensor]],
    resolution: Resolution,
    channel: Channel,
) -> None:
    together = passes(runner, len(group), resolution)
    for number, members in enumerate(together):
        _denoise_pass(runner, group[members], resolution, (number, len(together)))
    drawn = []
    for story, _ in group:
        if story.last is not None:
            kept = KeptImage(image=story.last.numpy(), tokens=tuple(story.choices))
            drawn.append((story.index, kept))
    if drawn:
        channel.keep(drawn)


def _denoise_pass(
    runner: Runner,
    group: Sequence[tuple[Story, Tensor]],
    resolution: Resolution,
    place: tuple[int, int],
) -> None:
    """Draws the pictures of a pass, and leaves nothing of it on the device."""
    sampling = group[0][0].state.job.sampling
    images = denoise(
        runner,
        [
            Canvas(guidance=story.state.guidance, caches=story.state.caches, noise=noise)
            for story, noise in group
        ],
        resolution,
        num_steps=sampling.num_steps,
        timestep_shift=sampling.timestep_shift,
        place=place,
    )
    for (story, _), image in zip(group, images, strict=True):
        _finish_image(story, image)


def _finish_image(story: Story, image: Tensor) -> None:
    try:
        check_finite(image)
    except JobError as error:
        story.error = JobError(f"picture {len(story.images)}: {error}")
        return
    story.images.append(to_uint8(image[None])[0].cpu().numpy())
    story.last = image.cpu()
    story.text += IMAGE_MARK


def _read_back(runner: Runner, stories: Sequence[Story]) -> None:
    """Re-encodes every story's last picture into its prefixes and takes the next choice."""
    with runner.prefilling(decodes=True):
        device = runner.network.device
        pictures = [story.last for story in stories if story.last is not None]
        embeds = runner.embed_images(drawn_to_patches(picture.to(device)) for picture in pictures)
        runner.bring(cache for story in stories for cache in _growing(story))
        extensions: list[Extension] = []
        cond_rows = []
        for story, picture, embed in zip(stories, pictures, embeds, strict=True):
            _, height, width = picture.shape
            grid = Grid(height // PATCH_PIXELS, width // PATCH_PIXELS)
            cond_rows.append(len(extensions))
            extensions += [runner.generated_image(cache, grid, embed) for cache in _growing(story)]
            story.last = None
        choices = runner.choose(runner.prefill(extensions)[cond_rows])
    for story, choice in zip(stories, choices, strict=True):
        story.state.choice = choice


def _result(story: Story) -> JobResult | Failure:
    if story.error is not None:
        return Failure.of(story.error, text_tokens=story.num_text_tokens)
    return JobResult(images=tuple(story.images), text=story.text, text_tokens=story.num_text_tokens)


def _draws_once(batch: Batch, _: PassLimits) -> bool:
    """Returns whether the jobs of a batch draw at most one image each."""
    return all(job.sampling.max_images == 1 for job in batch.jobs)


RUNNER = TaskRunner(run=run_interleave, draws_once=_draws_once)
