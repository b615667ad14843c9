"""The session as a library call: nothing printed, nothing handled, everything reported."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from sensebatch.checkpoint.files import TINY_FOLDER
from sensebatch.errors import StoppedError
from sensebatch.jobs import Batch, EngineInfo, Job
from sensebatch.loading import Model, NeverStop, TorchBackend, open_model
from sensebatch.plan.attention import AttentionSpeeds
from sensebatch.plan.batches import Plan
from sensebatch.session import Request, RunObserver, run_session
from sensebatch.store.attempts import Attempt
from sensebatch.store.ingest import Changes
from sensebatch.store.state import Counts
from tests.backends import FakeBackend
from tests.executor.fakes import make_config, make_job


class Events(RunObserver):
    """Remembers what happened, in its order."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.threads: set[int] = set()

    def _saw(self, what: str) -> None:
        self.seen.append(what)
        self.threads.add(threading.get_ident())

    def warning(self, text: str) -> None:
        self._saw(f"warning {text}")

    def jobs_read(self, root: Path, changes: Changes) -> None:
        self._saw(f"{changes.added} added in {root.name}")

    def loading(self, counts: Counts, model: Model) -> None:
        self._saw(f"loading {model.name} for {counts.remaining}")

    def loaded(self, info: EngineInfo) -> None:
        self._saw(f"loaded {info.model}")

    def run_started(self, counts: Counts, plan: Plan) -> None:
        self._saw(f"{plan.num_batches} batches, {counts.pending} pending")

    def batch_started(self, batch: Batch) -> None:
        self._saw(f"batch of {len(batch.jobs)}")

    def batch_finished(self, batch: Batch, attempts: Sequence[Attempt]) -> None:
        self._saw(f"{len(attempts)} of {len(batch.jobs)} finished")


def _request(root: Path, jobs: Sequence[Job]) -> Request:
    return Request(root=root, config=make_config(), sources=("here",), jobs=lambda: iter(jobs))


JOBS = [make_job("a"), make_job("b")]


def test_run_reports_its_course_to_the_observer(tmp_path: Path) -> None:
    events = Events()
    summary = run_session(_request(tmp_path / "out", JOBS), FakeBackend(), observer=events)
    assert (summary.done, summary.counts.remaining) == (2, 0)
    assert events.seen == [
        "2 added in out",
        "loading tiny for 2",
        "loaded tiny",
        "1 batches, 2 pending",
        "batch of 2",
        "2 of 2 finished",
    ]


@pytest.mark.parametrize(
    ("model", "device", "warns"),
    [("copy", "auto", True), ("copy", "cpu", False), ("tiny", "auto", False)],
)
def test_cpu_that_nobody_asked_for_is_warned_of_unless_the_model_is_tiny(
    tmp_path: Path, model: str, device: str, warns: bool
) -> None:
    if model == "copy":
        model = str(shutil.copytree(TINY_FOLDER, tmp_path / "copy"))
    config = make_config()
    config = replace(config, model=replace(config.model, model=model, device=device))
    request = replace(_request(tmp_path / "out", JOBS), config=config)
    for is_first in (True, False):
        events = Events()
        run_session(request, FakeBackend(), observer=events)
        said = "warning found no GPU that torch can use, so the CPU computes" in events.seen
        # A run with nothing left computes nothing.
        assert said is (warns and is_first)


def test_run_with_nothing_left_loads_nothing(tmp_path: Path) -> None:
    backend, events = FakeBackend(), Events()
    for _ in range(2):
        summary = run_session(_request(tmp_path / "out", JOBS), backend, observer=events)
    assert (summary.done, len(backend.loaded)) == (0, 1)
    assert events.seen[-1] == "0 added in out"


def test_run_in_another_thread_prints_nothing_and_leaves_signals_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    events = Events()
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(
            run_session, _request(tmp_path / "out", JOBS), FakeBackend(), observer=events
        )
        assert call.result().done == 2
    assert capfd.readouterr() == ("", "")
    assert signal.getsignal(signal.SIGINT) is before
    assert len(events.threads) == 1
    assert threading.get_ident() not in events.threads


def test_stop_that_comes_while_jobs_are_read_changes_nothing(tmp_path: Path) -> None:
    stop = threading.Event()

    def jobs() -> Iterator[Job]:
        yield JOBS[0]
        stop.set()
        yield JOBS[1]

    request = Request(root=tmp_path / "out", config=make_config(), sources=(), jobs=jobs)
    with pytest.raises(StoppedError):
        run_session(request, FakeBackend(), stop=stop)
    assert not (tmp_path / "out").exists()


def test_stop_ends_a_run_after_the_current_batch(tmp_path: Path) -> None:
    stop, backend = threading.Event(), FakeBackend()
    backend.engine.on_step = stop.set
    jobs = [*JOBS, make_job("c")]
    summary = run_session(_request(tmp_path / "out", jobs), backend, stop=stop)
    assert (summary.stopped, summary.done, summary.counts.remaining) == (True, 2, 1)


@pytest.mark.parametrize(
    ("asked", "device", "expected"),
    [("auto", "cuda", "flash"), ("sdpa", "cuda", "sdpa"), ("auto", "cpu", "auto")],
)
def test_measured_attention_takes_the_place_of_auto_alone(
    monkeypatch: pytest.MonkeyPatch, asked: str, device: str, expected: str
) -> None:
    load_engine = Mock()
    monkeypatch.setattr("sensebatch.engine.engine.load_engine", load_engine)
    monkeypatch.setattr("sensebatch.engine.device.runtime.fastest_attention", lambda *_: "flash")
    speeds = AttentionSpeeds(gpu="NVIDIA Test", torch="2.11", flop_per_s={})
    config = make_config()
    config = replace(config, model=replace(config.model, attn_backend=asked))
    model = replace(open_model(config.model, FakeBackend()), device=device)
    TorchBackend(speeds).load_engine(config, model, loads=[], stop=NeverStop())
    assert load_engine.call_args.args[0].model.attn_backend == expected
