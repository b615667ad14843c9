"""One run as a library call: open checkpoint and folder, ingest the jobs, plan them and run them.

It prints nothing, handles no signals and never ends the process: it reports to an observer, heeds
a stop, and returns or raises. torch is imported late: to find the device, and to load weights if
there is work to do.
"""

from __future__ import annotations

import secrets
import shlex
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import sensebatch
from sensebatch import loading
from sensebatch.config import TINY_MODEL, ModelConfig, RunConfig, WorkersConfig
from sensebatch.contract import Engine, HostShare, Progress, Stop
from sensebatch.dataset.picks import Pick, Picks
from sensebatch.errors import (
    ConfigError,
    EngineError,
    Problem,
    RunFolderError,
    RunStoppedError,
    StoppedError,
)
from sensebatch.executor.backends import BACKENDS
from sensebatch.executor.claim import expected_counts
from sensebatch.executor.crew import execute_crew
from sensebatch.executor.deadline import Deadline
from sensebatch.executor.observer import Summary, WorkerState, report
from sensebatch.executor.ray_actor import Recipe
from sensebatch.executor.roster import Crew, Roster
from sensebatch.executor.run import execute
from sensebatch.executor.worker import EngineWorker, NoEngine
from sensebatch.functions import Judge, load_functions, unused_words
from sensebatch.jobs import Batch, EngineInfo, InputImage, Job
from sensebatch.loading import (
    Backend,
    Model,
    NeverStop,
    ReusableEngine,
    WorkerEngine,
    open_model,
    unloaded_info,
)
from sensebatch.manifest.inputs import InputReader
from sensebatch.manifest.problems import ProblemList
from sensebatch.plan.batches import Plan, make_plan
from sensebatch.plan.computation import gpu_computation
from sensebatch.plan.load import Load, plan_loads
from sensebatch.plan.long_prompts import LongPrompts
from sensebatch.plan.patience import MeasuredGpu, PlannedSeconds
from sensebatch.plan.seconds import new_clock
from sensebatch.report.acceptance import acceptance_table
from sensebatch.report.summary import format_summary, read_log, summarise
from sensebatch.settings import RUN_SECTION, dump_settings
from sensebatch.store.attempts import Attempt
from sensebatch.store.chains import reading
from sensebatch.store.dry_run import DryRun, dry_run
from sensebatch.store.file_systems import network_file_system
from sensebatch.store.files import write_atomic
from sensebatch.store.ingest import Changes
from sensebatch.store.manifests import ManifestFiles
from sensebatch.store.run_dir import RunDir
from sensebatch.store.shards import SHARD, Shard
from sensebatch.store.state import Counts, State
from sensebatch.store.status import read_acceptance, recent_batches
from sensebatch.store.store import Store, open_store
from sensebatch.units import counted

clock = time.time
"""Says when a deadline has come; one name to stop at in tests."""


