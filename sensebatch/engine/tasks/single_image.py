"""Text to image and editing: one picture a job, perhaps after a think text.

The two tasks differ in their prompts and guidance only, which know the task themselves.
Shape suffixes: J jobs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sensebatch.engine.model.tokenizer import THINK_END
from sensebatch.engine.preprocess import to_uint8
from sensebatch.engine.prompts import after_think
from sensebatch.engine.runner import Runner
from sensebatch.engine.sampling.guidance import COND
from sensebatch.engine.sampling.text import Script, greedy_decode
from sensebatch.engine.tasks.denoise import Drawing, denoise
from sensebatch.engine.tasks.state import PreparedJob, RunningJob, check_finite, start_jobs
from sensebatch.errors import JobError
from sensebatch.jobs import JobResult


def run_single_image(
    runner: Runner, jobs: Sequence[PreparedJob], script: Script | None = None
) -> list[JobResult]:
    """Runs t2i or edit jobs of one group.

    Args:
        runner: The network.
        jobs: All with or all without think, of one size and number of steps.
        script: What they think, where the weights are made up.

    Returns:
        A result for each job; one whose picture is not finite carries its error.
    """
    images, thoughts = draw_single_images(runner, jobs, script)
    results = []
    for image, thought in zip(images, thoughts, strict=True):
        text = None if thought is None else runner.tokenizer.decode(thought)
        num_tokens = 0 if thought is None else len(thought)
        try:
            check_finite(image)
            pixels = to_uint8(image[None])[0].cpu().numpy()
            results.append(JobResult(images=(pixels,), text=text, think_tokens=num_tokens))
        except JobError as error:
            results.append(JobResult(text=text, think_tokens=num_tokens, error=error))
    return results


def draw_single_images(
    runner: Runner, jobs: Sequence[PreparedJob], script: Script | None = None
) -> tuple[Tensor, list[list[int] | None]]:
    """Returns the pictures, float32 `[J, 3, height, width]`, and each job's think tokens."""
    first = jobs[0].job
    running = start_jobs(runner, jobs, decodes=first.think)
    thoughts: list[list[int] | None] = [None] * len(running)
    if first.think:
        thoughts = [*think(runner, running, script)]
    drawings = []
    for state in running:
        assert state.prepared.noise is not None
        drawings.append(
            Drawing(guidance=state.guidance, caches=state.caches, noise=state.prepared.noise)
        )
    images = denoise(
        runner,
        drawings,
        first.resolution,
        num_steps=first.sampling.num_steps,
        timestep_shift=first.sampling.timestep_shift,
    )
    return images, thoughts


def think(
    runner: Runner, running: Sequence[RunningJob], script: Script | None = None
) -> list[list[int]]:
    """Decodes the think text of every job and caches what leads over to the picture.

    Args:
        runner: The network.
        running: The jobs, their prompts cached.
        script: What they think, where the weights are made up.

    Returns:
        The tokens of each job, with `</think>` where the network said it.
    """
    caches = [state.caches[COND] for state in running]
    limits = {index: state.job.sampling.max_think_tokens for index, state in enumerate(running)}
    with runner.decoding():
        first, scripts = {}, {}
        for index, state in enumerate(running):
            assert state.choice is not None
            first[index] = state.choice
            if script is not None:
                scripts[index] = script.thought(state.job.sampling)
        decoded = greedy_decode(
            first,
            limits,
            runner.text_step(caches, max(limits.values())),
            stop_before=frozenset({runner.tokenizer.eos_id}),
            stop_after=frozenset({runner.tokenizer.token_id(THINK_END)}),
            scripts=scripts,
        )
        ending = after_think(runner.tokenizer)
        runner.append_tokens([(cache, ending) for cache in caches])
        runner.park(caches)
    return [decoded[index].tokens for index in range(len(running))]
