"""Interleaved text and images: jobs advance together in rounds of writing and drawing.

A round decodes every job to its next `<img>` (or its end), draws the images of all jobs that want
one together, keeps them, and re-encodes them into the prefixes. A run that continues from kept
images goes through the same operations with these in place of the denoising, so that it ends in the
same bytes. A stop is heeded on either side of the drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from sensebatch.checkpoint.tokenizer import IMG_START
from sensebatch.contract import Channel, Kept, KeptImage
from sensebatch.engine.decoding import end_text
from sensebatch.engine.model.kv_cache import KVCache
from sensebatch.engine.preprocess import drawn_to_patches
from sensebatch.engine.prompts import Grid
from sensebatch.engine.runner import Extension, PassLimits, Runner
from sensebatch.engine.sampling.guidance import COND, IMG_COND
from sensebatch.engine.sampling.text import Script, Writing, decode_text
from sensebatch.engine.tasks.denoise import Canvas, denoise, draw_noise, passes
from sensebatch.engine.tasks.registry import TaskRunner
from sensebatch.engine.tasks.state import PreparedJob, RunningJob, start_jobs, take_pixels
from sensebatch.errors import JobError
from sensebatch.jobs import IMAGE_MARK, Batch, Failure, FinishReason, Job, JobResult
from sensebatch.resolutions import PATCH_PIXELS, Resolution


@dataclass(slots=True, kw_only=True, eq=False)
class InterleaveJob:
    """One job while it is written."""

    state: RunningJob
    index: int
    """The job's place in its batch; names its kept images."""
    resolutions: Sequence[Resolution]
    """The size of each image; the last serves all that follow."""
    kept: Sequence[KeptImage] = ()
    """Images that an interrupted run has drawn."""
    num_kept: int = 0
    """How many of them were taken."""
    text: str = ""
    choices: list[int] = field(default_factory=list)
    """Every greedy choice so far."""
    num_text_tokens: int = 0
    images: list[np.ndarray] = field(default_factory=list)
    """Finished images, uint8 `[height, width, 3]`."""
    last: Tensor | None = None
    """The last of them until it is read back, float32 `[3, height, width]` in host memory."""
    finish_reason: FinishReason = FinishReason.MAX_IMAGES
    """What ends the job, unless its text ends first."""
    failure: Failure | None = None

    @property
    def resolution(self) -> Resolution:
        """The size of the next image."""
        return self.resolutions[min(len(self.images), len(self.resolutions) - 1)]

    @property
    def max_images(self) -> int:
        """Most images the job draws."""
        return self.state.job.sampling.max_images


def run_interleave(
    runner: Runner,
    jobs: Sequence[PreparedJob],
    *,
    kept: Kept,
    channel: Channel,
    script: Script | None = None,
    resolutions: Sequence[Sequence[Resolution]] | None = None,
) -> list[JobResult | Failure]:
    """Runs interleave jobs of one group.

    Args:
        runner: The network.
        jobs: The jobs of a batch.
        kept: Images that were drawn before.
        channel: Keeps finished images while others are drawn.
        script: What they write, for synthetic weights.
        resolutions: The size of each image of each job; None draws all at the job's size.

    Returns:
        A result for each job; a failure for one with an image that is not finite.

    Raises:
        BatchStoppedError: A stop was heeded: before images were drawn, after images that others
            follow, or in the text before the first.
    """
    running = start_jobs(runner, jobs, decodes=True)
    batch = [
        InterleaveJob(
            state=state,
            index=index,
            resolutions=_sizes(state.job) if resolutions is None else resolutions[index],
            kept=kept[index] if index < len(kept) else (),
        )
        for index, state in enumerate(running)
    ]
    writing = batch
    while writing:
        drawing = _write(runner, writing, script)
        _free(writing, drawing)
        if drawing:
            runner.heed_stop()
        _draw(runner, drawing, channel)
        writing = [
            job for job in drawing if job.failure is None and len(job.images) < job.max_images
        ]
        _free(drawing, writing)
        if writing:
            runner.heed_stop()
            _read_back(runner, writing)
    runner.num_kept_images = sum(job.num_kept for job in batch if job.failure is None)
    return [_result(job) for job in batch]


def _sizes(job: Job) -> list[Resolution]:
    assert job.resolution is not None
    return [job.resolution]


def _free(jobs: Sequence[InterleaveJob], unfinished: Sequence[InterleaveJob]) -> None:
    """Frees the memory of jobs that are finished while others continue."""
    for job in jobs:
        if job not in unfinished:
            job.state.caches.clear()
            job.last = None


def _write(
    runner: Runner, jobs: Sequence[InterleaveJob], script: Script | None
) -> list[InterleaveJob]:
    """Decodes every job to its next image or its end; returns those that want an image."""
    image_start = runner.tokenizer.token_id(IMG_START)
    caches = [job.state.caches[COND] for job in jobs]
    first, limits, scripts = {}, {}, {}
    for place, job in enumerate(jobs):
        assert job.state.choice is not None
        first[place] = job.state.choice
        limits[place] = job.state.job.sampling.max_new_tokens - job.num_text_tokens
        if script is not None:
            scripts[place] = script.to_image(job.state.job.sampling)
            limits[place] = len(scripts[place])
    writing = Writing(
        first,
        limits,
        stop_before=frozenset({runner.tokenizer.eos_id, image_start}),
        scripts=scripts,
    )
    with runner.decoding():
        decoded = decode_text(writing, runner.text_step(caches, writing.most_tokens))
    drawing = []
    for place, job in enumerate(jobs):
        said = decoded[place]
        job.text += runner.tokenizer.decode(said.tokens)
        job.choices += said.tokens
        job.num_text_tokens += len(said.tokens)
        if said.stopped_by == image_start:
            job.choices.append(image_start)
            drawing.append(job)
        elif said.stopped_by is None:
            job.finish_reason = FinishReason.TOKEN_LIMIT
        else:
            is_empty = not job.images
            job.finish_reason = FinishReason.STOPPED_EMPTY if is_empty else FinishReason.COMPLETE
    return drawing


