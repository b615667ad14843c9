"""What passes between the executor and workers in processes of their own: plain data that pickles.

Orders go to a worker, news come back. An assignment is prepared (`Prepare`, `Prepared`), run
(`Run`, `Began`, `Advanced`, `Drew`, `Ended`) or given back before it has begun (`GiveBack`,
`GaveBack`). Images to be kept are sent one round at a time: the next waits until `KeptOnDisk` says
that the one before is on the disk. Knows no backend and no store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from sensebatch.contract import Drawn, Kept, Progress, Raised
from sensebatch.jobs import Batch, BatchMetrics, EncodedJob, EngineInfo, Failure, GroupKey, Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Asks for the jobs of an assignment to be prepared."""

    number: int
    """The assignment's."""
    jobs: tuple[Job, ...]
    inputs: tuple[Sequence[bytes], ...]
    """The encoded input images of each job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Asks for a batch to be run, once those before it are through."""

    number: int
    """The number of the assignment whose jobs are prepared."""
    batch: Batch
    """Those of its jobs that could be prepared."""
    kept: Kept


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveBack:
    """Asks for an assignment that has not begun; one that has is run to its end."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptOnDisk:
    """Says that the images which were sent last are on the disk."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StopWork:
    """Asks for the current batch to end where it can, and for all others to be given back."""


Order: TypeAlias = Prepare | Run | GiveBack | KeptOnDisk | StopWork


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The engine is loaded."""

    node: str
    """Name of the worker's host."""
    device: str
    """What it computes on, for people: `NVIDIA H100, GPU 1`."""
    info: EngineInfo
    fitting: Mapping[GroupKey, int | None]
    """How many jobs of each group fit the memory together; None if all planned do."""
    following: Mapping[GroupKey, int] = field(default_factory=dict)
    """How many batches of each group are of use to another one; see `contract.Engine`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unusable:
    """The engine could not be loaded."""

    failure: Failure
    is_final: bool
    """Whether another try would come to the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """An assignment's jobs are prepared."""

    number: int
    outcomes: tuple[Raised | None, ...]
    """Why each job cannot be run; None for one that can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Began:
    """A batch went into the engine."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Advanced:
    """The batch in the engine advanced."""

    number: int
    progress: Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Drew:
    """Images were drawn together that are to be kept; see `contract.Channel.keep`."""

    number: int
    drawn: Drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class RanJobs:
    """What became of a batch, with its images as files."""

    results: tuple[EncodedJob | Failure, ...]
    """One for each job, in the batch's order."""
    metrics: BatchMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A batch is through, or failed as a whole."""

    number: int
    outcome: RanJobs | Raised
    seconds: float
    """From the start of the batch."""
    info: EngineInfo
    """The engine as it was for this batch."""
    peak_rss_bytes: int
    """Most host memory that the worker had held by then."""
    room: str | None = None
    """What was changed to make room for a single job that did not fit, for people. The job is
    still prepared, to be run again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GaveBack:
    """An assignment that had not begun is no longer the worker's."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Died:
    """The worker's process ended. Said by the backend."""

    reason: str
    """For people."""
    is_of_node: bool = False
    """Whether its machine went with it, so that no batch is to blame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """There is room for this worker, which nobody has started. Said by the backend."""


News: TypeAlias = (
    Ready | Unusable | Prepared | Began | Advanced | Drew | Ended | GaveBack | Died | Joined
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """News of one life of a worker."""

    worker: int
    """Its number in the run."""
    life: int
    """How often it had been started; news of an earlier life are too late."""
    news: News