class WarmEngine:
    """A model that stays loaded from run to run; a `Backend` for one run at a time.

    The first run that has something to do loads the weights, because memory is planned for its
    jobs. Every later run plans memory again, and reloads the weights only if they belong elsewhere.

    Args:
        config: Its model settings apply to every run.
        backend: Loads the engine.

    Raises:
        CheckpointError: The checkpoint, LoRA or prompt file cannot be used.
        ConfigError: The device cannot be used.
    """

    def __init__(self, config: RunConfig, backend: Backend) -> None:
        self.config = config
        """The settings it was opened with."""
        self._backend = backend
        self._model = open_model(config.model, backend)
        self._engine: ReusableEngine | None = None
        self._in_use = threading.Lock()
        self._is_open, self._is_lent = True, False

    def __enter__(self) -> WarmEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the weights.

        Raises:
            EngineError: A run is using the engine.
        """
        with self.held():
            self._is_open = False
            self._discard()

    @contextmanager
    def held(self, model: ModelConfig | None = None) -> Iterator[WarmEngine]:
        """Reserves the engine for one run; after a run that fails, the next one reloads it.

        Args:
            model: The model settings of the run; None if there is no run.

        Raises:
            EngineError: The engine is closed, in use, or holds another model.
        """
        if model is not None:
            self._require(model)
        if not self._in_use.acquire(blocking=False):
            raise EngineError("expected a free engine, found one that another run is using")
        try:
            if not self._is_open:
                raise EngineError("expected an open engine, found a closed one")
            self._is_lent = False
            yield self
        except BaseException:
            # The error may have left it in any state.
            if self._is_lent:
                self._discard()
            raise
        finally:
            self._in_use.release()

    def _require(self, model: ModelConfig) -> None:
        own, asked = asdict(self.config.model), asdict(model)
        for name, value in own.items():
            if value != asked[name]:
                raise EngineError(
                    f"model.{name}: expected {value!r}, which the engine was opened with, found "
                    f"{asked[name]!r}; open another engine"
                )

    def resolve_runtime(self, model: ModelConfig) -> tuple[str, str]:  # noqa: ARG002
        """Returns the names of device and dtype of the model that is held."""
        return self._model.device, self._model.identity.dtype

    def load_engine(
        self,
        config: RunConfig,
        model: Model,
        *,
        loads: Sequence[Load],
        stop: Stop,
        share: HostShare | None = None,
    ) -> ReusableEngine:
        """Returns the engine with its memory planned for these loads.

        Raises:
            EngineError: The checkpoint's files or system prompts have changed.
        """
        if model.identity != self._model.identity:
            raise EngineError(
                f"{model.name}: expected the checkpoint that the engine was opened with, but its "
                "files have changed; open another engine"
            )
        self._is_lent = True
        if self._engine is not None and model.checkpoint == self._model.checkpoint:
            self._engine.replan(config, loads=loads, stop=stop.is_set)
            return self._engine
        # The same weights, but in other files: a copy, or other shards.
        self._discard()
        self._model = model
        self._engine = self._backend.load_engine(config, model, loads=loads, stop=stop, share=share)
        return self._engine

    def _discard(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()


class RunObserver:
    """Watches a run. Each method does nothing until it is overridden.

    All of them are called from the thread that runs the session.
    """

    def warning(self, text: str) -> None:
        """Takes a warning: something that is allowed but deserves a look."""

    def jobs_read(self, root: Path, changes: Changes) -> None:
        """The run's folder is open, and its state has the jobs of this run."""

    def judging(self, counts: Counts) -> None:
        """Functions are about to judge, without weights: nothing else is to be done for now."""

    def loading(self, counts: Counts, model: Model) -> None:
        """There are jobs to run, so the weights are about to be loaded."""

    def loaded(self, info: EngineInfo) -> None:
        """The weights are loaded."""

    def run_started(self, counts: Counts, plan: Plan) -> None:
        """The first batch is next; interrupted batches, counted as started, precede the plan.

        Where functions judged before the weights were loaded, it is called once more after that.
        """

    def batch_started(self, batch: Batch) -> None:
        """A batch goes into the engine; the one before has left it."""

    def progress(self, progress: Progress) -> None:
        """The batch in the engine advanced."""

    def worker_changed(self, worker: WorkerState) -> None:
        """A worker in a process of its own began a batch, advanced, ended one, or died."""

    def batch_split(self, batch: Batch) -> None:
        """The batch in the engine failed as a whole; its jobs will run in smaller batches."""

    def batch_finished(self, batch: Batch, attempts: Sequence[Attempt]) -> None:
        """A batch is committed; its jobs are done or failed."""

    def job_failed(self, attempt: Attempt, will_retry: bool) -> None:
        """A job failed, in a batch or before its batch began."""

    def note(self, text: str) -> None:
        """Takes something a person may want to know, such as why a batch was split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to run, and where."""

    root: Path
    """The run's folder."""
    config: RunConfig
    sources: tuple[str, ...]
    """The manifests, as the user named them."""
    jobs: Callable[[], Iterator[Job]]
    """Reads the manifests; called once, while the folder is locked."""
    limit: int | None = None
    """The number of jobs after which `jobs` ends, even if the manifests have more."""
    files: ManifestFiles | None = None
    """What `jobs` reads and nothing else; None if the jobs have another source."""
    shard: Shard | None = None
    """The shard of the jobs that the folder is for; None for all of them."""
    state_dir: Path | None = None
    """A folder of this machine for the state database; None where it is already."""
    until: float | None = None
    """When the run is to be over, in seconds since the epoch; None for no deadline."""
    workers: WorkersConfig | None = None
    """Workers in processes of their own; None for one engine in this process."""
    measured: MeasuredGpu | None = None
    """A GPU that was measured, to know how long workers with such a one may say nothing."""
    redraw: bool = False
    """Whether done jobs may be drawn again because only the model or its settings are others."""
    confirm: Callable[[str], bool] | None = None
    """Asks somebody whether they may; None if there is nobody to ask."""
    is_guarded: bool = True
    """Whether what another model made in the folder is kept from being replaced at all; not for a
    folder that is used for one job after the other."""
    retry_from: Picks | None = None
    """Picks whose rejected jobs run again."""


