"""A run of which only functions have anything left to do: no weights until an image is needed."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sensebatch.config import ExecutionConfig, WorkersConfig
from sensebatch.errors import StoppedError
from sensebatch.executor.backends import BACKENDS
from sensebatch.executor.observer import Summary
from sensebatch.functions import AcceptFunction, Judge
from sensebatch.jobs import EngineInfo, Job
from sensebatch.loading import Model
from sensebatch.manifest.read import read_rows
from sensebatch.plan.batches import Plan
from sensebatch.session import Request, RunObserver, run_session
from sensebatch.store.acceptance import Verdict
from sensebatch.store.state import Counts
from sensebatch.store.store import open_store
from tests.backends import FakeBackend
from tests.executor.fakes import make_config

CONFIG = replace(
    make_config(max_batch_size=3, execution=ExecutionConfig(max_attempts=1)),
    accept=(AcceptFunction(function="m:own", at_least=0.5),),
)
ROWS = [
    {"id": name, "prompt": name, "width": 64, "height": 32, "num_steps": 2, "keep": 2, "tries": 4}
    for name in ("cat", "dog")
]


class Events(RunObserver):
    """Remembers what was begun, in its order."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def judging(self, counts: Counts) -> None:
        self.seen.append(f"judging {counts.remaining}")

    def loading(self, counts: Counts, model: Model) -> None:  # noqa: ARG002
        self.seen.append(f"loading for {counts.remaining}")

    def loaded(self, info: EngineInfo) -> None:
        self.seen.append(f"loaded in {info.load_s} s")

    def run_started(self, counts: Counts, plan: Plan) -> None:
        self.seen.append(f"{plan.num_jobs} of {counts.remaining} planned")


def jobs(version: str) -> list[Job]:
    """Returns tries that a version of a function judges."""
    found = read_rows(ROWS, CONFIG, path=Path("rows"))
    return [
        replace(job, judged_by=replace(job.judged_by, source_sha256=version))
        if job.judged_by
        else job
        for job in found
    ]


def accepts_all(*_: Any) -> bool:
    return True


def refuses_first(_: Any, row: Mapping[str, Any]) -> bool:
    return row["seed"] != 42


def run(
    monkeypatch: pytest.MonkeyPatch,
    root: Path,
    own: Judge,
    version: str,
    *,
    backend: FakeBackend | None = None,
    stop: threading.Event | None = None,
    **changes: Any,
) -> tuple[Summary, list[str]]:
    """Runs with a version of the function; returns what it came to, and what was begun."""
    monkeypatch.setattr("sensebatch.session.load_functions", lambda _: {"m:own": own})
    request = Request(root=root, config=CONFIG, sources=(), jobs=lambda: iter(jobs(version)))
    events = Events()
    summary = run_session(
        replace(request, **changes), backend or FakeBackend(), observer=events, stop=stop
    )
    return summary, events.seen


def verdicts(root: Path) -> dict[str, Verdict]:
    with open_store(root) as store:
        return store.state.verdicts()


def judged_rows(root: Path, session: int) -> list[dict[str, Any]]:
    rows = pq.read_table(root / "log.parquet").to_pylist()
    return [row for row in rows if row["session"] == session and row["function"]]


@pytest.mark.parametrize("workers", [None, WorkersConfig(backend="none", count=2)])
def test_verdicts_alone_need_neither_weights_nor_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: WorkersConfig | None
) -> None:
    run(monkeypatch, tmp_path, accepts_all, "first")
    monkeypatch.setitem(BACKENDS, "none", lambda *_: pytest.fail("workers were made"))
    backend = FakeBackend()
    summary, seen = run(
        monkeypatch, tmp_path, accepts_all, "second", backend=backend, workers=workers
    )
    assert seen == ["judging 4", "4 of 4 planned"]
    assert backend.loaded == []
    assert (summary.done, summary.failed, summary.images, summary.counts.remaining) == (4, 0, 0, 0)
    for row in judged_rows(tmp_path, 2):
        assert (row["vram_mode"], row["attn_backend"], row["device"]) == ("", "", "")
        assert (row["load_s"], row["dtype"], row["model"]) == (0.0, "float32", "tiny")
    assert len(judged_rows(tmp_path, 2)) == 4


def test_weights_are_loaded_once_a_verdict_asks_for_another_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, tmp_path / "whole", refuses_first, "second")
    run(monkeypatch, tmp_path / "run", accepts_all, "first")
    backend = FakeBackend()
    summary, seen = run(monkeypatch, tmp_path / "run", refuses_first, "second", backend=backend)
    assert seen == [
        "judging 4",
        "4 of 4 planned",
        "loading for 4",
        "loaded in 1.5 s",
        "4 of 4 planned",
    ]
    assert len(backend.loads) == 1
    assert (summary.done, summary.images, summary.counts.remaining) == (8, 2, 0)
    assert verdicts(tmp_path / "run") == verdicts(tmp_path / "whole")
    for path in (tmp_path / "whole/images").iterdir():
        assert path.read_bytes() == (tmp_path / "run/images" / path.name).read_bytes()


def test_failures_of_both_halves_count_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_on_first(_: Any, row: Mapping[str, Any]) -> bool:
        if row["seed"] in (42, 44):
            raise ValueError("no edges")
        return True

    run(monkeypatch, tmp_path, accepts_all, "first")
    execution = replace(CONFIG.execution, max_failures=3, retry_failed=True)
    config = replace(CONFIG, execution=execution)
    summary, seen = run(monkeypatch, tmp_path, fails_on_first, "second", config=config)
    assert seen[0] == "judging 4"
    assert (summary.failed, summary.too_many_failures) == (4, True)
    config = replace(CONFIG, execution=replace(execution, max_failures=2))
    summary, seen = run(monkeypatch, tmp_path, fails_on_first, "third", config=config)
    assert summary.too_many_failures
    assert not any("loading" in one for one in seen)


def test_stop_while_weights_are_loaded_leaves_the_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(FakeBackend):
        def load_engine(self, *_: Any, **__: Any) -> Any:
            raise StoppedError("the run was stopped while the weights were loaded")

    run(monkeypatch, tmp_path, accepts_all, "first")
    summary, _ = run(monkeypatch, tmp_path, refuses_first, "second", backend=Stopped())
    assert (summary.stopped, summary.done, summary.counts.remaining) == (True, 4, 4)