def _draw(runner: Runner, jobs: Sequence[InterleaveJob], channel: Channel) -> None:
    """Draws the next image of every job, those of one size together, or takes a kept one."""
    if not jobs:
        return
    image_start = runner.tokenizer.token_id(IMG_START)
    with runner.prefilling(decodes=False):
        caches = [cache for job in jobs for cache in _growing(job)]
        runner.bring(caches)
        runner.append_tokens([(cache, [image_start]) for cache in caches])
        conds = [job.state.caches[COND] for job in jobs]
        end_text(runner.network, conds, _tokens_read_back(runner, jobs))
        runner.park(caches)
    by_size: dict[Resolution, list[tuple[InterleaveJob, Tensor]]] = {}
    for job in jobs:
        # Drawn even if a kept image makes it needless: the generator must advance.
        generator = job.state.prepared.generator
        noise = draw_noise(runner.network.arch, job.resolution, generator)
        image = _kept_image(job)
        if image is None:
            by_size.setdefault(job.resolution, []).append((job, noise))
        else:
            job.num_kept += 1
            _finish_images(runner, [job], image[None].to(runner.network.device))
    for resolution, group in by_size.items():
        _denoise_group(runner, group, resolution, channel=channel)


def _tokens_read_back(runner: Runner, jobs: Sequence[InterleaveJob]) -> int:
    """Returns the most tokens of an image that will be read back into a cache on the device."""
    if runner.limits.park is not None:
        return 0
    followed = [
        job.resolution.image_tokens + 1 for job in jobs if len(job.images) + 1 < job.max_images
    ]
    return max(followed, default=0)


def _growing(job: InterleaveJob) -> list[KVCache]:
    """Returns the caches that images are added to, the conditional one first."""
    caches = job.state.caches
    return [caches[branch] for branch in (COND, IMG_COND) if branch in caches]


def _kept_image(job: InterleaveJob) -> Tensor | None:
    """Returns the kept image that comes next, if it was drawn after the same text."""
    number = len(job.images)
    if number >= len(job.kept) or list(job.kept[number].tokens) != job.choices:
        return None
    return torch.from_numpy(job.kept[number].image)


def _denoise_group(
    runner: Runner,
    group: Sequence[tuple[InterleaveJob, Tensor]],
    resolution: Resolution,
    *,
    channel: Channel,
) -> None:
    together = passes(runner, len(group), resolution)
    for number, members in enumerate(together):
        place = (number, len(together))
        _denoise_pass(runner, group[members], resolution, place=place)
    drawn = []
    for job, _ in group:
        if job.last is not None:
            kept = KeptImage(image=job.last.numpy(), tokens=tuple(job.choices))
            drawn.append((job.index, kept))
    if drawn:
        channel.keep(drawn)


def _denoise_pass(
    runner: Runner,
    group: Sequence[tuple[InterleaveJob, Tensor]],
    resolution: Resolution,
    *,
    place: tuple[int, int],
) -> None:
    """Draws the images of a pass and leaves nothing of it on the device."""
    drawing = group[0][0].state.job.drawing
    assert drawing is not None
    images = denoise(
        runner,
        [
            Canvas(guidance=job.state.guidance, caches=job.state.caches, noise=noise)
            for job, noise in group
        ],
        drawing=replace(drawing, resolution=resolution),
        place=place,
    )
    _finish_images(runner, [job for job, _ in group], images)


def _finish_images(runner: Runner, jobs: Sequence[InterleaveJob], images: Tensor) -> None:
    """Takes an image of each job, or what is wrong with it."""
    for job, image, found in zip(jobs, images, take_pixels(runner, images), strict=True):
        if isinstance(found, JobError):
            job.failure = Failure.of(JobError(f"image {len(job.images)}: {found}"))
            continue
        job.images.append(found)
        job.last = image.cpu()
        job.text += IMAGE_MARK


def _read_back(runner: Runner, jobs: Sequence[InterleaveJob]) -> None:
    """Re-encodes every job's last image into its prefixes and takes the next choice."""
    with runner.prefilling(decodes=True):
        device = runner.network.device
        images = [job.last for job in jobs if job.last is not None]
        embeds = runner.embed_images(drawn_to_patches(image.to(device)) for image in images)
        runner.bring(cache for job in jobs for cache in _growing(job))
        extensions: list[Extension] = []
        cond_rows = []
        for job, image, embed in zip(jobs, images, embeds, strict=True):
            _, height, width = image.shape
            grid = Grid(height // PATCH_PIXELS, width // PATCH_PIXELS)
            cond_rows.append(len(extensions))
            extensions += [runner.generated_image(cache, grid, embed) for cache in _growing(job)]
            job.last = None
        choices = runner.choose(runner.prefill(extensions)[cond_rows])
    for job, choice in zip(jobs, choices, strict=True):
        job.state.choice = choice


def _result(job: InterleaveJob) -> JobResult | Failure:
    if job.failure is not None:
        return replace(job.failure, text_tokens=job.num_text_tokens)
    return JobResult(
        images=tuple(job.images),
        text=job.text,
        text_tokens=job.num_text_tokens,
        finish_reason=job.finish_reason,
    )


def _draws_once(batch: Batch, _: PassLimits) -> bool:
    """Returns whether the jobs of a batch draw at most one image each."""
    return all(job.sampling.max_images == 1 for job in batch.jobs)


RUNNER = TaskRunner(run=run_interleave, draws_once=_draws_once)