class _ClusterRuntime:
    """A backend for a run whose workers are on a cluster: nothing is asked of this machine."""

    def __init__(self, backend: Backend) -> None:
        self.load_engine = backend.load_engine

    def resolve_runtime(self, model: ModelConfig) -> tuple[str, str]:
        """Returns the names of device and dtype; each worker makes sure of them."""
        device = "cpu" if model.device == "cpu" else "cuda"
        default = "float32" if device == "cpu" else "bfloat16"
        return device, default if model.dtype == "auto" else model.dtype


def run_session(
    request: Request,
    backend: Backend | None = None,
    *,
    observer: RunObserver | None = None,
    stop: Stop | None = None,
) -> Summary:
    """Runs what is missing in a run's folder, and returns what became of it.

    Args:
        request: What to run.
        backend: Computes; torch if None.
        observer: Watches the run.
        stop: Once it is set, the run ends as described in `executor.run.execute`.

    Raises:
        SensebatchError: Something the user can fix, raised before any job runs.
        RunStoppedError: The disk is full, or the device failed; the run can be resumed.
        StoppedError: The stop was set before any job ran.
    """
    backend = loading.TorchBackend() if backend is None else backend
    observer = RunObserver() if observer is None else observer
    stop = NeverStop() if stop is None else stop
    functions = load_functions(request.config.accept)
    with _summarised(request.root):
        model = open_model(request.config.model, _runtime(request, backend), observer.warning)
        with open_store(request.root, state_dir=request.state_dir) as store:
            _warn_of_network(store.run_dir.state, observer)
            changes = _read(request, store.state, model, observer, stop, ingest=store.ingest)
            store.run_dir.write_settings(_settings_document(request))
            observer.jobs_read(request.root, changes)
            _run_again(request, store.state, observer)
            _warn_of_unused(request, store.state, observer)
            return _run_pending(
                request,
                store,
                model,
                backend=backend,
                functions=functions,
                observer=observer,
                stop=stop,
            )


def dry_run_session(
    request: Request, backend: Backend | None = None, *, observer: RunObserver | None = None
) -> DryRun:
    """Returns what `run_session` would do with each job, and why; changes nothing.

    Args:
        request: What to run.
        backend: Says on which device; torch if None.
        observer: Takes the warnings.

    Raises:
        SensebatchError: Something the user can fix, as from `run_session`.
    """
    backend = loading.TorchBackend() if backend is None else backend
    observer = RunObserver() if observer is None else observer
    model = open_model(request.config.model, _runtime(request, backend), observer.warning)
    allowed = replace(request, redraw=True)

    def read(state: State) -> Changes:
        ingest = partial(state.ingest, root=request.root)
        changes = _read(allowed, state, model, observer, NeverStop(), ingest=ingest)
        _warn_of_unused(request, state, observer)
        return changes

    return dry_run(
        request.root,
        read,
        lambda state: _run_again(request, state, observer),
        retry_failed=request.config.execution.retry_failed,
    )


def _read(
    request: Request,
    state: State,
    model: Model,
    observer: RunObserver,
    stop: Stop,
    *,
    ingest: Callable[..., Changes],
) -> Changes:
    """Makes the jobs of a request those of a folder, unless that would replace what it must not.

    Raises:
        RunFolderError: The folder belongs to another model, or the model is no longer the one that
            drew what is done, and nobody said that it may be drawn again.
    """
    if request.is_guarded and model.name == TINY_MODEL:
        _refuse_tiny(request.root, state, model)
    long = LongPrompts(
        lambda problem: observer.warning(str(problem)), model.checkpoint.architecture
    )
    jobs = long.watch(_until_stopped(request.jobs(), stop))
    jobs = _with_inputs_apart(jobs, RunDir(request.root).images)
    return ingest(
        jobs,
        model.identity,
        limit=request.limit,
        files=request.files,
        shard=request.shard,
        approve=partial(_approve, request),
    )


