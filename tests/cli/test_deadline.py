"""`--until` and `--max-hours`, for a run and for a plan; no clock but the test's own."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from sensebatch import session
from sensebatch.cli import plan
from sensebatch.cli.options import DeadlineOptions
from sensebatch.errors import ConfigError
from sensebatch.executor.deadline import Deadline
from sensebatch.units import GIB
from tests.backends import FakeBackend
from tests.cli.conftest import Invoke
from tests.cli.test_plan import MODEL, SPEEDS
from tests.executor.test_deadline import BATCH_S, Clock

EVENING = datetime(2026, 11, 28, 22, 30)


@pytest.fixture
def clock(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """An evening on which every batch takes as long as the fake engine says."""
    clock = Clock()
    clock.now = EVENING.timestamp()
    monkeypatch.setattr(session, "clock", clock)
    monkeypatch.setattr(plan, "clock", clock)
    monkeypatch.setattr(Deadline, "wrote", lambda *_: None)
    backend.engine.on_step = clock.step
    return clock


@pytest.mark.usefixtures("clock")
def test_a_run_ends_before_its_deadline_says_how_far_it_came_and_resumes(
    invoke: Invoke, manifest: Path
) -> None:
    ended = invoke("run", manifest, "--max-hours", str(2.5 * BATCH_S / 3600))
    assert ended.code == 75
    # In the order of the first jobs: a and b, then c.
    assert "3 of 5 jobs done, 2 to do" in ended.err
    assert "stopped to end by 22:30 (2026-11-28); the next batch takes about" in ended.err
    assert "the same command resumes the run" in ended.err
    values = invoke("run", manifest, "--until", "07:00", "--json").json
    assert (values["exit_code"], values["deadline"], values["done"]) == (0, False, 5)


@pytest.mark.usefixtures("clock")
def test_json_says_that_a_deadline_ended_the_run(invoke: Invoke, manifest: Path) -> None:
    values = invoke("run", manifest, "--json", "--max-hours", str(1.5 * BATCH_S / 3600)).json
    assert (values["exit_code"], values["stopped"], values["deadline"]) == (75, True, True)
    assert values["remaining"] == 3


def test_a_run_whose_deadline_has_come_loads_nothing(
    invoke: Invoke,
    manifest: Path,
    backend: FakeBackend,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Reading the manifests took too long.
    times = iter([clock.now, clock.now + 7200])
    monkeypatch.setattr(session, "clock", lambda: next(times))
    ended = invoke("run", manifest, "--max-hours", "1")
    assert (ended.code, backend.loaded) == (75, [])
    assert "0 of 5 jobs done, 5 to do" in ended.err
    assert "stopped to end by 23:30 (2026-11-28); the same command" in ended.err


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("07:00", datetime(2026, 11, 29, 7)),
        ("22:31", datetime(2026, 11, 28, 22, 31)),
        ("22:30", datetime(2026, 11, 29, 22, 30)),
        ("2026-12-24T07:00", datetime(2026, 12, 24, 7)),
        ("2026-12-24 07:00", datetime(2026, 12, 24, 7)),
    ],
)
def test_a_time_of_day_is_the_next_of_its_kind(text: str, found: datetime) -> None:
    assert DeadlineOptions(until=text).at(EVENING.timestamp()) == found.timestamp()


def test_the_earlier_of_two_deadlines_counts() -> None:
    now = EVENING.timestamp()
    assert DeadlineOptions(until="07:00", max_hours=1).at(now) == now + 3600
    assert DeadlineOptions(until="22:45", max_hours=1).at(now) == now + 900
    assert DeadlineOptions().at(now) is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (DeadlineOptions(until="7"), "--until: expected a time such as 07:00 .* found '7'"),
        (DeadlineOptions(until="25:00"), "--until: expected a time such as"),
        (DeadlineOptions(until="2026-02-30T07:00"), "--until: expected a time such as"),
        (DeadlineOptions(until="0001-01-01T00:00"), "--until: expected a time such as"),
        (DeadlineOptions(until="2026-11-28T22:00"), "future time, .* it is 2026-11-28T22:30"),
        (
            DeadlineOptions(max_hours=0),
            "--max-hours: .* above 0 and below 87,600, found 0",
        ),
        (DeadlineOptions(max_hours=1e300), "below 87,600, found 1e\\+300"),
        (DeadlineOptions(max_hours=-1), "found -1"),
        (DeadlineOptions(max_hours=float("nan")), "found nan"),
        (DeadlineOptions(max_hours=float("inf")), "found inf"),
    ],
)
def test_what_is_no_deadline_is_a_clear_error(options: DeadlineOptions, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        options.at(EVENING.timestamp())


@pytest.mark.usefixtures("clock")
def test_a_plan_says_how_far_workers_come_at_the_speed_of_a_run(
    invoke: Invoke, manifest: Path
) -> None:
    invoke("run", manifest)
    plan = ("plan", manifest, "--device", "cpu", "--speed-of", "outputs/small")
    ended = invoke(*plan)
    assert "With 1 worker about 32 s." in ended.out
    ended = invoke(*plan, "--max-hours", str(20 / 3600), "--workers", "2")
    assert "With 2 workers about " in ended.out
    said = " ".join(ended.out.split())
    assert "of it because the last batches leave workers idle" in said
    assert "By 22:31 (2026-11-28) about " in ended.out or "all of 5 jobs" in ended.out
    values = invoke(*plan, "--json", "--max-hours", str(12 / 3600)).json["forecast"]
    assert (values["batches_in_time"], values["jobs_in_time"], values["next_job"]) == (1, 2, "c")
    assert (values["is_least"], values["workers"]) == (False, 1)


@pytest.mark.usefixtures("clock")
def test_a_plan_divides_the_least_time_of_a_measured_gpu(
    invoke: Invoke, manifest: Path, tmp_path: Path
) -> None:
    for asked, words in (
        (["--workers", "2"], "--workers"),
        (["--until", "07:00"], "--until"),
        (["--max-hours", "8", "--workers", "2"], "--max-hours and --workers"),
    ):
        said = " ".join(invoke("plan", manifest, *MODEL, *asked).out.split())
        assert f"No time is known for {words}: sensebatch doctor measures a GPU" in said
    speeds = tmp_path / "cache" / "speeds.json"
    speeds.parent.mkdir(exist_ok=True)
    speeds.write_text(json.dumps(SPEEDS), encoding="utf-8")
    manifest.write_text(
        "version: 1\njobs:\n  - {id: a, prompt: a dot, width: 2048, height: 2048, n: 12}\n",
        encoding="utf-8",
    )
    one, four = (
        invoke("plan", manifest, *MODEL, "--json", "--workers", count).json for count in "14"
    )
    (memory,) = one["memory"]
    assert one["forecast"]["seconds"] == pytest.approx(memory["seconds"]["images"])
    assert one["forecast"]["tail_s"] == 0
    # Three batches of four jobs: the fourth worker has nothing to do.
    assert four["forecast"]["seconds"] == pytest.approx(memory["seconds"]["images"] / 3)
    assert four["forecast"]["tail_s"] > 0
    assert four["forecast"]["is_least"]
    ended = invoke("plan", manifest, *MODEL, "--workers", "2", "--max-hours", str(60 / 3600))
    assert "With 2 workers at least" in ended.out
    assert (
        "By 22:31 (2026-11-28) at most 8 of 12 jobs, in 2 of 3 batches; a-seed=50 is"
        in " ".join(ended.out.split())
    )


@pytest.mark.usefixtures("clock")
def test_a_plan_leaves_out_what_does_not_fit_the_measured_gpu(
    invoke: Invoke, manifest: Path, tmp_path: Path
) -> None:
    speeds = tmp_path / "cache" / "speeds.json"
    speeds.parent.mkdir()
    speeds.write_text(json.dumps(SPEEDS | {"free_bytes": 3 * GIB}), encoding="utf-8")
    rows = [
        {"id": "large", "prompt": "a", "resolution": "8192x8192"},
        {"id": "long", "prompt": "a " * 90_000, "resolution": "2048x2048"},
        {"id": "fits", "prompt": "a", "resolution": "2048x2048", "n": 2},
    ]
    manifest = manifest.with_suffix(".jsonl")
    manifest.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    asked = ("plan", manifest, *MODEL, "--json", "--max-hours")
    plan = invoke(*asked, "8").json
    (memory,) = plan["memory"]
    assert [own["refused_jobs"] for own in memory["groups"]] == [1, 1]
    found = plan["forecast"]
    assert (found["jobs"], found["jobs_in_time"], found["next_job"]) == (2, 2, None)
    assert found["seconds"] == pytest.approx(memory["seconds"]["images"])
    found = invoke(*asked, "0.0001").json["forecast"]
    assert (found["jobs_in_time"], found["next_job"]) == (0, "fits-seed=42")


def test_a_plan_without_these_options_has_no_forecast(invoke: Invoke, manifest: Path) -> None:
    assert invoke("plan", manifest, "--json").json["forecast"] is None


def test_the_speed_of_no_run_is_a_clear_error(invoke: Invoke, manifest: Path) -> None:
    ended = invoke("plan", manifest, "--speed-of", "nowhere")
    assert (ended.code, "nowhere: expected a run's folder" in ended.err) == (2, True)
