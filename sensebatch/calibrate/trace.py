"""Records how the velocity changes along the way of images: inner products, not velocities.

The engine is wrapped, so that an ordinary run draws the images and can be resumed; the records of a
batch are on the disk before the batch is committed. Each job has its own, under its id: a job that
is drawn again replaces it, and that of a job that is no longer asked for is not read.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sensebatch.contract import (
    Channel,
    Drawn,
    Following,
    HostShare,
    Kept,
    Prepared,
    Progress,
    Reading,
    Stop,
)
from sensebatch.errors import RunFolderError
from sensebatch.jobs import Batch, BatchResult, EngineInfo, Failure, GroupKey, Job
from sensebatch.loading import Backend, Model, ReusableEngine
from sensebatch.plan.load import Load
from sensebatch.store.files import write_atomic

MAX_TRACE_BYTES = 256 << 20
"""Memory for the velocities of a pass; of larger images, every n-th token is recorded."""

NUMBERS_AT_A_TIME = 1 << 14
"""Numbers of a velocity of which products are formed at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Velocities of images along their way, as inner products."""

    times: np.ndarray
    """float64 `[steps + 1]`, from 0 to 1."""
    products: np.ndarray
    """float64 `[steps, steps]`: the mean over images of the inner products of the velocities at
    each two timesteps, divided by the numbers of a velocity."""


def read_trace(folder: Path, timesteps: Sequence[float], ids: Sequence[str]) -> Trace:
    """Returns the mean of what was recorded of jobs.

    Args:
        folder: Where `TracingBackend` wrote.
        timesteps: Those between 0 and 1 that the images were drawn with.
        ids: The jobs'; at least one.

    Raises:
        RunFolderError: A job has no record of so many steps.
    """
    times = np.array([0.0, *timesteps, 1.0])
    num_steps = len(times) - 1
    total = np.zeros((num_steps, num_steps))
    for job_id in ids:
        products = _read(_place(folder, job_id))
        if products is None or products.shape != total.shape:
            found = "none" if products is None else f"one of {len(products)}"
            raise RunFolderError(
                f"{folder}: expected a record of {num_steps} steps of job {job_id}, found {found}; "
                f"without the folder {folder.parent} it is made again"
            )
        total += products
    return Trace(times=times, products=total / len(ids))


def _place(folder: Path, job_id: str) -> Path:
    return folder / f"{job_id}.npz"


def _read(path: Path) -> np.ndarray | None:
    """Returns the inner products in a file; None without one."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            products: np.ndarray = saved["products"]
            return products
    except FileNotFoundError:
        return None


def _write(path: Path, products: np.ndarray) -> None:
    content = io.BytesIO()
    np.savez(content, products=products)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content.getvalue())


class TracingBackend:
    """A backend whose engine records what it draws.

    Args:
        backend: Loads the engine.
        folder: Receives a file for each job.
    """

    def __init__(self, backend: Backend, folder: Path) -> None:
        self._backend = backend
        self._folder = folder

    def resolve_runtime(self, model: Any) -> tuple[str, str]:
        """Returns the names of device and dtype."""
        return self._backend.resolve_runtime(model)

    def load_engine(
        self,
        config: Any,
        model: Model,
        *,
        loads: Sequence[Load],
        stop: Stop,
        share: HostShare | None = None,
    ) -> ReusableEngine:
        """Returns the engine, loaded."""
        engine = self._backend.load_engine(config, model, loads=loads, stop=stop, share=share)
        return _TracingEngine(engine, self._folder)


class _TracingEngine:
    """An engine that records the velocities of every batch."""

    def __init__(self, engine: ReusableEngine, folder: Path) -> None:
        self._engine = engine
        self._folder = folder
        self.largest_batch = engine.largest_batch
        self.num_following = engine.num_following
        self.make_room = engine.make_room
        self.read = engine.read
        self.replan = engine.replan
        self.close = engine.close

    @property
    def info(self) -> EngineInfo:
        """What the log says of the engine."""
        return self._engine.info

    def prepare(self, job: Job, inputs: Sequence[bytes]) -> Prepared:
        """Returns what can be made of a job without the device."""
        return self._engine.prepare(job, inputs)

    def generate(
        self,
        batch: Batch,
        prepared: Sequence[Prepared],
        *,
        kept: Kept,  # noqa: ARG002, a part of the protocol
        channel: Channel,
        reading: Reading | None = None,
        following: Following = (),
    ) -> BatchResult:
        """Runs a batch, and writes the records of its jobs before it returns.

        Images that are kept are drawn again, since their velocities are not.
        """
        recorder = _Recorder(channel, batch.group)
        result = self._engine.generate(
            batch,
            prepared,
            kept=(),
            channel=recorder,
            reading=reading,
            following=following,
        )
        results = zip(batch.jobs, result.results, strict=True)
        jobs = [job for job, one in results if not isinstance(one, Failure)]
        # A job may fail before it is drawn, or afterwards.
        for drawn in (batch.jobs, jobs):
            if len(drawn) == len(recorder.products):
                for job, products in zip(drawn, recorder.products, strict=True):
                    _write(_place(self._folder, job.id), products)
                break
        return result


class _Recorder(Channel):
    """Hands everything on, and keeps inner products of the velocities."""

    def __init__(self, channel: Channel, group: GroupKey) -> None:
        self._channel = channel
        assert group.drawing is not None
        self._num_steps = group.drawing.num_steps
        self.products: list[np.ndarray] = []
        """Those of each image, in the order drawn, which is the batch's."""
        self._pass: list[np.ndarray] = []

    def progress(self, progress: Progress) -> None:
        """Takes where the batch is."""
        self._channel.progress(progress)

    def keep(self, drawn: Drawn) -> None:
        """Keeps images that were drawn together."""
        self._channel.keep(drawn)

    def is_stopped(self) -> bool:
        """Returns whether the batch is to end where it can."""
        return self._channel.is_stopped()

    def observe(self, step: int, velocities: Any) -> None:
        """Records a step; the last one of a pass adds the products of its images."""
        jobs, tokens, numbers = velocities.shape
        size = self._num_steps * jobs * tokens * numbers * 4
        stride = -(-size // MAX_TRACE_BYTES)
        if step == 0:
            self._pass = []
        self._pass.append(velocities[:, ::stride].cpu().numpy().reshape(jobs, -1).copy())
        if step + 1 == self._num_steps:
            self.products += [
                _products([velocities[job] for velocities in self._pass]) for job in range(jobs)
            ]
            self._pass = []


def _products(velocities: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the inner products of an image's velocities, divided by their numbers.

    Some numbers at a time, so that a copy in float64 takes little memory beside them.
    """
    count = velocities[0].size
    total = np.zeros((len(velocities), len(velocities)))
    for start in range(0, count, NUMBERS_AT_A_TIME):
        part = np.stack([one[start : start + NUMBERS_AT_A_TIME] for one in velocities])
        part = part.astype(np.float64)
        total += part @ part.T
    return total / count