def _refuse_tiny(root: Path, state: State, model: Model) -> None:
    """Refuses to run the embedded model, which nobody may have asked for, where another one was.

    Raises:
        RunFolderError: Done jobs of the folder were made by another model.
    """
    other = state.other_model(model.identity.checkpoint, TINY_MODEL)
    if other is not None:
        raise RunFolderError(
            f"{root}: expected the model that made its images, {other}, found the embedded one, "
            f"{TINY_MODEL}; say --model {shlex.quote(other)}, or give another --output-dir"
        )


def _approve(request: Request, changes: Changes) -> None:
    """Has a person approve that done jobs are drawn again for the model's sake.

    Raises:
        RunFolderError: It is not approved.
    """
    redraw = changes.redraw
    if redraw is None or request.redraw or not request.is_guarded:
        return
    jobs = counted(redraw.jobs, "finished job")
    words = f"{request.root}: {jobs} would be drawn again: {'; '.join(redraw.reasons)}"
    if request.confirm is not None and request.confirm(words):
        return
    raise RunFolderError(
        f"{words}. Nothing was changed: say --redraw if that is meant, use the settings as they "
        "were, or give another --output-dir"
    )


def _run_again(request: Request, state: State, observer: RunObserver) -> Collection[str]:
    """Has jobs run again that a picks file rejects, and returns their ids.

    Raises:
        ConfigError: The file has no picks of the folder.
    """
    picks = request.retry_from
    if picks is None:
        return ()
    rejected = {
        job_id: picked.key
        for job_id, picked in picks.of_run(state.run_id).items()
        if picked.pick is Pick.REJECT
    }
    _, num_done = state.run_again(rejected, picks.digest)
    if num_done:
        jobs = "1 rejected job is" if num_done == 1 else f"{num_done:,} rejected jobs are"
        observer.warning(
            f"{jobs} drawn again as they were, with the same seed and settings, which makes the "
            "same images on the same machine; change them in the manifest for others"
        )
    return rejected


def _warn_of_unused(request: Request, state: State, observer: RunObserver) -> None:
    """Warns of functions that no row wants, unless there are no rows: a command made the job."""
    functions = request.config.accept
    if request.is_guarded and functions and not state.has_tries():
        observer.warning(unused_words(functions))


def _runtime(request: Request, backend: Backend) -> Backend:
    """Returns what says on which device the run computes."""
    workers = request.workers
    return backend if workers is None or workers.cluster is None else _ClusterRuntime(backend)


def _warn_of_network(state: Path, observer: RunObserver) -> None:
    found = network_file_system(state)
    if found is not None:
        observer.warning(
            f"{state} is on {found}, which other machines can write to as well, and whose locks "
            "cannot be relied on; --state-dir keeps it on a disk of this machine"
        )


@contextmanager
def _summarised(root: Path) -> Iterator[None]:
    """Writes the summary of a run's log at the end of the block, even if the run was stopped."""
    try:
        yield
    except RunStoppedError:
        with suppress(RunStoppedError, RunFolderError):
            write_summary(root)
        raise
    write_summary(root)


def write_summary(root: Path) -> None:
    """Writes the summary of a run's log, with what share of the images of each prompt passed.

    Raises:
        RunFolderError: There is no log.
        StorageError: The folder cannot be written.
    """
    run_dir = RunDir(root)
    log = summarise(read_log(run_dir.log))
    lines = [format_summary(log), *acceptance_table(read_acceptance(root))]
    write_atomic(run_dir.summary, ("\n".join(lines) + "\n").encode())


def _settings_document(request: Request) -> dict[str, Any]:
    """Returns the content of run.yaml: the version, the manifests and every resolved setting."""
    shard = {} if request.shard is None else {SHARD: str(request.shard)}
    return {
        "sensebatch": sensebatch.__version__,
        "manifests": list(request.sources),
        **shard,
        RUN_SECTION: dump_settings(request.config),
    }


