"""One run, from resolved settings to the last line: joins checkpoint, manifest, store and engine.

torch is imported here, late: to know the device, and to load weights if there is work to do.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import sensebatch
from sensebatch.checkpoint.files import Checkpoint, check_tensors, open_checkpoint
from sensebatch.checkpoint.fingerprint import fingerprint, fingerprint_file
from sensebatch.checkpoint.system_prompts import resolve_system_prompts
from sensebatch.cli.messages import counted, say, warn
from sensebatch.cli.progress import watch
from sensebatch.cli.signals import StoppedError, StopSignals
from sensebatch.config import ModelConfig, RunConfig
from sensebatch.contract import Engine
from sensebatch.errors import RunFolderError, RunStoppedError
from sensebatch.executor.run import Summary, execute
from sensebatch.jobs import EngineInfo, Job, ModelIdentity, Task
from sensebatch.manifest.inputs import InputReader
from sensebatch.plan.batches import group_load, make_plan
from sensebatch.plan.footprint import Load
from sensebatch.report.summary import format_summary, read_log, summarise
from sensebatch.settings import RUN_SECTION, dump_settings
from sensebatch.store.files import write_atomic
from sensebatch.store.ingest import Changes
from sensebatch.store.run_dir import RunDir
from sensebatch.store.store import Store, open_store

SUMMARY_NAME = "summary.txt"
"""The published summary over all sessions of a run, in its folder."""


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
    """The real one; imports torch when it is asked something."""

    def resolve_runtime(self, model: ModelConfig) -> tuple[str, str]:
        """Returns device and dtype by name."""
        from sensebatch.engine.device.runtime import resolve_runtime

        _settle_allocator()
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


def _loaded(info: EngineInfo) -> str:
    """Returns how long loading took, and how much of it compiling kernels."""
    compiling = f", {info.compile_s:.1f} s of it for kernels" if info.compile_s is not None else ""
    return f"loaded in {info.load_s:.1f} s{compiling}"


def _settle_allocator() -> None:
    """Lets torch's allocator grow what it holds in place; it reads this when it is first used.

    Otherwise it keeps freed pieces of sizes that no later tensor has, and a budget holds less. A
    setting of the user's own stays.
    """
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


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
    """After how many jobs `jobs` ends although the manifests may go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A checkpoint and everything about it that job keys depend on; no weights."""

    checkpoint: Checkpoint
    identity: ModelIdentity
    prompt_source: Mapping[Task, str]
    device: str


def run_session(request: Request, backend: Backend | None = None) -> Summary:
    """Runs what is missing in a run's folder, and returns what it came to.

    Args:
        request: What to run.
        backend: What computes; the engine if None.

    Raises:
        SensebatchError: Something the user can put right, before any job was run.
        RunStoppedError: The disk is full, or the device failed; the run can go on later.
        StoppedError: A signal came before there was anything to stop.
    """
    backend = TorchBackend() if backend is None else backend
    say(f"reading {', '.join(request.sources)}")
    with StopSignals().installed() as stop, _summarised(request.root):
        model = open_model(request.config.model, backend)
        with open_store(request.root) as store:
            jobs = _until_stopped(request.jobs(), stop)
            changes = store.state.ingest(jobs, model.identity, request.root, limit=request.limit)
            store.run_dir.write_settings(_settings_document(request))
            _say_changes(changes)
            return _run_pending(request.config, store, model, backend, stop)


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
    log = summarise(read_log(RunDir(root).log))
    write_atomic(root / SUMMARY_NAME, f"{format_summary(log)}\n".encode())


def open_model(config: ModelConfig, backend: Backend) -> Model:
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
        warn(
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
    # Keys depend on it: a mistake found behind the reading of the manifest would have every job
    # that is done run again.
    if config.lora_path is not None:
        backend.check_lora(Path(config.lora_path), checkpoint)
    return Model(
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
    config: RunConfig, store: Store, model: Model, backend: Backend, stop: StopSignals
) -> Summary:
    if config.execution.retry_failed:
        store.state.retry_failed()
    counts = store.state.counts()
    if not counts.remaining:
        return Summary(
            counts=counts,
            done=0,
            failed=0,
            images=0,
            stopped=False,
            too_many_failures=False,
            seconds=0.0,
        )
    say(f"{counts.remaining:,} of {counted(counts.jobs, 'job')} to run in {store.run_dir.root}")
    identity = model.identity
    how = ", ".join(filter(None, (identity.dtype, identity.precision)))
    say(f"loading {config.model.model} on {model.device} ({how})")
    to_run = make_plan(store.state.entries(with_started=True), config.memory)
    engine = backend.load_engine(
        config,
        checkpoint=model.checkpoint,
        identity=model.identity,
        system_prompt_source=model.prompt_source,
        device=model.device,
        loads=[
            group_load(group, system_prompt_bytes=model.identity.system_prompt_bytes)
            for group in to_run.groups
        ],
    )
    say(_loaded(engine.info))
    reader = InputReader()
    try:
        with watch(stop) as display:
            return execute(
                store=store,
                engine=engine,
                config=config,
                read_image=reader.read,
                observer=display,
                stop=stop,
            )
    except RunFolderError as error:
        # Before the first batch this is the user's to put right; now there is a run to go on with.
        raise RunStoppedError(str(error)) from error
    finally:
        reader.close()


def _until_stopped(jobs: Iterator[Job], stop: StopSignals) -> Iterator[Job]:
    for job in jobs:
        if stop.is_set():
            raise StoppedError
        yield job


def _say_changes(changes: Changes) -> None:
    for count, what in (
        (changes.changed, "with a changed definition, run again"),
        (changes.restored, "done before, without its files now; run again"),
        (changes.returned, "with a former definition whose files are still there; not run again"),
        (changes.removed, "no longer in the manifest; files are kept"),
        (changes.unread, "not read because of --limit; left as they are"),
    ):
        if count:
            say(f"{counted(count, 'job')} {what}")
