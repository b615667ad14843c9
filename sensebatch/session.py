"""One run as a library call: opens checkpoint and folder, ingests the jobs, plans and runs them.

Prints nothing, handles no signals and ends no process: it reports to an observer, heeds a stop
and returns or raises. torch is imported late: to know the device, and to load weights if there
is work to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import sensebatch
from sensebatch.checkpoint.files import Checkpoint, check_tensors, open_checkpoint
from sensebatch.checkpoint.fingerprint import fingerprint, fingerprint_file
from sensebatch.checkpoint.system_prompts import resolve_system_prompts
from sensebatch.config import ModelConfig, RunConfig
from sensebatch.contract import Engine, Progress
from sensebatch.errors import RunFolderError, RunStoppedError, StoppedError
from sensebatch.executor.run import Stop, Summary, execute
from sensebatch.jobs import Batch, EngineInfo, Job, ModelIdentity, Task
from sensebatch.manifest.inputs import InputReader
from sensebatch.plan.batches import Plan, make_plan
from sensebatch.plan.load import Load, plan_loads
from sensebatch.report.summary import format_summary, read_log, summarise
from sensebatch.settings import RUN_SECTION, dump_settings
from sensebatch.store.attempts import Attempt
from sensebatch.store.files import write_atomic
from sensebatch.store.ingest import Changes
from sensebatch.store.run_dir import RunDir
from sensebatch.store.state import Counts
from sensebatch.store.store import Store, open_store


class Backend(Protocol):
    """What computes: the engine, or a stand-in."""

    def resolve_runtime(self, model: ModelConfig) -> tuple[str, str]:
        """Returns device and dtype by name."""

    def check_lora(self, file: Path, checkpoint: Checkpoint) -> None:
        """Makes sure that a LoRA can be merged into a checkpoint's weights."""

    def load_engine(
        self,
        config: RunConfig,
        *,
        checkpoint: Checkpoint,
        identity: ModelIdentity,
        system_prompt_source: Mapping[Task, str],
        device: str,
        loads: Sequence[Load],
    ) -> Engine:
        """Returns the engine, loaded, with its memory planned for these loads."""


class TorchBackend:
    """Computes with torch, which it imports when it is first asked something."""

    def resolve_runtime(self, model: ModelConfig) -> tuple[str, str]:
        """Returns device and dtype by name."""
        from sensebatch.engine.device.runtime import resolve_runtime

        return resolve_runtime(model)

    def check_lora(self, file: Path, checkpoint: Checkpoint) -> None:
        """Makes sure that a LoRA can be merged into a checkpoint's weights."""
        from sensebatch.checkpoint.tensors import expected_tensors
        from sensebatch.engine.weights.lora import Lora

        Lora.open(file, expected_tensors(checkpoint.architecture))

    def load_engine(
        self,
        config: RunConfig,
        *,
        checkpoint: Checkpoint,
        identity: ModelIdentity,
        system_prompt_source: Mapping[Task, str],
        device: str,
        loads: Sequence[Load],
    ) -> Engine:
        """Returns the engine, loaded, with its memory planned for these loads."""
        from sensebatch.engine.engine import load_engine

        return load_engine(
            config,
            checkpoint=checkpoint,
            identity=identity,
            system_prompt_source=system_prompt_source,
            device=device,
            loads=loads,
        )


class RunObserver:
    """Watches a run; each method does nothing until it is overridden.

    Every method is called from the thread that runs the session.
    """

    def warning(self, text: str) -> None:
        """Something is allowed but deserves a look."""

    def jobs_read(self, root: Path, changes: Changes) -> None:
        """The run's folder is open and has the jobs of this run."""

    def loading(self, counts: Counts, model: Model) -> None:
        """There are jobs to run, and the weights are loaded for them."""

    def loaded(self, info: EngineInfo) -> None:
        """The weights are loaded."""

    def run_started(self, counts: Counts, plan: Plan) -> None:
        """The first batch is next; interrupted batches, counted as started, precede the plan."""

    def batch_started(self, batch: Batch) -> None:
        """A batch goes into the engine; the one before is through."""

    def progress(self, progress: Progress) -> None:
        """The batch in the engine advanced."""

    def batch_split(self, batch: Batch) -> None:
        """The batch in the engine failed as a whole; its jobs are run in smaller ones."""

    def batch_finished(self, batch: Batch, attempts: Sequence[Attempt]) -> None:
        """A batch is committed; its jobs are done or failed."""

    def job_failed(self, attempt: Attempt, will_retry: bool) -> None:
        """A job failed, in a batch or before one could begin."""

    def note(self, text: str) -> None:
        """Something a person may want to know, such as a batch that was split."""


class NeverStop:
    """A stop that is never set."""

    def is_set(self) -> bool:
        """Returns False."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be run, and where."""

    root: Path
    """The run's folder."""
    config: RunConfig
    sources: tuple[str, ...]
    """The manifests as the user named them."""
    jobs: Callable[[], Iterator[Job]]
    """Reads the manifests; called once, when the folder is held."""
    limit: int | None = None
    """After how many jobs `jobs` ends although the manifests may continue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A checkpoint and everything about it that job keys depend on; no weights."""

    name: str
    """As the user named it."""
    checkpoint: Checkpoint
    identity: ModelIdentity
    prompt_source: Mapping[Task, str]
    device: str


