"""A command imports what it needs and nothing else: imports are most of a short run's time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.backends import FakeBackend
from tests.cli.conftest import Invoke

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NOTHING_TO_DO = """
import sys
from sensebatch.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    print(ended.code)
print(*(name for name in ("torch", "transformers", "pyarrow") if name in sys.modules))
"""
LOAD = """
import sys
import torch
from sensebatch.checkpoint.files import open_checkpoint
from sensebatch.config import default_config
from sensebatch.engine.engine import load_engine
from sensebatch.jobs import ModelIdentity
from sensebatch.tasks import Task

load_engine(
    default_config(),
    checkpoint=open_checkpoint("tiny"),
    identity=ModelIdentity(
        checkpoint="", lora=None, dtype="float32", generation_prompt="", interleave_prompt=""
    ),
    system_prompt_source=dict.fromkeys(Task, "test"),
    device="cpu",
)
compiler = ("torch._dynamo", "torch._inductor", "sympy", "triton", "torch.distributed.fsdp")
print(*(name for name in compiler if name in sys.modules), "loaded")
"""


def run_fresh(code: str, *args: str) -> list[str]:
    """Returns the lines that a fresh process prints."""
    ended = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True
    )
    return ended.stdout.splitlines()


def test_signals_are_handled_before_anything_is_imported_that_takes_long() -> None:
    code = "import sys; import sensebatch.__main__; print(*sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    imported = set(ended.stdout.split())
    assert {"sensebatch", "signal"} <= imported
    assert imported.isdisjoint({"typing", "re", "pathlib", "dataclasses", "sensebatch.api"})


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_run_that_finds_nothing_to_do_does_not_import_torch(
    invoke: Invoke, manifest: Path, backend: FakeBackend, device: str
) -> None:
    if device == "auto" and torch.version.cuda is not None:
        pytest.skip("the fake engine computes on a CPU")
    args = ("run", str(manifest), "--device", device, "--output-dir", "here")
    assert invoke(*args).code == 0
    assert len(backend.loaded) == 1
    assert run_fresh(NOTHING_TO_DO, *args) == ["0", "pyarrow"]


def test_loading_a_checkpoint_does_not_import_the_compiler() -> None:
    assert run_fresh(LOAD) == ["loaded"]
