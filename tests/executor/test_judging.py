"""Functions that judge images beside the drawing: in one process, and beside workers."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sensebatch.config import ExecutionConfig, RunConfig, default_config
from sensebatch.dataset.records import open_dataset
from sensebatch.dataset.selection import Selection
from sensebatch.errors import ManifestError
from sensebatch.executor.judging import Judging
from sensebatch.functions import AcceptFunction
from sensebatch.jobs import Job
from sensebatch.manifest.read import read_rows
from sensebatch.store.acceptance import Verdict
from sensebatch.store.store import open_store
from tests.executor.crews import ThreadCrew, run_crew
from tests.executor.fakes import FakeEngine, Flag, Ran, make_config, outcome, run_folder
from tests.export.folders import export_folder, parquet_rows

CONFIG = make_config(max_batch_size=3, execution=ExecutionConfig(max_attempts=1))
SCORES = {42: 0.2, 43: 0.9, 44: 1.0, 45: 0.7}


def by_seed(_: Any, row: Mapping[str, Any]) -> float:
    return SCORES[row["seed"]]


def tries(*functions: AcceptFunction, **changes: Any) -> list[Job]:
    """Returns the tries at two prompts, which functions judge."""
    config: RunConfig = replace(default_config(), accept=functions)
    rows = [
        {"id": name, "prompt": name, "width": 64, "height": 32, "num_steps": 2, "keep": 2}
        | {"tries": 4, "metadata": {"artist": "me"}}
        | changes
        for name in ("cat", "dog")
    ]
    return list(read_rows(rows, config, path=Path("rows")))


OWN = AcceptFunction(function="m:own", at_least=0.8)


def judged(root: Path) -> dict[str, Verdict]:
    with open_store(root) as store:
        return store.state.verdicts()


def run(root: Path, jobs: list[Job], **functions: Any) -> Ran:
    named = {f"m:{name}": function for name, function in functions.items()}
    return run_folder(root, jobs, CONFIG, functions=named)


def test_an_export_says_what_a_function_answered(tmp_path: Path) -> None:
    run(tmp_path / "run", tries(OWN), own=by_seed)
    export_folder(tmp_path / "run", tmp_path / "set", with_rejected=True)
    answered = [row for row in parquet_rows(tmp_path / "set") if "answer" in row]
    assert len(answered) == 2 * len(SCORES) - 2
    assert {row["function"] for row in answered} == {"m:own"}


def log_of(root: Path) -> dict[str, dict[str, Any]]:
    return {row["job_id"]: row for row in outcome(root)[1]}


def test_a_function_alone_makes_a_series_of_a_row() -> None:
    assert [job.id for job in tries(OWN)[:3]] == ["cat-seed=42", "cat-seed=42-m.own", "cat-seed=43"]
    with pytest.raises(ManifestError, match=r"row 0: keep: expected accept beside it, .* neither"):
        tries()


def test_scores_decide_and_are_in_the_log(tmp_path: Path) -> None:
    ran = run(tmp_path, tries(OWN), own=by_seed)
    rejected, accepted = Verdict.REJECTED, Verdict.ACCEPTED
    assert judged(tmp_path) == {
        f"{name}-seed={seed}": verdict
        for name in ("cat", "dog")
        for seed, verdict in ((42, rejected), (43, accepted), (44, accepted))
    }
    row = log_of(tmp_path)["cat-seed=42-m.own"]
    assert (row["task"], row["function"], row["answer"]) == ("ask", "m:own", "no")
    assert row["choice_probabilities"] == pytest.approx([0.2, 0.8])
    assert log_of(tmp_path)["cat-seed=44-m.own"]["choice_probabilities"][0] == 1.0
    drawn = log_of(tmp_path)["cat-seed=42"]
    assert (drawn["function"], drawn["worker"]) == (None, 0)
    # It ran beside the workers, whichever there are.
    assert (row["worker"], row["node"]) == (None, None)
    assert math.isfinite(log_of(tmp_path)["cat-seed=44-m.own"]["choice_log_probabilities"][1])
    # None of it went to the engine.
    assert not any("m.own" in job_id for batch in ran.engine.batches for job_id in batch)


def test_a_score_of_nothing_is_zero(tmp_path: Path) -> None:
    run(tmp_path, tries(OWN, keep=1), own=lambda _, row: row["seed"] != 42)
    row = log_of(tmp_path)["cat-seed=42-m.own"]
    assert row["choice_probabilities"] == [0.0, 1.0]
    assert row["choice_log_probabilities"] == [-1000.0, 0.0]
    assert log_of(tmp_path)["cat-seed=43-m.own"]["choice_probabilities"] == [1.0, 0.0]
    with open_dataset(tmp_path) as dataset:
        found = {record.id for record in dataset.records(Selection(where="score = 0"))}
        assert found == {"cat-seed=42", "dog-seed=42"}


def test_a_score_that_is_just_enough_is_enough(tmp_path: Path) -> None:
    for number, least in enumerate((0.7, 0.3, 0.1, 0.55)):
        root = tmp_path / str(number)
        run(root, tries(replace(OWN, at_least=least), keep=1, tries=1), own=lambda *_, s=least: s)
        assert set(judged(root).values()) == {Verdict.ACCEPTED}


def test_a_function_gets_the_image_and_the_row_of_its_job(tmp_path: Path) -> None:
    seen = []

    def own(image: Any, row: Mapping[str, Any]) -> bool:
        seen.append((image.mode, image.size, row["metadata"], row["matrix"], row["job_id"]))
        return True

    run(tmp_path, tries(OWN, keep=1), own=own)
    assert sorted(seen) == [
        ("RGB", (64, 32), {"artist": "me"}, {}, f"{name}-seed=42") for name in ("cat", "dog")
    ]


def test_all_functions_and_questions_must_hold(tmp_path: Path) -> None:
    other = AcceptFunction(function="m:other")
    check = {"ask": "?", "choices": ["yes", "no"], "is": "yes"}
    jobs = tries(OWN, other, accept=check)
    run(tmp_path, jobs, own=by_seed, other=lambda _, row: row["seed"] != 43)
    rows = log_of(tmp_path)
    assert {"cat-seed=42-check", "cat-seed=42-m.own", "cat-seed=42-m.other"} <= rows.keys()
    accepted = {one for one, found in judged(tmp_path).items() if found is Verdict.ACCEPTED}
    assert accepted == {"cat-seed=44", "dog-seed=44"}


def test_what_a_function_raises_is_one_failed_verdict(tmp_path: Path) -> None:
    def own(_: Any, row: Mapping[str, Any]) -> float:
        if row["job_id"] == "cat-seed=42":
            raise KeyError("no such face")
        return 7.0 if row["job_id"] == "dog-seed=43" else 1.0

    ran = run(tmp_path, tries(OWN), own=own)
    assert ran.summary.counts.failed == 2
    rows = log_of(tmp_path)
    assert rows["cat-seed=42-m.own"]["error_type"] == "KeyError"
    assert rows["dog-seed=43-m.own"]["error_message"] == (
        "m:own: expected True, False or a number from 0 to 1, found 7.0"
    )
    assert "no such face" in (tmp_path / rows["cat-seed=42-m.own"]["error_file"]).read_text()
    found = judged(tmp_path)
    assert found["cat-seed=42"] is found["dog-seed=43"] is Verdict.REJECTED
    assert list(found.values()).count(Verdict.ACCEPTED) == 4


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_function_that_exits_is_one_failed_verdict_as_well(
    kind: type[BaseException], tmp_path: Path
) -> None:
    def own(_: Any, row: Mapping[str, Any]) -> bool:
        if row["job_id"] == "cat-seed=42":
            raise kind("enough")
        return True

    ran = run(tmp_path, tries(OWN, keep=1), own=own)
    assert ran.summary.counts.failed == 1
    failed = log_of(tmp_path)["cat-seed=42-m.own"]
    assert (failed["error_type"], failed["error_message"]) == (kind.__name__, "enough")
    assert judged(tmp_path)["cat-seed=43"] is Verdict.ACCEPTED


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (UnprintableError(), "<exception str() failed>"),
        ("y" * 10**6, "m:own: expected True, False or a number from 0 to 1, found 'yyyy"),
    ],
)
def test_a_verdict_that_fails_says_why_in_a_few_words(
    found: object, message: str, tmp_path: Path
) -> None:
    def own(*_: Any) -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    assert run(tmp_path, tries(OWN, tries=2), own=own).summary.counts.failed == 4
    failed = log_of(tmp_path)["cat-seed=42-m.own"]["error_message"]
    assert failed.startswith(message)
    assert len(failed) < 200


def test_another_function_judges_again_and_draws_nothing(tmp_path: Path) -> None:
    run(tmp_path, tries(OWN), own=by_seed)
    jobs = [
        replace(job, judged_by=replace(job.judged_by, source_sha256="other"))
        if job.judged_by
        else job
        for job in tries(OWN)
    ]
    ran = run(tmp_path, jobs, own=lambda *_: True)
    assert ran.engine.batches == []
    assert ran.summary.done == 6
    assert judged(tmp_path)["cat-seed=44"] is Verdict.SPARE
    assert run(tmp_path, jobs, own=lambda *_: True).summary.done == 0


def test_drawing_goes_on_while_a_function_judges(tmp_path: Path) -> None:
    engine = FakeEngine()

    def own(_: Any, __: Any) -> bool:
        for _ in range(2000):
            if ("last",) in engine.batches:
                return True
            time.sleep(0.01)
        return False

    jobs = tries(OWN, keep=1, tries=1)
    first = next(job for job in jobs if job.judged_by)
    last = replace(first, id="last", prompt="?", judged_by=None, verdict=None)
    ran = run_folder(tmp_path, [*jobs, last], CONFIG, engine=engine, functions={"m:own": own})
    assert set(judged(tmp_path).values()) == {Verdict.ACCEPTED}
    assert ran.summary.counts.failed == 0


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_any_number_of_workers_accepts_the_same(num_workers: int, tmp_path: Path) -> None:
    run(tmp_path / "one", tries(OWN), own=by_seed)
    if num_workers:
        crew = ThreadCrew(num_workers, CONFIG, tries(OWN))
        functions = {"m:own": by_seed}
        run_crew(tmp_path / "many", tries(OWN), CONFIG, crew, functions=functions)
        assert not any("m.own" in str(order) for _, order in crew.orders)
    else:
        jobs = tries(OWN)
        for _ in range(30):
            ran = run_folder(
                tmp_path / "many", jobs, CONFIG, stop=Flag(after=3), functions={"m:own": by_seed}
            )
            if not ran.summary.counts.remaining:
                break
    assert judged(tmp_path / "many") == judged(tmp_path / "one")
    assert outcome(tmp_path / "many")[0] == outcome(tmp_path / "one")[0]


class Died(BaseException):
    """The process ends."""


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_function_that_processes_die_of_costs_one_verdict(
    num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Judging.start

    def deadly(self: Judging, jobs: Any) -> Any:
        if any(stored.job.id == "cat-seed=43-m.own" for stored in jobs):
            raise Died
        return start(self, jobs)

    monkeypatch.setattr(Judging, "start", deadly)
    for _ in range(6):
        try:
            if num_workers:
                crew = ThreadCrew(num_workers, CONFIG, tries(OWN))
                run_crew(tmp_path, tries(OWN), CONFIG, crew, functions={"m:own": by_seed})
            else:
                run(tmp_path, tries(OWN), own=by_seed)
            break
        except Died:
            continue
    failed = [name for name, row in log_of(tmp_path).items() if row["status"] != "done"]
    assert failed == ["cat-seed=43-m.own"]
    assert log_of(tmp_path)[failed[0]]["error_type"] == "ProcessDiedError"
    assert "the process was killed 2 times" in log_of(tmp_path)[failed[0]]["error_message"]
    assert judged(tmp_path)["cat-seed=44"] is Verdict.ACCEPTED
    assert judged(tmp_path)["dog-seed=43"] is Verdict.ACCEPTED


def test_a_stop_while_functions_judge_is_not_their_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, is_left, leave = threading.Event(), threading.Event(), Judging.__exit__

    def own(_: Any, __: Any) -> bool:
        stop.set()
        return is_left.wait(60)

    def wait_for_own(self: Judging, *error: object) -> None:
        is_left.set()
        leave(self, *error)

    monkeypatch.setattr(Judging, "__exit__", wait_for_own)

    jobs = tries(OWN, keep=1, tries=1)
    crew = ThreadCrew(1, CONFIG, jobs)
    assert run_crew(tmp_path, jobs, CONFIG, crew, stop=stop, functions={"m:own": own}).stopped
    with open_store(tmp_path) as store:
        assert [batch.starts for batch in store.state.started_batches()] == [0]
    crew = ThreadCrew(1, CONFIG, jobs)
    run_crew(tmp_path, jobs, CONFIG, crew, functions={"m:own": lambda *_: True})
    assert set(judged(tmp_path).values()) == {Verdict.ACCEPTED}
