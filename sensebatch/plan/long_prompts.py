"""Prompts so long that they cost much of a job's time: which, and how much. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from sensebatch.checkpoint.architecture import Architecture
from sensebatch.errors import Problem
from sensebatch.jobs import Job, group_key
from sensebatch.plan.computation import Computation
from sensebatch.plan.tokens import prompt_tokens, text_tokens
from sensebatch.plan.work import (
    MEASURED_ITEM_BYTES,
    Speeds,
    Work,
    denoising_work,
    network_sizes,
    understanding_work,
)
from sensebatch.tasks import Branch

LONG_TOKENS = 4096
"""Text of more tokens is warned of; prompts for images have a few hundred."""
SHORT_TOKENS = 256
"""The prompt that a long one is compared with."""


class LongPrompts:
    """Looks out for long prompts while jobs are read, and warns of the longest at the end.

    Args:
        warn: Receives the warning.
        arch: The network, whose work is counted; None where it is not known.
        speeds: What the GPU reaches at most; None where that is not known.
    """

    def __init__(
        self,
        warn: Callable[[Problem], None],
        arch: Architecture | None,
        speeds: Speeds | None = None,
    ) -> None:
        self._warn = warn
        self._arch = arch
        self._speeds = speeds

    def watch(self, jobs: Iterable[Job]) -> Iterator[Job]:
        """Yields the jobs."""
        num_long, longest, most = 0, None, LONG_TOKENS
        for job in jobs:
            # No text has more tokens than bytes, four for a character at most.
            if 4 * (len(job.prompt) + len(job.system_prompt or "")) > LONG_TOKENS:
                tokens = text_tokens(job.prompt) + text_tokens(job.system_prompt or "")
                num_long += tokens > LONG_TOKENS
                if tokens > most:
                    longest, most = job, tokens
            yield job
        if longest is not None:
            self._warn(self._problem(longest, most, num_long - 1))

    def _problem(self, job: Job, tokens: int, num_others: int) -> Problem:
        message = f"very long, up to {tokens:,} tokens{self._cost(job)}"
        if num_others:
            others = "another prompt has" if num_others == 1 else f"{num_others:,} others have"
            message += f"; {others} over {LONG_TOKENS:,}"
        return Problem(file=job.source.file, row=job.source.row, field="prompt", message=message)

    def _cost(self, job: Job) -> str:
        """Returns what a prompt costs, as an addition to a sentence; empty if it is not known."""
        if self._arch is None:
            return ""
        cost = _Cost(self._arch, job)
        times = cost.flop(prompt_tokens(job)) / cost.flop(SHORT_TOKENS)
        said = f"{times:.1f}" if times < 10 else f"{times:,.0f}"
        text = f", so the job takes about {said} times as long as with a short one"
        if self._speeds is None:
            return text
        more = cost.seconds(prompt_tokens(job), self._speeds) - cost.seconds(
            SHORT_TOKENS, self._speeds
        )
        return f"{text}, at least {more:,.1f} s more"


@dataclass(frozen=True, slots=True)
class _Cost:
    """The work of a job by the length of its prompt."""

    arch: Architecture
    job: Job

    def flop(self, tokens: int) -> float:
        """Returns the operations of the job."""
        return sum(n * (work.gemm_flop + work.attention_flop) for n, work in self._works(tokens))

    def seconds(self, tokens: int, speeds: Speeds) -> float:
        """Returns the least time of the job, computed alone."""
        return sum(n * work.seconds(speeds) for n, work in self._works(tokens))

    def _works(self, tokens: int) -> Iterator[tuple[int, Work]]:
        """Yields how often each kind of pass is made, and its work."""
        computation = Computation(arch=self.arch, item_bytes=MEASURED_ITEM_BYTES)
        sizes = network_sizes(self.arch)
        group = group_key(self.job)
        growing = sum(branch is not Branch.UNCOND for branch in group.branches)
        yield 1, understanding_work(computation, sizes, [(tokens, 0)] * max(growing, 1))
        if self.job.max_text_tokens:
            yield (
                self.job.max_text_tokens,
                understanding_work(computation, sizes, [(1, tokens)], logits=1),
            )
        if group.drawing is not None:
            prefixes = [0 if b is Branch.UNCOND else tokens for b in group.branches]
            work = denoising_work(
                computation, sizes, tokens=group.image_tokens, images=1, prefixes=prefixes
            )
            yield group.drawing.num_steps * self.job.max_images, work
