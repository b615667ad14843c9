"""What `sensebatch status` prints about a run, whether it is still running or not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sensebatch.cli.eta import pace
from sensebatch.errors import DeviceError, JobError
from sensebatch.jobs import GroupKey, group_key
from sensebatch.store.run_dir import RunDir
from sensebatch.store.state import Counts
from sensebatch.store.status import PastBatch, RunStatus
from sensebatch.tasks import Task
from tests.backends import FakeBackend
from tests.cli.conftest import Invoke
from tests.executor.fakes import make_job

ROOT = Path(__file__).parents[2]
START = datetime(2026, 1, 1, tzinfo=UTC)
T2I, EDIT = group_key(make_job("a")), group_key(make_job("b", Task.EDIT))


def _batch(group: GroupKey, *, jobs: int, start: float, end: float, kept: int = 0) -> PastBatch:
    return PastBatch(
        group=group,
        jobs=jobs,
        images=jobs,
        kept_images=kept,
        started_at=START + timedelta(seconds=start),
        finished_at=START + timedelta(seconds=end),
        total_s=end - start,
    )


def _status(to_come: dict[GroupKey, int], *recent: PastBatch) -> RunStatus:
    counts = Counts(jobs=9, pending=9, started=0, done=0, failed=0, removed=0, unread=0)
    return RunStatus(
        counts=counts, kept_images=0, running=True, failures=(), to_come=to_come, recent=recent
    )


def test_time_that_is_left_is_divided_among_the_workers() -> None:
    alone = [_batch(T2I, jobs=2, start=0, end=4), _batch(T2I, jobs=2, start=4, end=8)]
    shared = [replace(alone[0], worker=number, node="host") for number in range(2)]
    assert pace(_status({T2I: 8}, *alone))[1] == 16.0
    assert pace(_status({T2I: 8}, *shared))[1] == 8.0


def test_functions_beside_the_workers_are_not_workers() -> None:
    group = group_key(make_job("a"))
    drawn = _batch(group, jobs=2, start=0, end=4)
    other = replace(drawn, worker=1, node="n")
    judged = replace(drawn, group=replace(group, by_function=True), node=None)
    both = (replace(drawn, node="n"), other)
    assert pace(_status({group: 4}, *both, judged))[1] == pace(_status({group: 4}, *both))[1]


def test_pace_is_that_of_the_last_batches_by_wall_time() -> None:
    first = _batch(T2I, jobs=2, start=0, end=4)
    second = _batch(T2I, jobs=2, start=6, end=10)
    # 8 s in the engine and 2 s between; 2.5 s an image.
    per_image, left = pace(_status({T2I: 6}, first, second))
    assert (per_image, left) == pytest.approx((2.5, 15))


def test_images_kept_by_an_interrupted_batch_are_not_fast() -> None:
    resumed = _batch(T2I, jobs=4, start=0, end=1, kept=3)
    whole = _batch(T2I, jobs=2, start=1, end=3)
    per_image, left = pace(_status({T2I: 2}, resumed, whole))
    assert (per_image, left) == pytest.approx((1, 2))


def test_nothing_is_promised_before_anything_was_measured() -> None:
    assert pace(_status({T2I: 6})) == (None, None)
    assert pace(_status({}, _batch(EDIT, jobs=1, start=0, end=1)))[1] == 0


def _failing(manifest: Path, ids: Sequence[str]) -> None:
    jobs = "".join(f"  - {{id: {name}, prompt: this fails}}\n" for name in ids)
    manifest.write_text(manifest.read_text() + jobs)


@pytest.mark.usefixtures("backend")
def test_failed_jobs_are_named_with_their_reasons(invoke: Invoke, manifest: Path) -> None:
    _failing(manifest, ["bad"])
    invoke("run", manifest)
    out = invoke("status", "outputs/small").out
    assert "5 of 6 jobs done, 1 failed, 0 to do, 0 interrupted, not running" in out
    assert "\n  bad: ValueError: NaN in the output (errors/bad-1.txt)\n" in out
    (failure,) = invoke("status", "outputs/small", "--json").json["failures"]
    assert (failure["job_id"], failure["error_type"], failure["attempts"]) == (
        "bad",
        "ValueError",
        1,
    )


@pytest.mark.usefixtures("backend")
def test_lines_of_failed_jobs_and_of_a_dry_run_fit_80_columns(
    invoke: Invoke, manifest: Path
) -> None:
    names = [f"{number}-the-name-of-a-job" for number in range(8)]
    _failing(manifest, [*names, "x" * 60])
    plans = invoke("run", manifest, "--dry-run").out
    invoke("run", manifest)
    out = invoke("status", "outputs/small").out
    assert max(map(len, [*out.split("\n"), *plans.split("\n")])) <= 80
    assert f"\n    (errors/{'x' * 60}-1.txt)\n" in out
    assert all(name in out for name in names)
    assert names[0] in plans


@pytest.mark.usefixtures("backend")
def test_failed_job_without_a_file_of_its_error_names_none(
    invoke: Invoke, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error_name(*_: object) -> str:
        raise JobError("no file can have this name")

    _failing(manifest, ["bad"])
    monkeypatch.setattr(RunDir, "error_name", error_name)
    assert "failed: bad: ValueError: NaN in the output\n" in invoke("run", manifest).err
    out = invoke("status", "outputs/small").out
    assert "\n  bad: ValueError: NaN in the output\n" in out
    (failure,) = invoke("status", "outputs/small", "--json").json["failures"]
    assert failure["error_file"] is None


@pytest.mark.usefixtures("backend")
def test_many_failed_jobs_do_not_fill_the_screen(invoke: Invoke, manifest: Path) -> None:
    _failing(manifest, [f"bad{i}" for i in range(23)])
    invoke("run", manifest)
    lines = invoke("status", "outputs/small").out.splitlines()
    assert lines[-1] == "  ... and 3 more; --json lists all"
    assert len([line for line in lines if line.startswith("  bad")]) == 20
    assert len(invoke("status", "outputs/small", "--json").json["failures"]) == 23


@pytest.mark.usefixtures("backend")
def test_job_that_is_tried_again_is_no_longer_a_failure(invoke: Invoke, manifest: Path) -> None:
    _failing(manifest, ["bad"])
    invoke("run", manifest)
    manifest.write_text(manifest.read_text().replace("this fails", "this works"))
    invoke("run", manifest)
    out = invoke("status", "outputs/small").out
    assert "6 of 6 jobs done, 0 failed" in out
    assert "retry-failed" not in out


@pytest.mark.slow
def test_status_works_during_the_run(invoke: Invoke, manifest: Path, backend: FakeBackend) -> None:
    seen: list[dict[str, object]] = []

    def look() -> None:
        command = [sys.executable, "-m", "sensebatch", "status", "outputs/small", "--json"]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        seen.append(json.loads(ended.stdout))

    backend.engine.on_step = look
    assert invoke("run", manifest).code == 0
    assert all(found["running"] for found in seen)
    assert seen[0]["seconds_left"] is None
    assert seen[-1]["seconds_per_image"] is not None
    assert seen[-1]["seconds_left"] is not None
    assert seen[0]["done"] == 0


def test_time_left_of_a_stopped_run_is_that_once_it_is_resumed(
    invoke: Invoke, manifest: Path, backend: FakeBackend
) -> None:
    def fail_after_the_first_batch() -> None:
        if len(backend.engine.batches) > 1:
            raise DeviceError("it failed")

    backend.engine.on_step = fail_after_the_first_batch
    assert invoke("run", manifest).code == 75
    out = invoke("status", "outputs/small").out
    assert re.search(r"\n  speed  \d+\.\d\d s an image\n", out)
    assert re.search(r"\n  left   about .* once the run is resumed\n", out)


@pytest.mark.usefixtures("backend")
def test_truncated_texts_are_counted(invoke: Invoke, manifest: Path) -> None:
    manifest.write_text(manifest.read_text().replace("a line", "a line that is cut"))
    ended = invoke("run", manifest)
    assert "1 text truncated (1 token_limit); --fail-truncated fails such jobs" in ended.err
    assert "sensebatch jobs outputs/small --finish-reason token_limit lists them\n" in ended.err
    assert "  texts  1 text truncated (1 token_limit)\n" in invoke("status", "outputs/small").out
    assert invoke("status", "outputs/small", "--json").json["truncated"] == {"token_limit": 1}
    assert "finish reasons  complete=4  token_limit=1" in invoke("report", "outputs/small").out
    ended = invoke("run", manifest, "--output-dir", "strict", "--fail-truncated")
    assert ended.code == 1
    assert "TruncatedError" in ended.err
    assert "truncated (" not in ended.err