def _run_pending(
    request: Request,
    store: Store,
    model: Model,
    *,
    backend: Backend,
    functions: Mapping[str, Judge],
    observer: RunObserver,
    stop: Stop,
) -> Summary:
    config = request.config
    if config.execution.retry_failed:
        store.state.retry_failed()
        # Jobs that fail from now on have had their tries.
        config = replace(config, execution=replace(config.execution, retry_failed=False))
    counts = store.state.counts()
    deadline = _deadline(request, store.state)
    if not counts.remaining or deadline.is_set():
        return _nothing_to_run(store, config, counts)
    with closing(InputReader()) as reader:
        course = _Course(
            store=store,
            config=config,
            read_image=reading(store.run_dir.root, reader.read),
            functions=functions,
            observer=observer,
            stop=stop,
            deadline=deadline,
        )
        judged = _judge_first(course, model)
        if judged is not None and _has_ended(judged):
            return judged
        try:
            summary = _load_and_run(_after(judged, course), request, model, backend)
        except StoppedError:
            if judged is None:
                raise
            return replace(judged, stopped=True)
        return summary if judged is None else _together(judged, summary)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Course:
    """What a run is made with, whatever computes."""

    store: Store
    config: RunConfig
    read_image: Callable[[InputImage], bytes]
    functions: Mapping[str, Judge]
    observer: RunObserver
    stop: Stop
    deadline: Deadline


def _judge_first(course: _Course, model: Model) -> Summary | None:
    """Has functions judge what is drawn already, if nothing else is to be done for now.

    Returns:
        What it came to, with jobs left if verdicts ask for more images; None if nothing was judged.
    """
    state = course.store.state
    if not all(group.by_function for group in state.groups_to_run()):
        return None
    course.observer.judging(state.counts())
    return _run_on_engine(NoEngine(unloaded_info(model)), course)


def _has_ended(judged: Summary) -> bool:
    is_over = judged.stopped or judged.late or judged.too_many_failures
    return is_over or not judged.counts.remaining


def _after(judged: Summary | None, course: _Course) -> _Course:
    """Returns what the rest of a run is made with: verdicts that failed count as failures of it."""
    most = course.config.execution.max_failures
    if judged is None or most is None:
        return course
    execution = replace(course.config.execution, max_failures=most - judged.failed)
    return replace(course, config=replace(course.config, execution=execution))


def _together(judged: Summary, rest: Summary) -> Summary:
    """Returns what a run came to, of which functions judged before the rest was run."""
    return replace(
        rest,
        done=judged.done + rest.done,
        failed=judged.failed + rest.failed,
        images=judged.images + rest.images,
        seconds=judged.seconds + rest.seconds,
    )


def _load_and_run(course: _Course, request: Request, model: Model, backend: Backend) -> Summary:
    """Loads the weights, here or in workers, and runs all that is left."""
    config, observer = course.config, course.observer
    _warn_of_cpu(config, model, observer)
    observer.loading(expected_counts(course.store, config), model)
    loads = _loads(config, course.store, model)
    if request.workers is not None:
        roster = _new_roster(request.workers, request, model, backend, loads, observer)
        return _run_on_crew(roster, course)
    engine = backend.load_engine(config, model, loads=loads, stop=course.stop)
    observer.loaded(engine.info)
    for text in engine.info.refusals:
        observer.warning(text)
    return _run_on_engine(engine, course)


def _run_on_engine(engine: Engine, course: _Course) -> Summary:
    with _resumable():
        return execute(
            store=course.store,
            worker=EngineWorker(engine),
            config=course.config,
            read_image=course.read_image,
            functions=course.functions,
            observer=course.observer,
            stop=course.stop,
            deadline=course.deadline,
        )


def _deadline(request: Request, state: State) -> Deadline:
    """Returns the deadline of a request, with what is known of how long batches take."""
    earlier = () if request.until is None else recent_batches(state)
    return Deadline(request.until, clock=clock, earlier=earlier)


def _warn_of_cpu(config: RunConfig, model: Model, observer: RunObserver) -> None:
    if (config.model.device, model.device, model.name == TINY_MODEL) == ("auto", "cpu", False):
        observer.warning("found no GPU that torch can use, so the CPU computes")


@contextmanager
def _resumable() -> Iterator[None]:
    """Says that a run can be resumed whose folder fails once it is under way."""
    try:
        yield
    except RunFolderError as error:
        # Before the first batch this is the user's to fix; now there is a run to resume.
        raise RunStoppedError(str(error)) from error


def _new_roster(
    workers: WorkersConfig,
    request: Request,
    model: Model,
    backend: Backend,
    loads: Sequence[Load],
    observer: RunObserver,
) -> Roster:
    """Returns the workers of a run; see `_new_crew`."""
    crew = _new_crew(workers, request.config, model, backend, loads)
    planned = _planned(request.measured, request.config, model, loads)
    return Roster(crew, partial(report, observer.note), planned=planned)


