"""A backend whose engine runs everything but numerics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sensebatch.config import ModelConfig, RunConfig
from sensebatch.contract import HostShare, Stop
from sensebatch.loading import Model
from sensebatch.plan.load import Load
from sensebatch.tasks import Task
from tests.executor.fakes import FakeEngine


@dataclass
class FakeBackend:
    """Loads a fake engine; remembers whether and how."""

    engine: FakeEngine = field(default_factory=FakeEngine)
    loaded: list[RunConfig] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)

    def __call__(self, *_: object) -> FakeBackend:
        return self

    def resolve_runtime(self, model: ModelConfig) -> tuple[str, str]:
        return "cpu", "float32" if model.dtype == "auto" else model.dtype

    def load_engine(
        self,
        config: RunConfig,
        model: Model,
        *,
        loads: Sequence[Load],
        stop: Stop,
        share: HostShare | None = None,
    ) -> FakeEngine:
        assert model.checkpoint.tensors
        assert model.identity.dtype == "float32"
        assert set(model.prompt_source) == set(Task)
        assert model.device == "cpu"
        assert not stop.is_set()
        assert share is None
        self.engine.model, self.engine.identity = model.name, model.identity
        self.loads = list(loads)
        self.loaded.append(config)
        return self.engine