def run_session(
    request: Request,
    backend: Backend | None = None,
    *,
    observer: RunObserver | None = None,
    stop: Stop | None = None,
) -> Summary:
    """Runs what is missing in a run's folder, and returns what it came to.

    Args:
        request: What to run.
        backend: What computes; torch if None.
        observer: Who watches.
        stop: Once set, the run ends as `executor.run.execute` says.

    Raises:
        SensebatchError: Something the user can fix, before any job was run.
        RunStoppedError: The disk is full, or the device failed; the run can be resumed.
        StoppedError: The stop was set before any job was run.
    """
    backend = TorchBackend() if backend is None else backend
    observer = RunObserver() if observer is None else observer
    stop = NeverStop() if stop is None else stop
    with _summarised(request.root):
        model = open_model(request.config.model, backend, observer)
        with open_store(request.root) as store:
            jobs = _until_stopped(request.jobs(), stop)
            changes = store.state.ingest(jobs, model.identity, request.root, limit=request.limit)
            store.run_dir.write_settings(_settings_document(request))
            observer.jobs_read(request.root, changes)
            return _run_pending(request.config, store, model, backend, observer, stop)


@contextmanager
def _summarised(root: Path) -> Iterator[None]:
    """Writes the summary of a run's log at the end of the block, also where the run was stopped."""
    try:
        yield
    except RunStoppedError:
        with suppress(RunStoppedError, RunFolderError):
            _write_summary(root)
        raise
    _write_summary(root)


def _write_summary(root: Path) -> None:
    run_dir = RunDir(root)
    log = summarise(read_log(run_dir.log))
    write_atomic(run_dir.summary, f"{format_summary(log)}\n".encode())


def open_model(config: ModelConfig, backend: Backend, observer: RunObserver) -> Model:
    """Opens a checkpoint and works out its identity; loads no weights.

    Raises:
        CheckpointError: The checkpoint, LoRA or prompt file cannot be used.
        ConfigError: The device cannot be used.
    """
    checkpoint = open_checkpoint(config.model, config.revision)
    check_tensors(checkpoint)
    file = config.system_prompt_file
    prompts = resolve_system_prompts(checkpoint, None if file is None else Path(file))
    if prompts.warn_built_in:
        observer.warning(
            "no system prompt of the release was found beside the checkpoint; the built-in one "
            "is used, with which the checkpoint was not trained (see --system-prompt-file)"
        )
    device, dtype = backend.resolve_runtime(config)
    identity = ModelIdentity(
        checkpoint=fingerprint(checkpoint),
        lora=None if config.lora_path is None else fingerprint_file(Path(config.lora_path)),
        dtype=dtype,
        precision=config.quantised,
        generation_prompt=prompts.by_task[Task.T2I].text,
        interleave_prompt=prompts.by_task[Task.INTERLEAVE].text,
    )
    # Keys depend on it: a mistake found after the manifest was read would have every job that is
    # done run again.
    if config.lora_path is not None:
        backend.check_lora(Path(config.lora_path), checkpoint)
    return Model(
        name=config.model,
        checkpoint=checkpoint,
        identity=identity,
        prompt_source={task: prompt.source for task, prompt in prompts.by_task.items()},
        device=device,
    )


def _settings_document(request: Request) -> dict[str, Any]:
    """Returns what run.yaml says: the version, the manifests and every resolved setting."""
    return {
        "sensebatch": sensebatch.__version__,
        "manifests": list(request.sources),
        RUN_SECTION: dump_settings(request.config),
    }


def _run_pending(
    config: RunConfig,
    store: Store,
    model: Model,
    backend: Backend,
    observer: RunObserver,
    stop: Stop,
) -> Summary:
    if config.execution.retry_failed:
        store.state.retry_failed()
    counts = store.state.counts()
    if not counts.remaining:
        return _nothing_to_run(counts)
    observer.loading(counts, model)
    engine = _load(config, store, model, backend)
    observer.loaded(engine.info)
    reader = InputReader()
    try:
        return execute(
            store=store,
            engine=engine,
            config=config,
            read_image=reader.read,
            observer=observer,
            stop=stop,
        )
    except RunFolderError as error:
        # Before the first batch this is the user's to fix; now there is a run to resume.
        raise RunStoppedError(str(error)) from error
    finally:
        reader.close()


def _nothing_to_run(counts: Counts) -> Summary:
    return Summary(
        counts=counts,
        done=0,
        failed=0,
        images=0,
        stopped=False,
        too_many_failures=False,
        seconds=0.0,
    )


def _load(config: RunConfig, store: Store, model: Model, backend: Backend) -> Engine:
    """Returns the engine, with its memory planned for all that is to be run."""
    to_run = make_plan(store.state.entries(with_started=True), config.memory)
    prompt_bytes = model.identity.system_prompt_bytes
    return backend.load_engine(
        config,
        checkpoint=model.checkpoint,
        identity=model.identity,
        system_prompt_source=model.prompt_source,
        device=model.device,
        loads=plan_loads(to_run, system_prompt_bytes=prompt_bytes),
    )


def _until_stopped(jobs: Iterator[Job], stop: Stop) -> Iterator[Job]:
    for job in jobs:
        if stop.is_set():
            raise StoppedError("the run was stopped before any of its jobs was run")
        yield job
