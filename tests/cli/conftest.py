"""The command line with an engine that runs everything but numerics."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sensebatch.checkpoint.files import Checkpoint
from sensebatch.cli import session
from sensebatch.cli.main import main
from sensebatch.config import ModelConfig, RunConfig
from sensebatch.contract import Engine
from sensebatch.errors import CheckpointError
from sensebatch.jobs import ModelIdentity, Task
from sensebatch.plan.footprint import Load
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


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed on stdout; nothing but one object."""
        return json.loads(self.out)


Invoke = Callable[..., Ended]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    """What every command of the test computes with."""
    fake = FakeBackend()
    monkeypatch.setattr(session, "TorchBackend", fake)
    return fake


@pytest.fixture
def invoke(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Invoke:
    """Runs a command line in an empty folder, without a terminal or anything measured before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SENSEBATCH_CACHE", str(tmp_path / "cache"))

    def run(*args: str | Path) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        code = ended.value.code
        return Ended(code=code if isinstance(code, int) else 0, out=out, err=err)

    return run


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Five small jobs of all tasks; two of them share a batch."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "in.png")
    path = tmp_path / "small.yaml"
    path.write_text(
        """
version: 1
name: small
defaults: {width: 64, height: 32, num_steps: 2}
jobs:
  - {id: a, prompt: a dot}
  - {id: b, prompt: a line}
  - {id: c, prompt: a plan, think: true}
  - {id: d, task: edit, prompt: make it blue, image: in.png}
  - {id: e, task: interleave, prompt: a story, max_images: 2}
""",
        encoding="utf-8",
    )
    return path
