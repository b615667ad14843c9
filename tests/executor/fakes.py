"""Jobs, a model's identity and an engine that runs everything but numerics.

An image of the fake engine depends on the batch it was drawn in, so a job that runs again
among other neighbours comes out different, and a test sees it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sensebatch.config import ExecutionConfig, MemoryConfig, OutputConfig, RunConfig, default_config
from sensebatch.contract import (
    Channel,
    Following,
    Kept,
    KeptImage,
    Phase,
    Progress,
    Reading,
    Stop,
    Worker,
)
from sensebatch.errors import BatchStoppedError, JobError, OutOfMemoryError
from sensebatch.executor.observer import Summary, WorkerState
from sensebatch.executor.run import execute
from sensebatch.executor.worker import EngineWorker
from sensebatch.functions import Judge
from sensebatch.jobs import (
    Batch,
    BatchMetrics,
    BatchResult,
    EngineInfo,
    Failure,
    FinishReason,
    GroupKey,
    InputImage,
    Job,
    JobResult,
    ModelIdentity,
    Source,
    VramMode,
)
from sensebatch.plan.batches import Plan
from sensebatch.plan.load import Load
from sensebatch.resolutions import Resolution
from sensebatch.store.attempts import Attempt
from sensebatch.store.chains import reading
from sensebatch.store.ingest import Changes
from sensebatch.store.state import Counts
from sensebatch.store.store import Store, open_store
from sensebatch.tasks import Task

SMALL = Resolution(height=32, width=64)

IDENTITY = ModelIdentity(
    checkpoint="c" * 64,
    lora=None,
    dtype="float32",
    generation_prompt="",
    interleave_prompt="Tell a story.",
)


def make_job(job_id: str, task: Task = Task.T2I, **changes: Any) -> Job:
    """Returns a small job; its prompt tells the fake engine what to do with it."""
    sampling = replace(default_config().tasks[task].sampling, num_steps=2, max_images=4)
    values: dict[str, Any] = {
        "id": job_id,
        "task": task,
        "prompt": f"an image of {job_id}",
        "resolution": None if task.spec.drawing is None else SMALL,
        "seed": 7,
        "think": task is Task.INTERLEAVE,
        "sampling": sampling,
        "source": Source(file="jobs.yaml", row="line 1"),
    }
    return Job(**{**values, **changes})


def make_input(name: str) -> InputImage:
    """Returns an input image that `read_input` reads, unless its name begins with `missing`."""
    return InputImage(path=name, sha256=digest(name).hex(), height=32, width=32)


def read_input(image: InputImage) -> bytes:
    """Stands in for the reader of input images."""
    if image.path.startswith("missing"):
        raise JobError(f"{image.path}: expected an image, found nothing")
    return image.path.encode()


def make_config(
    *,
    max_batch_size: int = 2,
    output: OutputConfig | None = None,
    execution: ExecutionConfig | None = None,
) -> RunConfig:
    """Returns settings under which small jobs fit `max_batch_size` to a batch."""
    return replace(
        default_config(),
        memory=MemoryConfig(max_batch_size=max_batch_size),
        output=output or OutputConfig(),
        execution=execution or ExecutionConfig(),
    )


def digest(*parts: Any) -> bytes:
    """Returns a hash of anything that prints the same every time."""
    return hashlib.sha256("|".join(map(str, parts)).encode()).digest()


def drawn_image(size: Resolution, *parts: Any) -> np.ndarray:
    """Returns float32 noise `[3, height, width]` that depends on `parts` alone."""
    generator = np.random.default_rng(np.frombuffer(digest(*parts), dtype=np.uint32))
    return generator.standard_normal((3, size.height, size.width), dtype=np.float32)


def to_pixels(image: np.ndarray) -> np.ndarray:
    """Returns a drawn image as uint8 `[height, width, 3]`."""
    return (np.clip(image * 40 + 128, 0, 255)).astype(np.uint8).transpose(1, 2, 0)


@dataclass
class FakeEngine:
    """An engine whose images depend on the job and on its batch, and which fails on demand.

    In a prompt, `unusable` fails the preparation, `fails` makes that job's result an error,
    `poison` raises for the whole batch, `heavy` does not fit beside another job, `huge` fits
    only once room was made, `grows` no longer fits once two images are drawn, `cut` ends the text
    at its token limit, `kills` ends the process in the engine, `overflows` while the job is
    prepared.
    """

    on_step: Callable[[], None] = lambda: None
    kill: Callable[[], None] = lambda: None
    """Ends the process, or stands for that."""
    batches: list[tuple[str, ...]] = field(default_factory=list)
    steps: int = 0
    modes: list[str] = field(default_factory=lambda: ["full", "fast", "low"])
    """What memory is left to try, the present one first."""
    fitting: dict[int, int] = field(default_factory=dict)
    """Jobs that fit together, by the image tokens of one."""
    a_pass: int | None = None
    """Most t2i or edit jobs that are drawn together; None draws all of a batch."""
    drawn: list[tuple[str, ...]] = field(default_factory=list)
    """The jobs of each pass of t2i or edit jobs."""
    replanned: list[list[Task]] = field(default_factory=list)
    """The tasks of the groups of each run that memory was planned again for."""
    closed: int = 0
    together: int = 1
    """Most batches whose texts are written together."""
    written: set[str] = field(default_factory=set)
    """Batches whose texts wait."""
    waves: list[list[tuple[str, ...]]] = field(default_factory=list)
    """The batches that were written beside another one."""
    model: str = "fake"
    identity: ModelIdentity = IDENTITY
    num_kept: int = 0
    """Kept images that the last batch took."""

    def largest_batch(self, group: GroupKey) -> int | None:
        return self.fitting.get(group.image_tokens)

    def num_following(self, group: GroupKey, batch: str | None = None) -> int:
        return 0 if batch in self.written or not group.think else self.together - 1

    def make_room(self) -> str | None:
        if len(self.modes) == 1:
            return None
        self.modes.pop(0)
        return f"memory ran out: {self.modes[0]}"

    def replan(
        self,
        _config: RunConfig,
        *,
        loads: Sequence[Load],
        stop: Callable[[], bool],
    ) -> None:
        assert not stop()
        self.replanned.append([load.group.task for load in loads])

    def close(self) -> None:
        self.closed += 1

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            identity=self.identity,
            model=self.model,
            model_license="apache-2.0",
            system_prompt_source=dict.fromkeys(Task, "default"),
            device="cpu",
            dtype="float32",
            attn_backend="sdpa",
            compile_s=None,
            vram_mode=VramMode(self.modes[0]),
            budget_bytes=None,
            torch_version="none",
            load_s=1.5,
            load_peak_allocated_bytes=1,
            load_peak_reserved_bytes=2,
            load_peak_rss_bytes=3,
        )

    def prepare(self, job: Job, inputs: Sequence[bytes]) -> tuple[bytes, ...]:
        if "overflows" in job.prompt:
            self.kill()
        if "unusable" in job.prompt:
            raise JobError("expected an image that can be read")
        return tuple(inputs)

    def read(self, prepared: Sequence[tuple[bytes, ...]]) -> Reading | None:  # noqa: ARG002
        return None

    def generate(
        self,
        batch: Batch,
        prepared: Sequence[tuple[bytes, ...]],
        *,
        kept: Kept,
        channel: Channel,
        reading: Reading | None = None,  # noqa: ARG002
        following: Following = (),
    ) -> BatchResult:
        self.batches.append(tuple(job.id for job in batch.jobs))
        self._write_together(batch, following)
        if any("heavy" in job.prompt for job in batch.jobs) and len(batch.jobs) > 1:
            raise OutOfMemoryError("the batch does not fit")
        if any("huge" in job.prompt for job in batch.jobs) and self.modes[0] != "low":
            raise OutOfMemoryError("the job does not fit")
        if any("kills" in job.prompt for job in batch.jobs):
            self.kill()
        if any("poison" in job.prompt for job in batch.jobs):
            raise RuntimeError("poisoned")
        if batch.group.task is Task.INTERLEAVE:
            results = self._interleave(batch, kept, channel)
        elif batch.group.drawing is None:
            results = [
                _answer(job, inputs) for job, inputs in zip(batch.jobs, prepared, strict=True)
            ]
        else:
            results = self._passes(batch, prepared, kept, channel)
        metrics = BatchMetrics(
            prefill_s=0.5,
            think_s=2.0,
            denoise_s=4.0,
            num_denoise_steps=8,
            num_kept_images=self.num_kept,
            total_s=8.0,
        )
        return BatchResult(results=tuple(results), metrics=metrics)

    def _write_together(self, batch: Batch, following: Following) -> None:
        if batch.id in self.written:
            self.written.remove(batch.id)
            return
        self.written = {other.id for other, _ in following}
        if following:
            self.waves.append([tuple(job.id for job in one.jobs) for one, _ in following])
        for other, prepared in following:
            assert len(prepared) == len(other.jobs)
            if any("poison" in job.prompt for job in other.jobs):
                raise RuntimeError("poisoned")

    def _step(self, channel: Channel) -> None:
        self.steps += 1
        channel.progress(Progress(phase=Phase.DENOISE, step=1, num_steps=2))
        self.on_step()

    def _passes(
        self,
        batch: Batch,
        prepared: Sequence[tuple[bytes, ...]],
        kept: Kept,
        channel: Channel,
    ) -> list[JobResult | Failure]:
        """Draws single images; a pass that has another one after it is kept."""
        count = len(batch.jobs)
        size = self.a_pass or count
        kept = [kept[i] if i < len(kept) else () for i in range(count)]
        self.num_kept = 0
        images: list[np.ndarray | None] = []
        for start in range(0, count, size):
            members = range(start, min(start + size, count))
            if all(kept[i] for i in members):
                images += [kept[i][-1].image for i in members]
                self.num_kept += len(members)
                continue
            if size < count and channel.is_stopped():
                raise BatchStoppedError("stopped")
            self.drawn.append(tuple(batch.jobs[i].id for i in members))
            drawn = [self._drawn(batch, i, prepared[i]) for i in members]
            images += drawn
            self._step(channel)
            whole = [KeptImage(image=image, tokens=()) for image in drawn if image is not None]
            if members.stop < count and len(whole) == len(members):
                channel.keep(list(zip(members, whole, strict=True)))
        return [self._result(batch, index, image) for index, image in enumerate(images)]

    def _drawn(self, batch: Batch, index: int, inputs: Sequence[bytes]) -> np.ndarray | None:
        job, key = batch.jobs[index], batch.keys[index]
        if "fails" in job.prompt:
            return None
        return drawn_image(job.resolution, batch.id, key, *inputs)

    def _result(self, batch: Batch, index: int, image: np.ndarray | None) -> JobResult | Failure:
        job = batch.jobs[index]
        text = f"thinking in {batch.id}\n" if job.think else None
        tokens = 10 if job.think else 0
        if image is None:
            return Failure.of(ValueError("NaN in the output"), think_tokens=tokens)
        return JobResult(
            images=(to_pixels(image),),
            text=text,
            think_tokens=tokens,
            finish_reason=_finish_reason(job),
        )

    def _interleave(self, batch: Batch, kept: Kept, channel: Channel) -> list[JobResult | Failure]:
        drawn = [list(kept[i]) if i < len(kept) else [] for i in range(len(batch.jobs))]
        self.num_kept = sum(map(len, drawn))
        wanted = [_num_images(job, key) for job, key in zip(batch.jobs, batch.keys, strict=True)]
        while True:
            self._step(channel)
            grows = len(batch.jobs) > 1 and "grows" in batch.jobs[0].prompt
            if grows and max(map(len, drawn)) == 2:
                raise OutOfMemoryError("the batch no longer fits")
            unfinished = [i for i, images in enumerate(drawn) if len(images) < wanted[i]]
            if not unfinished:
                break
            if channel.is_stopped():
                raise BatchStoppedError("stopped")
            images = [(i, self._next(batch, i, drawn[i])) for i in unfinished]
            channel.keep(images)
            for i, image in images:
                drawn[i].append(image)
        return [
            JobResult(
                images=tuple(to_pixels(kept.image) for kept in images),
                text=" ".join(str(token) for kept in images for token in kept.tokens),
                text_tokens=5,
                finish_reason=_finish_reason(job),
            )
            for job, images in zip(batch.jobs, drawn, strict=True)
        ]

    def _next(self, batch: Batch, index: int, before: Sequence[KeptImage]) -> KeptImage:
        job, key = batch.jobs[index], batch.keys[index]
        state = [digest(kept.image.tobytes(), kept.tokens) for kept in before]
        image = drawn_image(job.resolution, batch.id, key, *state)
        return KeptImage(image=image, tokens=tuple(digest(batch.id, key, *state)[:3]))


def _finish_reason(job: Job) -> FinishReason:
    return FinishReason.TOKEN_LIMIT if "cut" in job.prompt else FinishReason.COMPLETE


def _answer(job: Job, inputs: Sequence[bytes]) -> JobResult:
    """Returns the first choice, or a text that tells different questions apart."""
    said = f"{job.prompt} {len(inputs)} {digest(*inputs).hex()[:8]}"
    choices = job.sampling.choices
    scores = tuple(-1.0 - number for number in range(len(choices)))
    answer = choices[0] if choices else said
    text = f"<think>\nhm\n</think>\n\n{answer}" if job.think else answer
    tokens = 0 if choices else 7
    return JobResult(text=text, answer=answer, choice_log_probabilities=scores, text_tokens=tokens)


def _num_images(job: Job, key: str) -> int:
    most = job.sampling.max_images
    return most if "grows" in job.prompt else 1 + digest(key)[0] % most


@dataclass
class Recorder:
    """An observer that remembers."""

    finished: list[Attempt] = field(default_factory=list)
    failures: list[tuple[str, bool]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    workers: list[WorkerState] = field(default_factory=list)
    splits: list[tuple[str, ...]] = field(default_factory=list)
    plan: Plan | None = None
    counts: Counts | None = None

    def run_started(self, counts: Counts, plan: Plan) -> None:
        self.counts, self.plan = counts, plan

    def batch_started(self, _: Batch) -> None:
        pass

    def progress(self, progress: Progress) -> None:
        pass

    def worker_changed(self, worker: WorkerState) -> None:
        self.workers.append(worker)

    def batch_split(self, batch: Batch) -> None:
        self.splits.append(tuple(job.id for job in batch.jobs))

    def batch_finished(self, _: Batch, attempts: Sequence[Attempt]) -> None:
        self.finished += attempts

    def job_failed(self, attempt: Attempt, will_retry: bool) -> None:
        self.failures.append((attempt.job_id, will_retry))

    def note(self, text: str) -> None:
        self.notes.append(text)


class Flag:
    """A stop signal; may be set after a number of questions."""

    def __init__(self, after: int | None = None) -> None:
        self._left = after

    def is_set(self) -> bool:
        if self._left is None:
            return False
        self._left -= 1
        return self._left < 0


@dataclass(frozen=True)
class Ran:
    """What one run came to."""

    summary: Summary
    engine: FakeEngine
    seen: Recorder
    changes: Changes


def run_store(
    store: Store,
    jobs: Sequence[Job],
    config: RunConfig | None = None,
    *,
    engine: FakeEngine | None = None,
    stop: Stop | None = None,
    functions: Mapping[str, Judge] | None = None,
) -> Ran:
    """Ingests jobs into an open store and runs them."""
    engine, seen = engine or FakeEngine(), Recorder()
    changes = store.ingest(jobs, IDENTITY)
    summary = execute(
        store=store,
        worker=EngineWorker(engine),
        config=config or make_config(),
        read_image=reading(store.run_dir.root, read_input),
        observer=seen,
        stop=stop or Flag(),
        functions=functions,
    )
    return Ran(summary=summary, engine=engine, seen=seen, changes=changes)


def run_worker(
    root: Path,
    jobs: Sequence[Job],
    config: RunConfig,
    *,
    worker: Worker,
    seen: Recorder | None = None,
    stop: Stop | None = None,
) -> Summary:
    """Opens a run's folder, ingests jobs and has a worker run them."""
    with open_store(root) as store:
        store.state.ingest(jobs, IDENTITY, root)
        return execute(
            store=store,
            worker=worker,
            config=config,
            read_image=reading(store.run_dir.root, read_input),
            observer=seen or Recorder(),
            stop=stop or Flag(),
        )


