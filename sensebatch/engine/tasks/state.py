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
from sensebatch.engine.runner import Extension, Runner
from sensebatch.engine.sampling.guidance import COND, UNCOND, Guidance
from sensebatch.engine.tasks.denoise import draw_noise
from sensebatch.errors import JobError
from sensebatch.jobs import Job
from sensebatch.tasks import Branch, Output


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedJob:
    """A job as far as the host can bring it: decoded, resized, tokenised, its noise drawn."""

    job: Job
    prompts: Mapping[Branch, Prompt]
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
    drawing = job.drawing
    noise = None
    if drawing is not None and job.task.spec.output is Output.IMAGE:
        noise = draw_noise(arch, drawing.resolution, generator)
    return PreparedJob(
        job=job,
        prompts=branch_prompts(
            tokenizer,
            (COND,) if drawing is None else drawing.branches,
            task=job.task,
            system=system_prompt,
            prompt=job.prompt,
            grids=[image.token_grid for image in images],
            think=job.think,
        ),
        images=images,
        noise=noise,
        generator=generator,
    )


def job_generator(seed: int) -> torch.Generator:
    """Returns the generator of a job's noise; on the CPU whatever the device.

    Torch's generator for the CPU takes the lower 32 bits of its seed, so seeds that differ above
    them give the same noise.
    """
    return torch.Generator(device="cpu").manual_seed(seed)


@dataclass(slots=True, kw_only=True)
class RunningJob:
    """A job with its prompts cached."""

    prepared: PreparedJob
    caches: dict[Branch, KVCache]
    choice: int | None = None
    """The greedy choice behind the conditional prompt, where the job decodes text."""

    @property
    def job(self) -> Job:
        """The job itself."""
        return self.prepared.job

    @property
    def guidance(self) -> Guidance:
        """The guidance of the job's images."""
        return Guidance(self.job.task, self.job.sampling)


def start_jobs(runner: Runner, jobs: Sequence[PreparedJob], *, decodes: bool) -> list[RunningJob]:
    """Prefills every branch of every job.

    What is the same is computed once: the unconditional prompt, which is never added to, for all
    jobs, and the system turn for all that have it. The turn is computed apart also where one job
    has it, so that a job goes through the same operations whatever its neighbours.

    Args:
        runner: The network.
        jobs: Of one group.
        decodes: Whether text is decoded behind the conditional prompts.
    """
    system_turns = _cached_system_turns(runner, jobs)
    with runner.prefilling(decodes=decodes):
        embeds = iter(runner.embed_images(image for job in jobs for image in job.images))
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
                system = system_turns.get(prompt.system_ids)
                extension = _extension(runner, prompt, of_job if prompt.images else (), system)
                caches[branch] = extension.cache
                shared = extension.cache if branch == UNCOND else shared
                extensions.append(extension)
            running.append(RunningJob(prepared=prepared, caches=caches))
        # A turn that is not kept is gone as soon as its jobs have taken it over.
        del system_turns, system
        hidden = runner.prefill(extensions)
        if decodes:
            rows = {id(extension.cache): i for i, extension in enumerate(extensions)}
            conds = [rows[id(state.caches[COND])] for state in running]
            for state, choice in zip(running, runner.choose(hidden[conds]), strict=True):
                state.choice = choice
    return running


def _extension(
    runner: Runner, prompt: Prompt, embeds: Sequence[Tensor], system: KVCache | None
) -> Extension:
    """Returns a prompt to be cached, behind its system turn where that is cached."""
    if system is None:
        return runner.new_extension(prompt, embeds)
    return Extension(
        cache=system.fork(),
        prompt=prompt.behind_system(),
        embeds=embeds,
        num_shared=prompt.num_system,
    )


def _cached_system_turns(
    runner: Runner, jobs: Sequence[PreparedJob]
) -> dict[tuple[int, ...], KVCache]:
    """Returns the system turns of a batch, by their tokens.

    If all jobs have the same, it is kept for the next batch. It was then computed in a pass of
    its own, so that a batch that finds it there has the same bits as one that computes it.
    """
    turns = list(dict.fromkeys(turn for job in jobs if (turn := job.prompts[COND].system_ids)))
    kept = runner.system_turns
    if turns == list(kept):
        runner.park(kept.values())
        return dict(kept)
    kept.clear()
    if not turns:
        return {}
    extensions = [runner.new_extension(Prompt(token_ids=turn)) for turn in turns]
    with runner.prefilling(decodes=False):
        runner.prefill(extensions)
    found = {turn: made.cache for turn, made in zip(turns, extensions, strict=True)}
    if len(found) == 1:
        kept.update(found)
    return found


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
