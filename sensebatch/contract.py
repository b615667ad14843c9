"""What the executor and an engine say to each other. Knows the nouns; does nothing.

The executor speaks to a `Worker`, which hosts an `Engine`, in this process or in another one.
Everything that passes between executor and worker is plain data that pickles: jobs and the bytes
of their input images, batches and kept images go in; results, kept images, progress and notes
come out, and exceptions come out as `Raised`. What passes while a batch runs goes through its
`Channel`. A worker is called in this order:

1. `largest_batch`, for each group, while the run is planned.
2. `prepare`, for each job of an assignment, from a thread of its own, while `generate` or
   `make_room` works on an assignment before. A job that cannot be prepared fails here, before the
   composition of its batch is on record.
3. `expect`, from the same thread, once all jobs of the assignment are prepared, if it comes next
   unless something goes wrong. The worker may then have its prompts read while it draws the one
   before: nothing is kept of that, and its own `generate` gives the same bytes without it.
4. `generate`, for the jobs that could be prepared, once their batch is on record. Batches that
   follow may be named as far as they are prepared (`num_following` says how many are of use), so
   that their texts are written at the same time. If a single job does not fit, `make_room` and
   `generate` again, until it fits or there is no more room to make.
5. `release`, when the executor is through with the assignment, however it ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from sensebatch.jobs import Batch, BatchResult, EngineInfo, Failure, GroupKey, Job

if TYPE_CHECKING:
    import numpy as np

Prepared: TypeAlias = Any
"""A job as an engine prepared it. It never leaves the engine's process."""


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
    """Steps that are done, including those of passes that an interrupted run has drawn."""
    num_steps: int
    """Steps of all passes of the phase; 0 if the end is not known, as in decoding text."""
    num_together: int = 0
    """Jobs whose texts are written together, those of batches that follow among them; 0 where all
    are the batch's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptImage:
    """A finished image of a job of an unfinished batch, exactly as the sampler left it."""

    image: np.ndarray
    """float32 `[3, height, width]`, neither clamped nor quantised."""
    tokens: tuple[int, ...]
    """Every greedy choice of the job before this image: of an interleave job up to and including
    its `<img>`, of another job its think text."""


Kept: TypeAlias = Sequence[Sequence[KeptImage]]
"""The images kept for each job of a batch, in the batch's order.

