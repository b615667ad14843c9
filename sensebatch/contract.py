"""What the executor and an engine say to each other. Knows the nouns; does nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from sensebatch.jobs import Batch, BatchResult, EngineInfo, GroupKey, Job

if TYPE_CHECKING:
    import numpy as np

Prepared: TypeAlias = Any
"""A job as an engine prepared it; only that engine looks inside."""


class Phase(StrEnum):
    """What a batch spends its time on."""

    PREFILL = "prefill"
    """Reading prompts and images."""
    THINK = "think"
    """Writing text."""
    DENOISE = "denoise"
    """Drawing images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a batch is; sent often, so it is cheap."""

    phase: Phase | None
    """None before the batch's first step."""
    step: int
    """Steps that are done, those of passes that an interrupted run has drawn counted in."""
    num_steps: int
    """Of all passes of the phase; 0 where the end is not known, as in decoding text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptImage:
    """One finished picture of a job of an unfinished batch, exactly as the sampler left it."""

    image: np.ndarray
    """float32 `[3, height, width]`, neither clamped nor quantised."""
    tokens: tuple[int, ...]
    """Every greedy choice of the job in front of this picture: of an interleave job up to and
    including its `<img>`, of another job its think text."""


class Checkpoints(Protocol):
    """The finished pictures of a batch's jobs; kept until the batch is committed.

    Used by one thread at a time, but not always by the same one.
    """

    def load(self) -> Sequence[Sequence[KeptImage]]:
        """Returns the pictures kept for each job of the batch, in the batch's order.

        A job that has not as many as it makes may have the same one more than once, the latest
        last. Where nothing is kept, jobs may be missing.
        """

    def save(self, drawn: Sequence[tuple[int, KeptImage]]) -> None:
        """Keeps the pictures that were denoised together, as (job's index, picture); atomic."""


class Engine(Protocol):
    """What the executor needs of an engine."""

    @property
    def info(self) -> EngineInfo:
        """What the log says of the engine."""

    def prepare(self, job: Job, inputs: Sequence[bytes]) -> Prepared:
        """Returns what can be made of a job without the device.

        It may be called from another thread while `generate` or `make_room` runs. What it
        returns can be generated from more than once, always with the same result.

        Args:
            job: To be generated later.
            inputs: Its encoded input images.

        Raises:
            JobError: The job cannot be run; others can.
        """

    def generate(
        self,
        batch: Batch,
        prepared: Sequence[Prepared],
        *,
        checkpoints: Checkpoints,
        progress: Callable[[Progress], None],
        stop: Callable[[], bool],
    ) -> BatchResult:
        """Runs a batch.

        A stop is heeded where no picture is half drawn and others are still to be begun: before
        a pass of t2i or edit pictures, between the rounds of interleave jobs, and in text that
        nothing was drawn behind yet. A batch that draws in one pass or one round is finished.

        Args:
            batch: Jobs of one group.
            prepared: Of `prepare`, one for each job.
            checkpoints: Where finished pictures are kept while others are drawn.
            progress: Called between steps.
            stop: Whether the run is to stop; true ever after it was once.

        Raises:
            OutOfMemoryError: The batch does not fit; nothing of it is kept on the device.
            BatchStoppedError: A stop was heeded; `checkpoints` has what was finished, and the same
                batch goes on from there.
            RunStoppedError: The device or the weights failed; no other batch would fare better.
        """

    def largest_batch(self, group: GroupKey) -> int | None:
        """Returns how many jobs of a group fit the memory together; None where all planned do."""

    def make_room(self) -> str | None:
        """Goes on with less of the device's memory, after a job alone did not fit.

        Returns:
            What was changed, for people; None where no less is possible.

        Raises:
            RunStoppedError: The change failed half way; the engine cannot be used any more.
        """
