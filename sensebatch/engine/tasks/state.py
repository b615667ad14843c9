"""What a job needs to run, whatever its task: what the host prepares, then its cached prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.engine.decoding import Choose, choose_greedily
from sensebatch.engine.model.kv_cache import KVCache
from sensebatch.engine.model.steps import Paced, Steps, run_through
from sensebatch.engine.model.tokenizer import Tokenizer
from sensebatch.engine.preprocess import Patches, to_uint8
from sensebatch.engine.prompts import Prompt, branch_prompts
from sensebatch.engine.runner import CachedPrompts, Extension, Runner, prompt_passes
from sensebatch.engine.sampling.guidance import COND, UNCOND, Guidance
from sensebatch.engine.tasks.denoise import draw_noise
from sensebatch.engine.tasks.noise import Noise, NoiseAhead, Starting
from sensebatch.errors import JobError
from sensebatch.jobs import Job
from sensebatch.resolutions import TOKEN_NUMBERS, Resolution
from sensebatch.tasks import Branch, Output


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedJob:
    """A job after everything that the host does for it: images decoded, prompts tokenised."""

    job: Job
    prompts: Mapping[Branch, Prompt]
    """The prompt of each guidance branch."""
    images: Sequence[Patches] = ()
    """The input images."""
    noise: Starting | None = None
    """What the only image starts from; None for a job that makes another number of images and
    draws noise for each when it comes to it."""
    generator: torch.Generator = field(repr=False)
    """The job's own generator, of all its other noise."""


def prepare_job(
    arch: Architecture,
    tokenizer: Tokenizer,
    job: Job,
    *,
    system_prompt: str,
    images: Sequence[Patches] = (),
    ahead: NoiseAhead | None = None,
) -> PreparedJob:
    """Returns a job that is ready for the network. Uses the CPU alone.

    Args:
        arch: The network's shape.
        tokenizer: The checkpoint's.
        job: What is prepared.
        system_prompt: The text of its system turn.
        images: Its input images.
        ahead: Draws noise before it is used; None to draw it then.

    Raises:
        JobError: The prompt cannot be laid out.
    """
    drawing, noise = job.drawing, None
    if drawing is not None and job.task.spec.output is Output.IMAGE:
        noise = _image_noise(arch, drawing.resolution, job.seed)
        if ahead is not None:
            ahead.announce(noise)
    return PreparedJob(
        job=job,
        prompts=branch_prompts(
            tokenizer,
            (COND,) if drawing is None else drawing.branches,
            task=job.task,
            system=system_prompt,
            prompt=job.prompt,
            history=job.history,
            grids=[image.token_grid for image in images],
            think=job.think,
        ),
        images=images,
        noise=noise,
        generator=job_generator(job.seed),
    )


def _image_noise(arch: Architecture, resolution: Resolution, seed: int) -> Noise:
    def draw(out: Tensor | None) -> Tensor:
        return draw_noise(arch, resolution, job_generator(seed), out)

    return Noise(draw, 4 * TOKEN_NUMBERS * resolution.image_tokens)


def job_generator(seed: int) -> torch.Generator:
    """Returns the generator of a job's noise, which is on the CPU whatever the device.

    Torch's generator for the CPU uses the lower 32 bits of its seed, so seeds that differ in higher
    bits alone give the same noise.
    """
    return torch.Generator(device="cpu").manual_seed(seed)


@dataclass(slots=True, kw_only=True)
class RunningJob:
    """A job with its prompts cached."""

    prepared: PreparedJob
    caches: dict[Branch, KVCache]
    choice: int | None = None
    """The choice after the conditional prompt, if the job decodes text."""

    @property
    def job(self) -> Job:
        """The job itself."""
        return self.prepared.job

    @property
    def guidance(self) -> Guidance:
        """The guidance of the job's images."""
        return Guidance(self.job.task, self.job.sampling)


def start_jobs(
    runner: Runner,
    jobs: Sequence[PreparedJob],
    *,
    decodes: bool,
    choose: Choose = choose_greedily,
) -> list[RunningJob]:
    """Returns jobs with every branch of every one of them prefilled.

    Where their prompts were read ahead, beside the drawing of another batch, what is left of that
    is done. The operations are the same.

    Args:
        runner: The network.
        jobs: Jobs of one group.
        decodes: Whether text is decoded after the conditional prompts.
        choose: Chooses the first token of each.
    """
    with runner.reading():
        ahead, runner.reading_ahead = runner.reading_ahead, None
        read = run_through(read_prompts(runner, jobs, decodes)) if ahead is None else ahead.finish()
        running = [
            RunningJob(prepared=prepared, caches=dict(caches))
            for prepared, caches in zip(jobs, read.caches, strict=True)
        ]
        if decodes:
            choices = runner.choose(read.hidden_SD[read.rows], choose)
            for state, choice in zip(running, choices, strict=True):
                state.choice = choice
    return running


def read_ahead(runner: Runner, jobs: Sequence[PreparedJob]) -> Paced[CachedPrompts]:
    """Returns the reading of a batch's prompts, to be done beside the drawing of another one."""
    lengths = [len(prompt.token_ids) for prompt in _read_prompts(jobs)]
    num_passes = len(prompt_passes(lengths)) + (_system_turns(jobs) != list(runner.system_turns))
    num_images = sum(len(job.images) for job in jobs)
    num_steps = num_images + len(jobs) + num_passes * runner.network.arch.num_layers
    return Paced(read_prompts(runner, jobs), num_steps)


