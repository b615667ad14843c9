"""What a job needs to be run, whatever its task: first on the host, then its cached prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.engine.model.kv_cache import KVCache
from sensebatch.engine.model.tokenizer import Tokenizer
from sensebatch.engine.preprocess import Patches
from sensebatch.engine.prompts import Prompt, branch_prompts
from sensebatch.engine.runner import Runner
from sensebatch.engine.sampling.guidance import COND, UNCOND, Guidance
from sensebatch.engine.tasks.denoise import draw_noise
from sensebatch.errors import JobError
from sensebatch.jobs import Job, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedJob:
    """A job as far as the host can bring it: decoded, resized, tokenised, its noise drawn."""

    job: Job
    prompts: Mapping[str, Prompt]
    """Of each guidance branch."""
    images: Sequence[Patches] = ()
    """The input images."""
    noise: Tensor | None = None
    """Starting noise of the picture of a t2i or edit job, float32 `[3, height, width]`; an
    interleave job draws its own when it comes to a picture."""
    generator: torch.Generator = field(repr=False)
    """The job's own; all its noise comes from it."""


def prepare_job(
    arch: Architecture,
    tokenizer: Tokenizer,
    job: Job,
    *,
    system_prompt: str,
    images: Sequence[Patches] = (),
) -> PreparedJob:
    """Returns a job ready for the network; uses the CPU alone.

    Raises:
        JobError: The prompt cannot be laid out.
    """
    generator = job_generator(job.seed)
    is_story = job.task is Task.INTERLEAVE
    return PreparedJob(
        job=job,
        prompts=branch_prompts(
            tokenizer,
            Guidance(job.task, job.sampling).branches,
            task=job.task,
            system=system_prompt,
            prompt=job.prompt,
            grids=[image.token_grid for image in images],
            think=job.think,
        ),
        images=images,
        noise=None if is_story else draw_noise(arch, job.resolution, generator),
        generator=generator,
    )


def job_generator(seed: int) -> torch.Generator:
    """Returns the generator of a job's noise; on the CPU whatever the device."""
    return torch.Generator(device="cpu").manual_seed(seed)


@dataclass(slots=True, kw_only=True)
class RunningJob:
    """A job with its prompts cached."""

    prepared: PreparedJob
    guidance: Guidance
    caches: dict[str, KVCache]
    choice: int | None = None
    """The greedy choice behind the conditional prompt, where the job decodes text."""

    @property
    def job(self) -> Job:
        """The job itself."""
        return self.prepared.job


def start_jobs(runner: Runner, jobs: Sequence[PreparedJob], *, decodes: bool) -> list[RunningJob]:
    """Prefills every branch of every job.

    The unconditional prompt is the same for all jobs and is never added to, so it is cached once.

    Args:
        runner: The network.
        jobs: Of one group.
        decodes: Whether text is decoded behind the conditional prompts.
    """
    with runner.prefilling(decodes=decodes):
        images = [image for job in jobs for image in job.images]
        embeds = iter(runner.embed_images(images))
        extensions = []
        running = []
        shared: KVCache | None = None
        for prepared in jobs:
            of_job = [next(embeds) for _ in prepared.images]
            caches = {}
            for branch, prompt in prepared.prompts.items():
                if branch == UNCOND and shared is not None:
                    caches[branch] = shared
                    continue
                extension = runner.new_extension(prompt, of_job if prompt.images else ())
                caches[branch] = extension.cache
                shared = extension.cache if branch == UNCOND else shared
                extensions.append(extension)
            guidance = Guidance(prepared.job.task, prepared.job.sampling)
            running.append(RunningJob(prepared=prepared, guidance=guidance, caches=caches))
        hidden = runner.prefill(extensions)
        if decodes:
            rows = {id(extension.cache): i for i, extension in enumerate(extensions)}
            conds = [rows[id(state.caches[COND])] for state in running]
            for state, choice in zip(running, runner.choose(hidden[conds]), strict=True):
                state.choice = choice
    return running


def check_finite(image: Tensor) -> None:
    """Raises where a picture holds NaN or infinite numbers.

    Args:
        image: float `[3, height, width]`.

    Raises:
        JobError: It does; such a picture would be written as a black or random one.
    """
    if not bool(torch.isfinite(image).all()):
        bad = int((~torch.isfinite(image)).sum())
        raise JobError(f"expected finite pixels, found {bad} that are NaN or infinite")
