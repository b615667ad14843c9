"""What the driver itself costs: workers that answer at once, and images that are made already.

    python -m tests.executor.scale FOLDER --jobs 100000 --workers 64
    python -m tests.executor.scale FOLDER --jobs 2000 --workers 64 --image-side 1024

It prints what `docs/cluster.md` quotes: CPU and wall milliseconds a job, and the resident memory on
the way.
"""

from __future__ import annotations

import argparse
import pickle
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import psutil

from sensebatch.config import OutputConfig
from sensebatch.contract import Phase, Progress
from sensebatch.executor.crew import execute_crew
from sensebatch.executor.messages import (
    Advanced,
    Began,
    Ended,
    GaveBack,
    GiveBack,
    News,
    Order,
    Prepare,
    Prepared,
    RanJobs,
    Ready,
    Run,
    Said,
)
from sensebatch.executor.roster import Event, Roster
from sensebatch.jobs import Batch, BatchMetrics, EncodedJob, FinishReason, Job
from sensebatch.resolutions import Resolution
from sensebatch.store.attempts import Attempt
from sensebatch.store.images import encode_job_image
from sensebatch.store.store import open_store
from tests.executor.fakes import (
    IDENTITY,
    FakeEngine,
    Flag,
    Recorder,
    make_config,
    make_job,
    read_input,
)

INFO = FakeEngine().info


class InstantCrew:
    """Workers that are ready and done at once, in this thread; every message is pickled.

    Args:
        num_workers: How many.
        image: The file that every job comes to.
    """

    def __init__(self, num_workers: int, image: bytes) -> None:
        self.numbers = range(num_workers)
        self._image = image
        self._lives: dict[int, int] = {}

    def open(self, events: SimpleQueue[Event]) -> None:
        self._events = events

    def start(self, worker: int, life: int) -> None:
        self._lives[worker] = life
        self._say(worker, Ready(node="host", device="fake", info=INFO, fitting={}))

    def tell(self, worker: int, order: Order) -> None:
        match pickle.loads(pickle.dumps(order)):
            case Prepare() as prepare:
                outcomes = (None,) * len(prepare.jobs)
                self._say(worker, Prepared(number=prepare.number, outcomes=outcomes))
            case Run() as run:
                self._say(worker, Began(number=run.number))
                step = Progress(phase=Phase.DENOISE, step=1, num_steps=2)
                self._say(worker, Advanced(number=run.number, progress=step))
                self._say(worker, self._ended(run))
            case GiveBack() as back:
                self._say(worker, GaveBack(number=back.number))

    def _ended(self, run: Run) -> Ended:
        result = EncodedJob(
            images=(self._image,),
            text=None,
            answer=None,
            choice_log_probabilities=(),
            think_tokens=0,
            text_tokens=0,
            finish_reason=FinishReason.COMPLETE,
            image_phash=("0" * 16,),
            encode_s=0.1,
        )
        ran = RanJobs(results=(result,) * len(run.batch.jobs), metrics=BatchMetrics(total_s=1.0))
        return Ended(number=run.number, outcome=ran, seconds=1.0, info=INFO, peak_rss_bytes=1)

    def _say(self, worker: int, news: News) -> None:
        crossed = pickle.loads(pickle.dumps(news))
        self._events.put(Said(worker=worker, life=self._lives[worker], news=crossed))

    def end(self, worker: int) -> None:
        pass

    def close(self) -> None:
        pass


class Meter(Recorder):
    """Measures on the way, and remembers nothing else."""

    def __init__(self, num_jobs: int) -> None:
        super().__init__()
        self._num_jobs, self._num_done, self._next = num_jobs, 0, 0.1
        self.rss: list[int] = []

    def batch_finished(self, _: Batch, attempts: Sequence[Attempt]) -> None:
        self._num_done += len(attempts)
        if self._num_done >= self._next * self._num_jobs:
            self._next += 0.1
            self.rss.append(psutil.Process().memory_info().rss >> 20)

    def worker_changed(self, *_: object) -> None:
        pass


def scaled_jobs(num_jobs: int, side: int) -> Iterator[Job]:
    """Yields jobs of one group."""
    size = Resolution(height=side, width=side)
    for number in range(num_jobs):
        yield make_job(f"job-{number:07}", resolution=size, seed=number)


def one_image(side: int) -> bytes:
    """Returns a PNG that is about as large as a drawn image of its size."""
    noise = np.random.default_rng(0).normal(0, 4, (side, side, 3))
    ramp = np.linspace(40, 200, side)[:, None, None]
    pixels = np.clip(noise + ramp, 0, 255).astype(np.uint8)
    job = make_job("job", resolution=Resolution(height=side, width=side))
    return encode_job_image(job, "k", pixels, 0, output=OutputConfig(), info=INFO)


def run_scaled(root: Path, num_jobs: int, num_workers: int, *, batch: int, side: int) -> Meter:
    """Runs jobs on workers that cost nothing; returns what was measured on the way."""
    config, meter = make_config(max_batch_size=batch), Meter(num_jobs)
    image = one_image(side)
    crew = InstantCrew(num_workers, image)
    with open_store(root) as store:
        store.state.ingest(scaled_jobs(num_jobs, side), IDENTITY, root)
        roster = Roster(crew, meter.note)
        roster.assemble(Flag())
        cpu, wall = _cpu_s(), time.monotonic()
        execute_crew(
            store=store,
            roster=roster,
            config=config,
            read_image=read_input,
            observer=meter,
            stop=Flag(),
        )
    cpu, wall = _cpu_s() - cpu, time.monotonic() - wall
    print(
        f"{num_jobs} jobs in batches of {batch} over {num_workers} workers, {len(image)} bytes an "
        f"image: {cpu / num_jobs * 1e3:.2f} ms CPU a job, {num_jobs / wall:.0f} jobs a second, "
        f"RSS {meter.rss} MiB, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}"
    )
    return meter


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-side", type=int, default=32)
    args = parser.parse_args()
    run_scaled(args.folder, args.jobs, args.workers, batch=args.batch, side=args.image_side)


if __name__ == "__main__":
    main()
