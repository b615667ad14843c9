"""What a job needs to be run, whatever its task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sensebatch.engine.model.kv_cache import KVCache
from sensebatch.engine.preprocess import Patches
from sensebatch.engine.prompts import branch_prompts
from sensebatch.engine.runner import Runner
from sensebatch.engine.sampling.guidance import UNCOND, Guidance
from sensebatch.errors import JobError
from sensebatch.jobs import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedJob:
    """A job whose inputs have been read."""

    job: Job
    system_prompt: str
    images: Sequence[Patches] = ()
    generator: torch.Generator = field(repr=False)
    """The job's own; all its noise comes from it."""


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
            job = prepared.job
            of_job = [next(embeds) for _ in prepared.images]
            guidance = Guidance(job.task, job.sampling)
            prompts = branch_prompts(
                runner.tokenizer,
                guidance.branches,
                task=job.task,
                system=prepared.system_prompt,
                prompt=job.prompt,
                grids=[image.token_grid for image in prepared.images],
                think=job.think,
            )
            caches = {}
            for branch, prompt in prompts.items():
                if branch == UNCOND and shared is not None:
                    caches[branch] = shared
                    continue
                extension = runner.new_extension(prompt, of_job if prompt.images else ())
                caches[branch] = extension.cache
                shared = extension.cache if branch == UNCOND else shared
                extensions.append(extension)
            running.append(RunningJob(prepared=prepared, guidance=guidance, caches=caches))
        hidden = runner.prefill(extensions)
        if decodes:
            rows = {id(extension.cache): i for i, extension in enumerate(extensions)}
            conds = [rows[id(state.caches["cond"])] for state in running]
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