def _new_crew(
    workers: WorkersConfig,
    config: RunConfig,
    model: Model,
    backend: Backend,
    loads: Sequence[Load],
) -> Crew:
    """Returns the workers of a run, none of which is started yet.

    Raises:
        ConfigError: The backend is not installed, it is not said how many workers there are, or
            there is no GPU and one is needed.
    """
    uses_gpu = model.device == "cuda"
    if not uses_gpu and (workers.count is None or workers.gpus or workers.needs_gpu):
        raise ConfigError(
            "--gpus: expected a GPU that torch can use, found none; --workers N computes on the CPU"
        )
    as_resolved = replace(config.model, device=model.device, dtype=model.identity.dtype)
    recipe = Recipe(
        open_engine=WorkerEngine(
            config=replace(config, model=as_resolved),
            backend=backend,
            identity=model.identity,
            loads=tuple(loads),
            gpu_budget_bytes=workers.gpu_budget_bytes,
        ),
        output=config.output,
        groups=tuple(load.group for load in loads),
        environment=workers.environment,
        version=sensebatch.__version__,
        share=secrets.token_hex(8),
    )
    return BACKENDS[workers.backend](workers, recipe, uses_gpu)


def _run_on_crew(roster: Roster, course: _Course) -> Summary:
    observer = course.observer
    with closing(roster.crew):
        roster.assemble(course.stop)
        infos = [member.by.info for member in roster.ready()]
        observer.loaded(infos[0])
        observer.note(roster.words)
        for text in dict.fromkeys(text for info in infos for text in info.refusals):
            observer.warning(text)
        with _resumable():
            return execute_crew(
                store=course.store,
                roster=roster,
                config=course.config,
                read_image=course.read_image,
                functions=course.functions,
                observer=observer,
                stop=course.stop,
                deadline=course.deadline,
            )


def _planned(
    measured: MeasuredGpu | None, config: RunConfig, model: Model, loads: Sequence[Load]
) -> PlannedSeconds | None:
    """Returns how long batches take by the plan; None where no GPU was measured."""
    if measured is None:
        return None
    computation = gpu_computation(model.checkpoint.architecture, config.model)
    return PlannedSeconds(
        gpu=measured.name,
        clock=new_clock(computation, measured.speeds),
        loads={load.group: load for load in loads},
    )


def _nothing_to_run(store: Store, config: RunConfig, counts: Counts) -> Summary:
    """Returns what a run comes to that draws nothing; it removes rejected images like any other."""
    if not counts.remaining:
        # A kill may have come after the last verdict, or the images may have been kept until now.
        with store.complete_log():
            store.settle(keep_rejected=config.output.keep_rejected)
    return Summary(
        counts=counts,
        done=0,
        failed=0,
        images=0,
        dropped=store.state.num_dropped,
        stopped=False,
        too_many_failures=False,
        seconds=0.0,
        late=counts.remaining > 0,
    )


def _loads(config: RunConfig, store: Store, model: Model) -> list[Load]:
    """Returns the most demanding job of every group that is to be run."""
    entries = (
        entry for entry in store.state.entries(with_started=True) if not entry.group.by_function
    )
    to_run = make_plan(entries, config.memory)
    prompt_bytes = model.identity.system_prompt_bytes
    return plan_loads(to_run, system_prompt_bytes=prompt_bytes)


def _until_stopped(jobs: Iterator[Job], stop: Stop) -> Iterator[Job]:
    for job in jobs:
        if stop.is_set():
            raise StoppedError("the run was stopped before any of its jobs ran")
        yield job


def _with_inputs_apart(jobs: Iterator[Job], images: Path) -> Iterator[Job]:
    """Yields jobs, and refuses those whose images would overwrite the images they start from.

    Args:
        jobs: The jobs of a run.
        images: The folder of the run's images.

    Raises:
        ManifestError: There are such jobs; raised at the end.
    """
    problems = ProblemList()
    images = images.resolve()
    for job in jobs:
        for image in job.images:
            if image.output is not None:
                continue
            path = Path(image.path).resolve()
            names = {path.with_suffix(""), path.parent} if image.member is None else set()
            if images / job.id in names:
                message = f"expected an image that the job does not overwrite, found {image.path}"
                source = job.source
                problems.add(
                    Problem(file=source.file, row=source.row, field="image", message=message)
                )
        yield job
    problems.raise_any()
