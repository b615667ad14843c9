"""The runners of the tasks: each is a module of this package, named by its task's row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, TypeAlias

from sensebatch.contract import Channel, Kept
from sensebatch.engine.runner import PassLimits, Runner
from sensebatch.engine.sampling.text import Script
from sensebatch.engine.tasks.state import PreparedJob
from sensebatch.jobs import Batch, Failure, JobResult
from sensebatch.tasks import Task


class RunBatch(Protocol):
    """Runs jobs of one group."""

    def __call__(
        self,
        runner: Runner,
        jobs: Sequence[PreparedJob],
        *,
        kept: Kept,
        channel: Channel,
        script: Script | None = None,
    ) -> Sequence[JobResult | Failure]:
        """Returns a result for each job.

        Args:
            runner: The network.
            jobs: The jobs of a batch.
            kept: Images that were drawn before.
            channel: Keeps finished images while others are drawn.
            script: What the jobs write, for synthetic weights.

        Raises:
            BatchStoppedError: A stop was heeded.
        """


Written: TypeAlias = Any
"""What `WritesTogether.write` left of a batch for `finish`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WritesTogether:
    """How the texts of several batches are written side by side, in the same bytes as alone."""

    write: Callable[[Runner, Sequence[Sequence[PreparedJob]], Script | None], Sequence[Written]]
    """Reads the prompts of batches of one group and writes their texts; what jobs need from then
    on waits where the runner's limits say."""
    finish: Callable[[Runner, Written, Kept, Channel], Sequence[JobResult | Failure]]
    """Returns what `run` returns of such a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRunner:
    """How the batches of a task are run; the `RUNNER` of a module of this package."""

    run: RunBatch
    draws_once: Callable[[Batch, PassLimits], bool]
    """Whether a batch is finished after its only pass or round, so that no stop is heeded."""
    together: WritesTogether | None = None
    """None for a task that writes nothing, or writes after images."""


def runner_of(task: Task) -> TaskRunner:
    """Returns the runner of a task."""
    module = import_module(f"sensebatch.engine.tasks.{task.spec.runner}")
    runner = module.RUNNER
    assert isinstance(runner, TaskRunner)
    return runner