def run_folder(
    root: Path,
    jobs: Sequence[Job],
    config: RunConfig | None = None,
    *,
    engine: FakeEngine | None = None,
    stop: Stop | None = None,
    functions: Mapping[str, Judge] | None = None,
) -> Ran:
    """Opens a run's folder, ingests jobs and runs them."""
    with open_store(root) as store:
        return run_store(store, jobs, config, engine=engine, stop=stop, functions=functions)


def mixed_jobs() -> list[Job]:
    """Returns jobs of all tasks among which some fail in every way there is."""
    jobs = [make_job(f"t{i}") for i in range(5)]
    jobs += [make_job("fails", prompt="this one fails"), make_job("t6", think=True)]
    jobs += [make_job(f"story{i}", Task.INTERLEAVE) for i in range(3)]
    jobs += [make_job("poison", prompt="poison"), make_job("t7")]
    jobs += [
        make_job(f"edit{i}", Task.EDIT, images=(make_input("missing" if i == 1 else f"in{i}"),))
        for i in range(4)
    ]
    jobs += [make_job(f"heavy{i}", Task.INTERLEAVE, prompt="heavy", seed=i) for i in range(2)]
    jobs += [make_job(f"grows{i}", Task.INTERLEAVE, prompt="grows", seed=i) for i in range(2)]
    return jobs


VOLATILE = frozenset(
    {"run", "session", "queue_s", "encode_s", "peak_rss_bytes", "started_at", "finished_at"}
) | {"total_s", "num_kept_images", "image_tok_per_s"}
"""Columns of the log that no two runs share, or that say what was interrupted."""


def outcome(root: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Returns every file a run's jobs made, and its log without what no two runs share."""
    import pyarrow.parquet as pq

    files = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for folder in ("images", "text", "errors")
        for path in sorted((root / folder).rglob("*"))
        if path.is_file()
    }
    rows = [
        {name: value for name, value in row.items() if name not in VOLATILE}
        for row in pq.read_table(root / "log.parquet").to_pylist()
    ]
    return files, sorted(rows, key=lambda row: (row["job_id"], row["attempt"]))
