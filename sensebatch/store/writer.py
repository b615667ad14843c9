"""Brings the results of a batch to the disk while the next batch runs, and commits them.

Files first, all of them, then one transaction that names them. Images are encoded by several
threads; one more thread takes batches in their order, waits for the files and commits.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import PurePosixPath

from sensebatch.config import ExecutionConfig, OutputConfig
from sensebatch.errors import JobError, RunFolderError, RunStoppedError, TruncatedError
from sensebatch.jobs import Batch, BatchMetrics, EncodedJob, EngineInfo, Failure, JobResult
from sensebatch.process import peak_rss_bytes
from sensebatch.store.attempts import Attempt
from sensebatch.store.files import storage_errors, sync_folders, write_atomic
from sensebatch.store.images import EXTENSIONS, encode_job_image
from sensebatch.store.phash import phash
from sensebatch.store.rows import (
    RowContext,
    WrittenJob,
    batch_figures,
    early_failure,
    job_columns,
    job_figures,
    truncation,
)
from sensebatch.store.state import StoredJob
from sensebatch.store.store import Store
from sensebatch.tasks import Output
from sensebatch.units import counted

MIN_WRITERS, MAX_WRITERS = 2, 8
"""Threads that encode where nobody said how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RanBy:
    """The worker that ran a batch, or prepared its jobs."""

    worker: int
    """Its number."""
    node: str
    """Its host."""
    info: EngineInfo
    """Its engine, as it was for this batch."""
    peak_rss_bytes: int | None = None
    """Most host memory that its process had held; None where that is this process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RanBatch:
    """A batch that the engine is through with."""

    seq: int
    """Its number in the state."""
    batch: Batch
    jobs: tuple[StoredJob, ...]
    results: Sequence[JobResult | EncodedJob | Failure]
    """What became of each job."""
    metrics: BatchMetrics
    by: RanBy
    queue_s: float
    """Seconds from the start of the run to the start of the batch."""
    started_at: datetime

    @property
    def has_failures(self) -> bool:
        """Whether any of its jobs failed in the engine."""
        return any(isinstance(result, Failure) for result in self.results)


class BatchWriter:
    """Writes and commits batches in the background; used as a context manager.

    Args:
        store: The run's folder.
        output: How images are written.
        execution: How often a job is tried, and what counts as failed.
        wait: Called before a job's files are encoded; may wait for a better moment.
    """

    def __init__(
        self,
        store: Store,
        output: OutputConfig,
        execution: ExecutionConfig,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        self._wait = wait
        self._store = store
        self._output = output
        self._execution = execution
        store.write_as(EXTENSIONS[output.image_format])
        self._run, self._session = store.state.run_id, store.state.next_session()
        self._encoders = ThreadPoolExecutor(
            output.num_writers or _default_writers(), thread_name_prefix="encode"
        )
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="commit")

    def __enter__(self) -> BatchWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for the batch that is being written; a finished one is not thrown away."""
        self._committer.shutdown()
        self._encoders.shutdown()

    def submit(self, ran: RanBatch) -> Future[tuple[Attempt, ...]]:
        """Starts writing a batch; the future gives its rows once they are committed.

        Files of several batches are written at the same time; batches are committed one by one,
        as they came. The future raises StorageError if the file system fails.
        """
        files = [
            self._encoders.submit(self._write_job, stored, result, ran.by.info)
            for stored, result in zip(ran.jobs, ran.results, strict=True)
        ]
        return self._committer.submit(self._commit_batch, ran, files)

    def fail_early(
        self,
        members: Sequence[tuple[str, str]],
        failed: Sequence[tuple[StoredJob, Failure]],
        *,
        by: RanBy,
        replacing: int | None,
        queue_s: float,
        is_final: bool = False,
    ) -> tuple[int, list[Attempt]]:
        """Records a batch's composition with the failures of jobs that cannot be in it.

        Args:
            members: (id, key) of each job of the batch.
            failed: The other jobs, and why they cannot be in it.
            by: The worker that they were given to.
            replacing: Number of the batch on record that this one takes the place of.
            queue_s: Seconds from the start of the run.
            is_final: Whether the failed jobs have no further attempts.

        Returns:
            The batch's number, and the rows of the failed jobs.

        Raises:
            StorageFullError: The disk is full.
            StorageError: The folder cannot be written, or is not where it was.
        """
        self._store.run_dir.require_in_place()
        now = datetime.now(UTC)
        attempts = [
            early_failure(
                self._context(by),
                stored,
                self._write_failure(stored, failure),
                queue_s=queue_s,
                at=now,
                rss_bytes=_peak_rss_bytes(by),
            )
            for stored, failure in failed
        ]
        self._sync(attempts)
        seq = self._store.state.begin(
            members,
            replacing=replacing,
            failed=attempts,
            max_attempts=1 if is_final else self._execution.max_attempts,
        )
        return seq, attempts

    def _commit_batch(
        self, ran: RanBatch, files: Sequence[Future[WrittenJob]]
    ) -> tuple[Attempt, ...]:
        written = [
            self._settled(stored, result, future)
            for stored, result, future in zip(ran.jobs, ran.results, files, strict=True)
        ]
        attempts = self._attempts(ran, written)
        self._sync(attempts)
        self._store.commit(ran.seq, attempts, max_attempts=self._execution.max_attempts)
        return attempts

    def _settled(
        self,
        stored: StoredJob,
        result: JobResult | EncodedJob | Failure,
        future: Future[WrittenJob],
    ) -> WrittenJob:
        """Returns what was written; an error that concerns one job alone is that job's failure."""
        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, RunStoppedError | RunFolderError) or not isinstance(error, Exception):
            raise error
        return self._write_failure(stored, _failure(error, result))

    def _write_job(
        self, stored: StoredJob, result: JobResult | EncodedJob | Failure, info: EngineInfo
    ) -> WrittenJob:
        self._wait()
        if not isinstance(result, Failure) and result.finish_reason.is_truncated:
            result = self._judged(stored, result)
        self._store.run_dir.require_in_place()
        if isinstance(result, Failure):
            return self._write_failure(stored, result)
        start = time.monotonic()
        names = self._image_names(stored, len(result.images))
        digests = [
            self._write(name, data)
            for name, data in zip(names, self._encoded(stored, result, info), strict=True)
        ]
        text_path, text_sha256 = None, None
        if result.text is not None:
            text_path = self._store.run_dir.text_name(stored.job.id)
            text_sha256 = self._write(text_path, result.text.encode())
        return WrittenJob(
            image_paths=tuple(names),
            image_sha256=tuple(digests),
            text_path=text_path,
            text_sha256=text_sha256,
            text_chars=None if result.text is None else len(result.text),
            image_phash=_phashes(result),
            finish_reason=result.finish_reason,
            answer=result.answer,
            choice_log_probabilities=result.choice_log_probabilities,
            think_tokens=result.think_tokens,
            text_tokens=result.text_tokens,
            encode_s=time.monotonic() - start + _encode_s(result),
        )

    def _judged(
        self, stored: StoredJob, result: JobResult | EncodedJob
    ) -> JobResult | EncodedJob | Failure:
        """Returns a truncated result, or the failure that the run counts it as."""
        if not self._execution.fail_truncated:
            return result
        return replace(
            _failure(TruncatedError(truncation(stored.job, result.finish_reason)), result),
            finish_reason=result.finish_reason,
        )

    def _write_failure(self, stored: StoredJob, failure: Failure) -> WrittenJob:
        name: str | None
        try:
            name = self._store.run_dir.error_name(stored.job.id, stored.attempts + 1)
            self._write(name, failure.traceback.encode())
        except (JobError, OSError):  # a name that no file can have; the row says enough
            name = None
        return WrittenJob(
            failure=failure,
            error_file=name,
            finish_reason=failure.finish_reason,
            think_tokens=failure.think_tokens,
            text_tokens=failure.text_tokens,
        )

    def _image_names(self, stored: StoredJob, num_images: int) -> list[str]:
        job, run_dir = stored.job, self._store.run_dir
        extension = EXTENSIONS[self._output.image_format]
        output = job.task.spec.output
        if output is Output.IMAGES:
            return [run_dir.image_name(job.id, extension, index) for index in range(num_images)]
        expected = int(output is Output.IMAGE)
        if num_images != expected:
            raise ValueError(
                f"expected {counted(expected, 'image')} from a {job.task} job, found {num_images}"
            )
        return [run_dir.image_name(job.id, extension)] * num_images

    def _encoded(
        self, stored: StoredJob, result: JobResult | EncodedJob, info: EngineInfo
    ) -> Iterator[bytes]:
        """Yields the files of a job's images, encoded one by one where they are not yet."""
        if isinstance(result, EncodedJob):
            yield from result.images
            return
        for index, pixels in enumerate(result.images):
            yield encode_job_image(
                stored.job,
                stored.key,
                pixels,
                index,
                output=self._output,
                info=info,
            )

    def _write(self, name: str, data: bytes) -> str:
        """Writes one file of the run's folder and returns its SHA-256."""
        path = self._store.run_dir.root / PurePosixPath(name)
        write_atomic(path, data, names_job=True)
        return hashlib.sha256(data).hexdigest()

    def _sync(self, attempts: Sequence[Attempt]) -> None:
        root = self._store.run_dir.root
        names = [
            name for attempt in attempts for name in (*attempt.outputs, attempt.error_file) if name
        ]
        with storage_errors(root):
            sync_folders([root / PurePosixPath(name) for name in names], root)

    def _attempts(self, ran: RanBatch, written: Sequence[WrittenJob]) -> tuple[Attempt, ...]:
        shared = {
            **batch_figures(ran.metrics, ran.jobs, written),
            "batch_id": ran.batch.id,
            "queue_s": ran.queue_s,
            "peak_rss_bytes": _peak_rss_bytes(ran.by),
            "started_at": ran.started_at,
            "finished_at": datetime.now(UTC),
        }
        context = self._context(ran.by)
        return tuple(
            Attempt(**job_columns(context, stored), **job_figures(stored, own), **shared)
            for stored, own in zip(ran.jobs, written, strict=True)
        )

    def _context(self, by: RanBy) -> RowContext:
        return RowContext(
            run=self._run, session=self._session, worker=by.worker, node=by.node, info=by.info
        )


def _peak_rss_bytes(by: RanBy) -> int:
    return peak_rss_bytes() if by.peak_rss_bytes is None else by.peak_rss_bytes


def _phashes(result: JobResult | EncodedJob) -> tuple[str, ...]:
    if isinstance(result, EncodedJob):
        return result.image_phash
    return tuple(map(phash, result.images))


def _encode_s(result: JobResult | EncodedJob) -> float:
    """Returns the seconds that the images of a job had taken before they came here."""
    return result.encode_s if isinstance(result, EncodedJob) else 0.0


def _default_writers() -> int:
    """Returns how many threads encode where nobody said: the others compute and prepare."""
    return min(max((os.cpu_count() or 1) // 2, MIN_WRITERS), MAX_WRITERS)


def _failure(error: BaseException, result: JobResult | EncodedJob | Failure) -> Failure:
    return Failure.of(error, think_tokens=result.think_tokens, text_tokens=result.text_tokens)