def read_prompts(
    runner: Runner, jobs: Sequence[PreparedJob], decodes: bool = False
) -> Steps[CachedPrompts]:
    """Caches the prompts of every branch of every job; images, jobs and layers are steps.

    What jobs have in common is computed once: the unconditional prompt, which never grows, and each
    system turn. A turn is computed on its own even if only one job has it, so that a job goes
    through the same operations whatever its neighbours.

    Args:
        runner: The network.
        jobs: Jobs of one group.
        decodes: Whether weights are brought for text after the prompts as well.
    """
    system_turns = yield from _cached_system_turns(runner, jobs)
    runner.bring_for_prompts(decodes=decodes)
    embeds: list[Tensor] = []
    for image in (image for job in jobs for image in job.images):
        embeds += runner.embed_images([image])
        yield
    of_images = iter(embeds)
    extensions: list[Extension] = []
    found: list[dict[Branch, KVCache]] = []
    rows = []
    shared: KVCache | None = None
    for prepared in jobs:
        of_job = [next(of_images) for _ in prepared.images]
        caches = {}
        for branch, prompt in prepared.prompts.items():
            if branch == UNCOND and shared is not None:
                caches[branch] = shared
                continue
            system = system_turns.get(prompt.system_ids)
            if branch == COND:
                rows.append(len(extensions))
            extension = _extension(runner, prompt, of_job if prompt.images else (), system)
            caches[branch] = extension.cache
            shared = extension.cache if branch == UNCOND else shared
            extensions.append(extension)
        found.append(caches)
        yield
    # Free a turn that is not kept as soon as its jobs have copied it.
    del system_turns, system
    hidden_SD = yield from runner.prefill_by_layer(extensions)
    return CachedPrompts(caches=found, hidden_SD=hidden_SD, rows=rows)


def _read_prompts(jobs: Sequence[PreparedJob]) -> list[Prompt]:
    """Returns the prompts that are read after the system turns, in order."""
    prompts: list[Prompt] = []
    is_shared = False
    for job in jobs:
        for branch, prompt in job.prompts.items():
            if branch != UNCOND or not is_shared:
                prompts.append(prompt)
            is_shared |= branch == UNCOND
    return prompts


def _extension(
    runner: Runner, prompt: Prompt, embeds: Sequence[Tensor], system: KVCache | None
) -> Extension:
    """Returns a prompt that is to be cached, after its system turn if that is already cached.

    It has its memory from here on, unless caches wait in host memory: room for all jobs in one
    step would take the host longer than the device has work queued.
    """
    has_room = runner.limits.park is None
    if system is None:
        extension = runner.new_extension(prompt, embeds)
        if has_room:
            extension.cache.reserve(len(prompt.token_ids))
        return extension
    own = prompt.after_system()
    if has_room:
        runner.bring([system])
    return Extension(
        cache=system.fork(len(own.token_ids) if has_room else 0),
        prompt=own,
        embeds=embeds,
        num_shared=prompt.num_system,
    )


def _system_turns(jobs: Sequence[PreparedJob]) -> list[tuple[int, ...]]:
    """Returns the tokens of each system turn that jobs have."""
    return list(dict.fromkeys(turn for job in jobs if (turn := job.prompts[COND].system_ids)))


def _cached_system_turns(
    runner: Runner, jobs: Sequence[PreparedJob]
) -> Steps[dict[tuple[int, ...], KVCache]]:
    """Caches the system turns of a batch; the result has them by their tokens.

    If all jobs have the same turn, it is kept for the next batch. It was computed in a pass of its
    own, so a batch that finds it has the same bits as one that computes it.
    """
    turns = _system_turns(jobs)
    kept = runner.system_turns
    if turns == list(kept):
        runner.park(kept.values())
        return dict(kept)
    kept.clear()
    if not turns:
        return {}
    extensions = [runner.new_extension(Prompt(token_ids=turn)) for turn in turns]
    runner.bring_for_prompts(decodes=False)
    yield from runner.prefill_by_layer(extensions)
    found = {turn: made.cache for turn, made in zip(turns, extensions, strict=True)}
    if len(found) == 1:
        kept.update(found)
    return found


def take_pixels(runner: Runner, images: Tensor) -> list[np.ndarray | JobError]:
    """Returns each image of a pass as uint8 `[height, width, 3]`, or what is wrong with it.

    They are copied to the host together, because the device waits until they are there. An image
    with numbers that are NaN or infinite would be written as a black or a random one.

    Args:
        runner: Copies them.
        images: float32 `[J, 3, height, width]`, not clamped.
    """
    finite_J = torch.isfinite(images).flatten(1).all(1)
    pixels = runner.copy_pixels(to_uint8(images))
    # Comes after the pixels, so that they are there when it is.
    return [
        own if is_finite else _not_finite(image)
        for image, own, is_finite in zip(images, pixels, finite_J.tolist(), strict=True)
    ]


def _not_finite(image: Tensor) -> JobError:
    bad = int((~torch.isfinite(image)).sum())
    return JobError(f"expected finite pixels, found {bad} that are NaN or infinite")