A job that has fewer than it makes may have the same one more than once, the latest last. If
nothing is kept, jobs may be missing.
"""

Drawn: TypeAlias = Sequence[tuple[int, KeptImage]]
"""Images that were drawn together, as (job's index in its batch, image)."""


class Stop(Protocol):
    """Whether a run is to stop; `threading.Event` is one."""

    def is_set(self) -> bool:
        """Returns whether the run is to stop where the current batch can; stays true once it is."""


class Channel:
    """What an engine at work on a batch says to the executor, and asks it.

    Each method does nothing until it is overridden. A channel between processes sends what it is
    given; the one within a process hands it over as it is.
    """

    def progress(self, progress: Progress) -> None:
        """Takes where the batch is; called between steps, while the device computes the last."""

    def keep(self, drawn: Drawn) -> None:
        """Keeps images that were drawn together, all of them or none, until the batch is committed.

        Called by one thread at a time, but not always by the same one, and never while the images
        still change. They are the engine's again once this has returned.
        """

    def is_stopped(self) -> bool:
        """Returns whether the batch is to end where it can; stays true once it is."""
        return False

    def observe(self, step: int, velocities: Any) -> None:
        """Takes the velocities of a pass before a step is taken; only within the engine's process.

        Args:
            step: Its index, from 0 for each pass.
            velocities: float32 `[jobs, tokens, numbers]` with guidance, a tensor on the engine's
                device, which must not be changed.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class HostShare:
    """How the workers of one host share it: weights that are streamed are there once."""

    name: str
    """The run's, and no other run's: workers of the host find each other by it."""
    num_workers: int
    """How many there are; the host's memory is planned for all of them."""


class Concerns(StrEnum):
    """What an exception concerns."""

    JOBS = "jobs"
    """The jobs it was raised for; others may fare better."""
    MEMORY = "memory"
    """The size of the batch: it did not fit the device, and a smaller one may."""
    RUN = "run"
    """The worker or the run: no other job would fare better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    """An exception as data: its frames would keep tensors alive, and do not pickle."""

    failure: Failure
    concerns: Concerns


Following: TypeAlias = Sequence[tuple[Batch, Sequence[Prepared]]]
"""Batches of the same group that are expected next, with their prepared jobs."""


class Reading(Protocol):
    """The prompts of a batch that are read beside the drawing of another one.

    It never leaves the engine's process. What it has read is freed when it is dropped.
    """

    def advance(self, num_calls: int) -> None:
        """Has the device read on, between two steps of the batch that is drawn.

        Args:
            num_calls: How many more calls are expected; the last one reads what is left.

        Raises:
            Exception: Anything that reading them in their own batch would raise.
        """


class Engine(Protocol):
    """A loaded model. It raises what goes wrong; its worker makes data of it."""

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

    def read(self, prepared: Sequence[Prepared]) -> Reading | None:
        """Begins to read the prompts of a batch; called while `generate` draws another one.

        Args:
            prepared: What `prepare` returned for each job of the batch that is expected next.

        Returns:
            None where nothing is to be read ahead: there is no room, or the weights for it are not
            on the device.
        """

    def num_following(self, group: GroupKey, batch: str | None = None) -> int:
        """Returns how many more batches of a group are of use to `generate` of one.

        Args:
            group: The group.
            batch: The batch's id; none are of use to one whose text is written already.
        """

    def generate(
        self,
        batch: Batch,
        prepared: Sequence[Prepared],
        *,
        kept: Kept,
        channel: Channel,
        reading: Reading | None = None,
        following: Following = (),
    ) -> BatchResult:
        """Runs a batch.

        Results do not depend on what follows. Texts of batches that follow wait in the engine until
        these are generated, and are written again if something else comes first.

        A stop is heeded where no image is half drawn and others are still to be begun: before a
        pass of t2i or edit images, between the rounds of interleave jobs, and in text that precedes
        the first image. A batch that draws in one pass or one round is finished once its prompts
        are read, unless texts of batches that follow are written beside its own; while prompts are
        read, a stop is heeded between layers.

        Args:
            batch: Jobs of one group.
            prepared: What `prepare` returned, one for each job.
            kept: Images that an interrupted or split batch has drawn; they are not drawn again.
            channel: Takes the progress and finished images, and says whether to stop.
            reading: What `read` returned for `prepared`, however far it came; None reads all
                prompts now. The result is the same.
            following: Batches whose texts may be written with this one's.

        Raises:
            OutOfMemoryError: The batch does not fit; nothing of it is kept on the device.
            BatchStoppedError: A stop was heeded. The channel has what was finished, and the same
                batch continues from there.
            RunStoppedError: The device or the weights failed; no other batch would fare better.
        """

    def largest_batch(self, group: GroupKey) -> int | None:
        """Returns how many jobs of a group fit the memory together; None if all planned do."""

    def make_room(self) -> str | None:
        """Continues with less of the device's memory, after a job alone did not fit.

        Returns:
            What was changed, for people; None if no less is possible.

        Raises:
            RunStoppedError: The change failed half way; the engine can no longer be used.
        """


class Worker(Protocol):
    """An engine as the executor sees it: plain data in and out, and nothing is raised."""

    @property
    def number(self) -> int:
        """The worker's number in the run, from 0."""

    @property
    def node(self) -> str:
        """Name of the host that it works on."""

    @property
    def info(self) -> EngineInfo:
        """What the log says of the engine, as it was for the batch that was generated last."""

    def largest_batch(self, group: GroupKey) -> int | None:
        """Returns how many jobs of a group fit the memory together; None if all planned do."""

    def num_following(self, group: GroupKey, batch: str | None = None) -> int:
        """Returns how many batches are of use to `generate` of one; see `Engine`."""

    def prepare(self, number: int, place: int, job: Job, inputs: Sequence[bytes]) -> Raised | None:
        """Prepares a job of an assignment, and keeps it until `release`.

        Args:
            number: The assignment's.
            place: Which of the assignment's jobs it is, from 0.
            job: The job.
            inputs: The job's encoded input images.

        Returns:
            Why the job cannot be run; None if it can.
        """

    def expect(self, number: int) -> None:
        """Takes note that all jobs of an assignment are prepared, and that it comes next.

        Args:
            number: The assignment's.
        """

    def generate(
        self,
        number: int,
        batch: Batch,
        *,
        kept: Kept,
        channel: Channel,
        following: Sequence[tuple[int, Batch]] = (),
    ) -> BatchResult | Raised:
        """Runs a batch; see `Engine.generate`.

        Args:
            number: Of the assignment.
            batch: Those of its jobs that could be prepared, in their order.
            kept: Images that are not drawn again.
            channel: In the process of the executor.
            following: Batches of the same group that are expected next, by the numbers of their
                assignments; all of their jobs could be prepared, or those of them that could.
        """

    def make_room(self) -> str | Raised | None:
        """Continues with less memory; see `Engine.make_room`."""

    def release(self, number: int) -> None:
        """Forgets what was prepared of an assignment, and what was read of it."""
