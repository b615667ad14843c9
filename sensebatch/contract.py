"""What the executor and an engine say to each other. Knows the nouns; does nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sensebatch.jobs import Batch, BatchResult, EngineInfo

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a batch is; sent often, so it is cheap."""

    phase: str
    """`prefill`, `think`, `denoise` or `encode`."""
    step: int
    num_steps: int
    """0 where the end is not known, as in decoding text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnImage:
    """One finished picture of an unfinished interleave job, exactly as the sampler left it."""

    image: np.ndarray
    """float32 `[3, height, width]`, neither clamped nor quantised."""
    tokens: tuple[int, ...]
    """Every greedy choice of the job up to and including the `<img>` of this picture."""


class Checkpoints(Protocol):
    """The finished pictures of a batch's unfinished jobs; kept until the batch is committed."""

    def load(self) -> Sequence[Sequence[DrawnImage]]:
        """Returns the pictures kept for each job of the batch, in the batch's order."""

    def save(self, drawn: Sequence[tuple[int, DrawnImage]]) -> None:
        """Keeps the pictures that were denoised together, as (job's index, picture); atomic."""


class Engine(Protocol):
    """What the executor needs of an engine."""

    @property
    def info(self) -> EngineInfo:
        """What the log says of the engine."""

    def generate(
        self,
        batch: Batch,
        inputs: Sequence[Sequence[bytes]],
        *,
        checkpoints: Checkpoints,
        progress: Callable[[Progress], None],
    ) -> BatchResult:
        """Runs a batch.

        Args:
            batch: Jobs of one group.
            inputs: The encoded input images of each job.
            checkpoints: Where interleave jobs keep their finished pictures.
            progress: Called between steps.

        Raises:
            OutOfMemoryError: The batch does not fit; nothing of it is kept on the device.
            RunStoppedError: The device or the weights failed; no other batch would fare better.
        """

    def make_room(self) -> str | None:
        """Goes on with less of the device's memory, after a job alone did not fit.

        Returns:
            What was changed, for people; None where no less is possible.

        Raises:
            RunStoppedError: The change failed half way; the engine cannot be used any more.
        """
