"""A session with workers in processes of their own, which stand in threads here."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sensebatch
from sensebatch import loading, session
from sensebatch.cli.options import ModelOptions, WorkerOptions
from sensebatch.config import RunConfig, WorkersConfig
from sensebatch.contract import Engine, HostShare
from sensebatch.errors import CheckpointError, ConfigError
from sensebatch.executor.backends import BACKENDS
from sensebatch.executor.ray_actor import Recipe
from sensebatch.jobs import ModelIdentity, group_key
from sensebatch.loading import WorkerEngine, open_model
from sensebatch.plan.patience import MeasuredGpu
from sensebatch.plan.work import Speeds
from sensebatch.session import Request, RunObserver, run_session
from tests.backends import FakeBackend
from tests.executor.crews import ThreadCrew
from tests.executor.fakes import FakeEngine, make_config, make_job

JOBS = [make_job(f"j{i}", seed=i) for i in range(5)]


class Notes(RunObserver):
    """Remembers the notes."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def note(self, text: str) -> None:
        self.seen.append(text)


def request(root: Path, workers: WorkersConfig) -> Request:
    return Request(
        root=root, config=make_config(), sources=(), jobs=lambda: iter(JOBS), workers=workers
    )


def backed_by_threads(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Starts workers in threads; returns the recipes that they were made by."""
    recipes: list[Recipe] = []

    def crew(workers: WorkersConfig, recipe: Recipe, uses_gpu: bool) -> ThreadCrew:
        recipes.append(recipe)
        assert not uses_gpu
        assert workers.count is not None

        def make_engine(_worker: int, _crew: ThreadCrew) -> Engine:
            return recipe.open_engine(None, None)

        return ThreadCrew(workers.count, make_config(), JOBS, make_engine)

    monkeypatch.setitem(BACKENDS, "threads", crew)
    return recipes


def test_a_session_starts_workers_by_the_backend_s_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, seen = backed_by_threads(monkeypatch), Notes()
    workers = WorkersConfig(backend="threads", count=2)
    summary = run_session(request(tmp_path, workers), FakeBackend(), observer=seen)
    assert summary.done == 5
    assert seen.seen == [f"2 workers on {socket.gethostname()}: cpu"]
    assert [group.task for group in recipes[0].groups] == [JOBS[0].task]


def test_workers_without_a_gpu_have_to_be_counted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--workers N computes on the CPU"):
        run_session(request(tmp_path, WorkersConfig()), FakeBackend())


@pytest.mark.parametrize("gpus", ["0,1", "all"])
def test_gpus_that_are_not_there_are_not_replaced_by_the_cpu(tmp_path: Path, gpus: str) -> None:
    workers = WorkerOptions(gpus=gpus, workers=2).config(ModelOptions(), "auto")
    with pytest.raises(ConfigError, match="--gpus: expected a GPU that torch can use, found none"):
        run_session(request(tmp_path, workers), FakeBackend())


def worker_engine(**changes: Any) -> tuple[WorkerEngine, FakeBackend]:
    config, backend = make_config(), FakeBackend()
    model = open_model(config.model, backend)
    values: dict[str, Any] = {"identity": model.identity, "gpu_budget_bytes": {}}
    opens = WorkerEngine(config=config, backend=backend, loads=(), **{**values, **changes})
    return opens, backend


def test_worker_with_another_checkpoint_is_refused() -> None:
    opens, _ = worker_engine()
    other: ModelIdentity = replace(opens.identity, checkpoint="0" * 64)
    expected = f"the same files on {socket.gethostname()} as .* found another checkpoint"
    with pytest.raises(CheckpointError, match=expected):
        replace(opens, identity=other)(None, None)


class SharingBackend(FakeBackend):
    """Takes how a host is shared, which the fake one never is."""

    def load_engine(self, *args: Any, share: HostShare | None = None, **options: Any) -> FakeEngine:
        assert share == HostShare(name="run", num_workers=2)
        return super().load_engine(*args, **options)


def test_worker_keeps_to_the_budget_of_its_gpu() -> None:
    opens, _ = worker_engine(gpu_budget_bytes={"1": 7})
    backend = SharingBackend()
    opens = replace(opens, backend=backend)
    share = HostShare(name="run", num_workers=2)
    for gpu in ("1", "0"):
        opens(gpu, share)
    loaded: list[RunConfig] = backend.loaded
    assert [config.memory.vram_budget_bytes for config in loaded] == [7, None]


def test_python_programs_have_workers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = backed_by_threads(monkeypatch)
    workers = sensebatch.WorkersConfig(
        backend="threads", count=2, environment={"OMP_NUM_THREADS": "1"}
    )
    monkeypatch.setattr(loading, "TorchBackend", FakeBackend)
    assert sensebatch.run(JOBS, tmp_path, config=make_config(), workers=workers).done == 5
    assert recipes[0].environment == {"OMP_NUM_THREADS": "1"}


def test_workers_share_no_engine_that_is_loaded_already(tmp_path: Path) -> None:
    engine = session.WarmEngine(make_config(), FakeBackend())
    with pytest.raises(ConfigError, match="workers: expected no engine beside them"):
        sensebatch.run(JOBS, tmp_path, engine=engine, workers=WorkersConfig(count=2))


def test_a_gpu_that_was_measured_says_how_long_its_workers_may_be_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backed_by_threads(monkeypatch)
    planned = []

    def execute_crew(**given: Any) -> Any:
        planned.append(given["roster"].planned)
        store = given["store"]
        return session._nothing_to_run(store, given["config"], store.state.counts())

    monkeypatch.setattr(session, "execute_crew", execute_crew)
    speeds = Speeds(
        copy_bytes_per_s=1e9,
        gemm_flop_per_s=1e12,
        attention_flop_per_s=1e12,
        memory_bytes_per_s=1e11,
    )
    asked = request(tmp_path, WorkersConfig(backend="threads", count=1))
    for measured in (None, MeasuredGpu(name="NVIDIA T4", speeds=speeds)):
        run_session(replace(asked, measured=measured), FakeBackend())
    without, of_gpu = planned
    assert without is None
    group = group_key(JOBS[0])
    assert of_gpu.of("NVIDIA T4", group, 5) > 3 * of_gpu.of("NVIDIA T4", group, 1) > 0
