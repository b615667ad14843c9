"""The command line with an engine that runs everything but numerics."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sensebatch import loading
from sensebatch.cli.main import main
from tests.backends import FakeBackend


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
    monkeypatch.setattr(loading, "TorchBackend", fake)
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
