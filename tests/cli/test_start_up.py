"""A command imports what it needs and nothing else: imports are most of a short run's time."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sensebatch.config import default_config
from sensebatch.executor.ray_actor import Recipe
from sensebatch.loading import TorchBackend, WorkerEngine, open_model
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
WORK = """
import pickle, sys
from sensebatch.executor.host import Outbox, WorkerHost
from sensebatch.executor.ray_actor import RayWorker

recipe = pickle.loads(bytes.fromhex(sys.argv[1]))
engine = recipe.open_engine(None, None)
WorkerHost(engine, number=0, device="cpu", output=recipe.output, outbox=Outbox()).close()
print(*(name for name in {unwanted!r} if name in sys.modules), "loaded")
"""
COMPILER = ("torch._dynamo", "torch._inductor", "sympy", "triton", "torch.distributed.fsdp")
"""What of torch is for models that are compiled."""
OF_RUN = (
    *("sensebatch.session", "sensebatch.store.state", "sensebatch.executor.run"),
    *("sensebatch.manifest", "sensebatch.report", "sensebatch.dataset", "sensebatch.settings"),
    *("pyarrow", "pandas", "sqlite3", "rich", "typer", "ray"),
)
"""What reads manifests, keeps the run's folder and talks to people; Ray imports itself."""


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


def test_a_worker_imports_neither_the_compiler_nor_what_only_the_run_needs() -> None:
    config = default_config()
    config = replace(config, model=replace(config.model, device="cpu"))
    backend = TorchBackend()
    opens = WorkerEngine(
        config=config,
        backend=backend,
        identity=open_model(config.model, backend).identity,
        loads=(),
        gpu_budget_bytes={},
    )
    recipe = Recipe(
        open_engine=opens, output=config.output, groups=(), environment={}, version="", share=""
    )
    code = WORK.format(unwanted=(*COMPILER, *OF_RUN))
    assert run_fresh(code, pickle.dumps(recipe).hex()) == ["loaded"]
