"""A backend whose engine runs everything but numerics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sensebatch.checkpoint.files import Checkpoint
from sensebatch.config import ModelConfig, RunConfig
from sensebatch.contract import Engine
from sensebatch.errors import CheckpointError
from sensebatch.jobs import ModelIdentity, Task
from sensebatch.plan.load import Load
from tests.executor.fakes import FakeEngine


@dataclass
class FakeBackend:
    """Loads a fake engine; remembers whether and how."""

    engine: FakeEngine = field(default_factory=FakeEngine)
    loaded: list[RunConfig] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)

    def __call__(self) -> FakeBackend:
        return self

    def resolve_runtime(self, model: ModelConfig) -> tuple[str, str]:
        return "cpu", "float32" if model.dtype == "auto" else model.dtype

    def check_lora(self, file: Path, checkpoint: Checkpoint) -> None:
        assert checkpoint.tensors
        if file.read_bytes() != b"lora":
            raise CheckpointError(f"{file}: expected a LoRA")

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
        assert checkpoint.tensors
        assert identity.dtype == "float32"
        assert set(system_prompt_source) == set(Task)
        assert device == "cpu"
        self.loads = list(loads)
        self.loaded.append(config)
        return self.engine
