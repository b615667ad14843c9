"""What each engine of a run is at: its batch, how far it is, and what it still takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sensebatch.cli.eta import RemainingTime
from sensebatch.contract import Phase, Progress
from sensebatch.executor.observer import WorkerState
from sensebatch.jobs import Batch
from sensebatch.units import counted

BEFORE = Progress(phase=None, step=0, num_steps=0)
"""Where a batch is that has just gone into an engine."""


@dataclass(slots=True)
class Lane:
    """The engine of this process, or that of one worker."""

    batch: Batch | None = None
    step: Progress = BEFORE
    start: float = 0.0
    share: float = 1.0
    """Share of the batch that is drawn after `start`, and says something about the speed."""
    worker: WorkerState | None = None
    """The worker; None for the engine of this process."""

    def begin(self, batch: Batch, now: float, remaining: RemainingTime) -> None:
        """A batch goes into the engine; the one before has left it."""
        self.leave(now, remaining)
        remaining.started(batch)
        self.batch, self.start, self.share, self.step = batch, now, 1.0, BEFORE

    def leave(self, now: float, remaining: RemainingTime) -> None:
        """The batch has left the engine, and is measured."""
        if self.batch is not None:
            remaining.measured(self.batch, now - self.start, self.share)
        self.batch = None

    def advance(self, progress: Progress) -> None:
        """The batch in the engine advanced."""
        if progress.phase is Phase.DENOISE is not self.step.phase:
            # What an interrupted run has drawn says nothing about the speed of this one.
            self.share = 1 - (progress.step - 1) / progress.num_steps
        self.step = progress

    def take(self, worker: WorkerState, now: float, remaining: RemainingTime) -> None:
        """Takes what a worker is at now."""
        self.worker = worker
        if self.batch is not None and worker.life != "ready":
            # It died, which says nothing about the speed.
            remaining.put_back(self.batch)
            self.batch = None
        if worker.batch is None:
            self.leave(now, remaining)
            return
        if worker.batch is not self.batch:
            self.begin(worker.batch, now, remaining)
        if worker.progress is not None and worker.progress is not self.step:
            self.advance(worker.progress)

    def rest_s(self, now: float, remaining: RemainingTime) -> float | None:
        """Returns the seconds the batch still takes; None until anything has been measured."""
        if self.batch is None:
            return 0.0
        of_batch = remaining.of_batch(self.batch)
        return None if of_batch is None else max(0.0, of_batch * self.share - (now - self.start))

    def words(self) -> str:
        """Returns what the engine is at: `t2i 256x256, 8 jobs: denoise 7 of 50`."""
        if self.batch is None:
            return self.idle_words()
        jobs = counted(len(self.batch.jobs), "job")
        return f"{self.batch.group}, {jobs}: {step_words(self.step)}"

    def idle_words(self) -> str:
        """Returns why the engine has no batch."""
        life = "ready" if self.worker is None else self.worker.life
        return {"ready": "nothing to do", "dead": "died, will be started again"}.get(life, life)


def remaining_s(lanes: Sequence[Lane], now: float, remaining: RemainingTime) -> float | None:
    """Returns the seconds that all engines together still need; None while that is not known."""
    to_come = remaining.to_come()
    rests = [lane.rest_s(now, remaining) for lane in lanes]
    known = [rest for rest in rests if rest is not None]
    if to_come is None or not lanes or len(known) < len(rests):
        return None
    at_work = sum(lane.worker is None or lane.worker.life == "ready" for lane in lanes)
    return max((to_come + sum(known)) / max(at_work, 1), *known)


def names(lanes: Sequence[Lane]) -> list[str]:
    """Returns what people call each worker, as short as it can be told from the others."""
    workers = [lane.worker for lane in lanes if lane.worker is not None]
    several = len({worker.node for worker in workers}) > 1
    found = []
    for worker in workers:
        gpu = worker.device.rpartition(", ")[2]
        name = gpu if gpu.startswith("GPU ") else f"worker {worker.number}"
        found.append(f"{worker.node} {name}" if several else name)
    return found


def step_words(progress: Progress) -> str:
    """Returns the progress of a batch in words: `denoise 7 of 50`, `think 212 of 64 jobs`."""
    if progress.phase is None:
        return "starting"
    if progress.num_steps:
        return f"{progress.phase} {progress.step} of {progress.num_steps}"
    of_jobs = f" of {progress.num_together} jobs" if progress.num_together else ""
    return f"{progress.phase} {progress.step}{of_jobs}"
