"""Opens a checkpoint and loads an engine for it, in the process of a run or of one of its workers.

Knows no folder of a run and no manifest, so that a worker imports nothing that reads or writes
them. torch is imported late.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from sensebatch.checkpoint.card import model_license
from sensebatch.checkpoint.files import Checkpoint, check_tensors, open_checkpoint
from sensebatch.checkpoint.fingerprint import model_identity
from sensebatch.checkpoint.system_prompts import resolve_system_prompts
from sensebatch.config import ModelConfig, RunConfig
from sensebatch.contract import Engine, HostShare, Stop
from sensebatch.errors import CheckpointError
from sensebatch.jobs import EngineInfo, ModelIdentity
from sensebatch.plan.attention import AttentionSpeeds
from sensebatch.plan.load import Load
from sensebatch.tasks import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A checkpoint and everything about it that job keys depend on, without its weights."""

    name: str
    """As the user named it."""
    checkpoint: Checkpoint
    identity: ModelIdentity
    prompt_source: Mapping[Task, str]
    device: str


class Backend(Protocol):
    """Computes: torch, an engine that is already loaded, or a stand-in."""

    def resolve_runtime(self, model: ModelConfig) -> tuple[str, str]:
        """Returns the names of device and dtype."""

    def load_engine(
        self,
        config: RunConfig,
        model: Model,
        *,
        loads: Sequence[Load],
        stop: Stop,
        share: HostShare | None = None,
    ) -> ReusableEngine:
        """Returns the engine, loaded, with its memory planned for these loads.

        Args:
            config: The run's settings.
            model: What is loaded.
            loads: One for each group of the run.
            stop: Whether to stop loading.
            share: How the host is shared with the run's other workers on it; None without any.

        Raises:
            StoppedError: The stop was set before the engine was loaded.
        """


@dataclass(frozen=True, slots=True)
class TorchBackend:
    """Computes with torch, which is imported on first use."""

    attention_speeds: AttentionSpeeds | None = None
    """What attention backends were measured to reach on a GPU."""

    def resolve_runtime(self, model: ModelConfig) -> tuple[str, str]:
        """Returns the names of device and dtype."""
        from sensebatch.engine.device.choice import resolve_runtime

        return resolve_runtime(model)

    def load_engine(
        self,
        config: RunConfig,
        model: Model,
        *,
        loads: Sequence[Load],
        stop: Stop,
        share: HostShare | None = None,
    ) -> ReusableEngine:
        """Returns the engine, loaded, with its memory planned for these loads."""
        from sensebatch.engine.engine import load_engine

        if self.attention_speeds is not None and model.device == "cuda":
            config = self._with_attention(self.attention_speeds, config, model, loads)
        return load_engine(
            config,
            checkpoint=model.checkpoint,
            identity=model.identity,
            system_prompt_source=model.prompt_source,
            device=model.device,
            loads=loads,
            stop=stop.is_set,
            share=share,
        )

    @staticmethod
    def _with_attention(
        speeds: AttentionSpeeds, config: RunConfig, model: Model, loads: Sequence[Load]
    ) -> RunConfig:
        """Returns the settings with the fastest attention backend in place of `auto`."""
        from sensebatch.engine.device.runtime import fastest_attention

        if config.model.attn_backend != "auto":
            return config
        backend = fastest_attention(speeds, loads, model.identity.dtype)
        return replace(config, model=replace(config.model, attn_backend=backend))


class ReusableEngine(Engine, Protocol):
    """An engine that can serve run after run."""

    def replan(
        self,
        config: RunConfig,
        *,
        loads: Sequence[Load],
        stop: Callable[[], bool],
    ) -> None:
        """Plans memory again for another run of the same model, and reloads weights if it must."""

    def close(self) -> None:
        """Frees the weights; the engine can no longer be used."""


class NeverStop:
    """A stop that is never set."""

    def is_set(self) -> bool:
        """Returns False."""
        return False


def open_model(
    config: ModelConfig, backend: Backend, warn: Callable[[str], None] = lambda _: None
) -> Model:
    """Opens a checkpoint and works out its identity; loads no weights.

    Args:
        config: Says which one.
        backend: Will compute with it.
        warn: Takes what is allowed but deserves a look.

    Raises:
        CheckpointError: The checkpoint, LoRA or prompt file cannot be used.
        ConfigError: The device cannot be used.
    """
    checkpoint = open_checkpoint(config.model, config.revision)
    check_tensors(checkpoint)
    prompts = resolve_system_prompts(checkpoint, config.system_prompt_file)
    if prompts.warn_built_in:
        warn(
            "the release's system prompts were not found beside the checkpoint, so the built-in "
            "ones are used, which it was not trained with; system_prompt_file names a file of them"
        )
    device, dtype = backend.resolve_runtime(config)
    identity = model_identity(checkpoint, prompts, config, dtype=dtype)
    return Model(
        name=config.model,
        checkpoint=checkpoint,
        identity=identity,
        prompt_source=prompts.sources,
        device=device,
    )


def unloaded_info(model: Model) -> EngineInfo:
    """Returns what the log says of the engine of a model whose weights are not loaded."""
    return EngineInfo(
        identity=model.identity,
        model=model.name,
        model_license=model_license(model.checkpoint.path),
        system_prompt_source=model.prompt_source,
        device="",
        dtype=model.identity.dtype,
        attn_backend="",
        compile_s=None,
        vram_mode=None,
        budget_bytes=None,
        torch_version="",
        load_s=0.0,
        load_peak_allocated_bytes=0,
        load_peak_reserved_bytes=0,
        load_peak_rss_bytes=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEngine:
    """Loads an engine in the process of a worker, on whatever machine; implements `OpenEngine`."""

    config: RunConfig
    """With device and dtype as they were resolved for the run."""
    backend: Backend
    identity: ModelIdentity
    """The run's: what the worker's own files must come to."""
    loads: tuple[Load, ...]
    gpu_budget_bytes: Mapping[str, int]

    def __call__(self, gpu: str | None, share: HostShare | None) -> Engine:
        """Returns the engine, loaded.

        Raises:
            CheckpointError: The checkpoint is missing here, or is another one than the run's.
            ConfigError: The device or its budget cannot be used.
        """
        model = open_model(self.config.model, self.backend)
        if model.identity != self.identity:
            found, expected = asdict(model.identity), asdict(self.identity)
            name = next(name for name, value in found.items() if value != expected[name])
            raise CheckpointError(
                f"{model.name}: expected the same files on {socket.gethostname()} as on the "
                f"machine of the run, found another {name.replace('_', ' ')}"
            )
        config = self.config
        budget = None if gpu is None else self.gpu_budget_bytes.get(gpu)
        if budget is not None:
            config = replace(config, memory=replace(config.memory, vram_budget_bytes=budget))
        return self.backend.load_engine(
            config, model, loads=self.loads, stop=NeverStop(), share=share
        )
