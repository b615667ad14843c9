"""Series of tries: as many are drawn as it takes, the same ones whatever happens meanwhile."""

from __future__ import annotations

import io
import itertools
import math
import sqlite3
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sensebatch.config import ExecutionConfig, MemoryConfig, RunConfig, default_config
from sensebatch.contract import Channel, Following, Kept, Reading
from sensebatch.dataset.records import open_dataset
from sensebatch.dataset.selection import Selection
from sensebatch.errors import ExportError
from sensebatch.export.run import Exported
from sensebatch.jobs import Batch, BatchMetrics, BatchResult, InputImage, Job, JobResult
from sensebatch.manifest.read import read_rows
from sensebatch.report.acceptance import acceptance_lines, acceptance_table
from sensebatch.store import acceptance
from sensebatch.store.acceptance import HeldJob, Series, Verdict
from sensebatch.store.dry_run import dry_run
from sensebatch.store.finished import finished_jobs
from sensebatch.store.status import Acceptance, read_status
from sensebatch.store.store import Store, open_store
from sensebatch.store.tables import WHOLE
from sensebatch.tasks import Task
from tests.executor.crews import ThreadCrew, run_crew
from tests.executor.fakes import (
    IDENTITY,
    FakeEngine,
    Flag,
    digest,
    make_config,
    make_job,
    outcome,
    run_folder,
)
from tests.executor.test_crash import MEMORY, Killed, Life, mortal
from tests.export.folders import export_folder, parquet_ids

pytestmark = pytest.mark.slow

CONFIG = make_config(max_batch_size=4, execution=ExecutionConfig(max_attempts=1))
IN_LANES = replace(CONFIG, memory=MemoryConfig(max_batch_size=2))
"""Batches so small that the series below are in two lanes."""
CHECK = {"ask": "Is it good?", "choices": ["yes", "no"], "is": "yes", "at_least": 0.6}


class Judge(FakeEngine):
    """Answers questions by the pixels of the image, so that some are good and some are not."""

    def generate(
        self,
        batch: Batch,
        prepared: Sequence[tuple[bytes, ...]],
        *,
        kept: Kept,
        channel: Channel,
        reading: Reading | None = None,
        following: Following = (),
    ) -> BatchResult:
        if batch.group.task is not Task.ASK:
            return super().generate(
                batch,
                prepared,
                kept=kept,
                channel=channel,
                reading=reading,
                following=following,
            )
        self.batches.append(tuple(job.id for job in batch.jobs))
        self.on_step()
        results = []
        for job, inputs in zip(batch.jobs, prepared, strict=True):
            share = (1 + digest(job.prompt, *map(_pixels, inputs))[0]) / 258
            logs = (math.log(share), math.log(1 - share))
            results.append(JobResult(text="yes", answer="yes", choice_log_probabilities=logs))
        return BatchResult(results=tuple(results), metrics=BatchMetrics(total_s=1.0))


def _pixels(encoded: bytes) -> bytes:
    """Returns the pixels of an image, however its file was compressed."""
    with Image.open(io.BytesIO(encoded)) as image:
        return image.tobytes()


def series(*names: str, **changes: Any) -> list[Job]:
    """Returns the tries at some prompts with their questions."""
    rows = [
        {
            "id": name,
            "prompt": f"a {name}",
            "width": 64,
            "height": 32,
            "num_steps": 2,
            "accept": CHECK,
            "keep": 2,
            "tries": 6,
            **changes,
        }
        for name in names
    ]
    return list(read_rows(rows, default_config(), path=Path("rows")))


NAMES = ("cat", "dog", "owl", "fox", "elk")


def verdicts(root: Path) -> dict[str, Verdict]:
    with open_store(root) as store:
        return store.state.verdicts()


def judged(root: Path) -> list[Series]:
    with open_store(root) as store:
        return store.state.series()


def test_a_row_is_a_series_of_tries_with_a_question_for_each() -> None:
    jobs = series("cat", seed=7)
    assert [job.id for job in jobs[:4]] == [
        "cat-seed=7",
        "cat-seed=7-check",
        "cat-seed=8",
        "cat-seed=8-check",
    ]
    assert len(jobs) == 12
    one, question = jobs[2:4]
    assert one.attempt_at is not None
    assert (one.attempt_at.series, one.attempt_at.number, one.attempt_at.keep) == ("cat", 1, 2)
    assert question.verdict is not None
    assert (question.verdict.job, question.verdict.answer) == ("cat-seed=8", "yes")
    assert question.images[0].output == ("cat-seed=8", 0)


def test_tries_are_drawn_until_enough_are_accepted(tmp_path: Path) -> None:
    ran = run_folder(tmp_path, series(*NAMES), CONFIG, engine=Judge())
    found = verdicts(tmp_path)
    assert ran.summary.counts.remaining == 0
    for one in judged(tmp_path):
        assert one.accepted == 2 or one.is_short
        own = [found.get(f"{one.name}-seed={seed}") for seed in range(42, 48)]
        # In the order of the seeds, and none after the last that is needed.
        assert own[: one.judged] == [verdict for verdict in own if verdict]
        if not one.is_short:
            assert own[one.judged - 1] is Verdict.ACCEPTED
    assert Verdict.REJECTED in found.values()
    assert len(found) < 6 * len(NAMES)
    assert ran.summary.counts.held == 2 * (6 * len(NAMES) - len(found))
    assert ran.engine.batches[0] == ("cat-seed=42", "cat-seed=43", "dog-seed=42", "dog-seed=43")
    assert run_folder(tmp_path, series(*NAMES), CONFIG, engine=Judge()).engine.batches == []


def test_a_series_that_comes_short_says_so(tmp_path: Path) -> None:
    jobs = series("cat", accept={**CHECK, "at_least": 1.0})
    ran = run_folder(tmp_path, jobs, CONFIG, engine=Judge())
    (one,) = judged(tmp_path)
    assert (one.is_short, one.judged, one.accepted) == (True, 6, 0)
    assert ran.summary.counts.held == 0


def test_all_checks_must_hold(tmp_path: Path) -> None:
    other = {**CHECK, "ask": "Is it sharp?"}
    run_folder(tmp_path, series(*NAMES, accept=[CHECK, other]), CONFIG, engine=Judge())
    rows = {row["job_id"]: row for row in outcome(tmp_path)[1]}
    for job_id, verdict in verdicts(tmp_path).items():
        shares = [rows[f"{job_id}-check{n}"]["choice_probabilities"][0] for n in ("", "-2")]
        assert (verdict is Verdict.REJECTED) == (min(shares) < 0.6)


@pytest.mark.parametrize("limit", [1, 2])
def test_a_try_is_open_until_all_its_checks_were_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    checks = [CHECK | {"at_least": 0.001}, CHECK | {"ask": "Is it?", "at_least": 0.001}]
    jobs = series("ship", accept=checks, keep=1, tries=1)
    assert len(jobs) == 3
    ingest = Store.ingest
    with monkeypatch.context() as patched:
        # As with `--limit`, which counts a try and its questions as jobs.
        patched.setattr(Store, "ingest", lambda *args: ingest(*args, limit=limit))
        run_folder(tmp_path, jobs[:limit], CONFIG, engine=Judge())
    assert verdicts(tmp_path) == {}
    run_folder(tmp_path, jobs, CONFIG, engine=Judge())
    assert list(verdicts(tmp_path).values()) == [Verdict.ACCEPTED]


def test_another_threshold_draws_nothing_again(tmp_path: Path) -> None:
    run_folder(tmp_path, series(*NAMES), CONFIG, engine=Judge())
    lower = series(*NAMES, accept={**CHECK, "at_least": 0.0011})
    ran = run_folder(tmp_path, lower, CONFIG, engine=Judge())
    assert ran.engine.batches == []
    found = list(verdicts(tmp_path).values())
    assert found.count(Verdict.ACCEPTED) == 2 * len(NAMES)
    assert Verdict.SPARE in found


def test_more_that_are_wanted_continue_the_series(tmp_path: Path) -> None:
    run_folder(tmp_path, series(*NAMES), CONFIG, engine=Judge())
    before = verdicts(tmp_path)
    run_folder(tmp_path, series(*NAMES, keep=3), CONFIG, engine=Judge())
    after = verdicts(tmp_path)
    assert before.items() < after.items()
    assert all(one.accepted == 3 or one.is_short for one in judged(tmp_path))


def test_a_failed_try_is_used_up(tmp_path: Path) -> None:
    jobs = series("cat", prompt="fails")
    ran = run_folder(tmp_path, jobs, CONFIG, engine=Judge())
    assert ran.summary.counts.failed == 6
    (one,) = judged(tmp_path)
    assert one.is_short


@pytest.mark.parametrize("config", [CONFIG, IN_LANES], ids=["one lane", "two lanes"])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_any_number_of_workers_accepts_the_same(
    config: RunConfig, num_workers: int, tmp_path: Path
) -> None:
    run_folder(tmp_path / "one", series(*NAMES), config, engine=Judge())
    crew = ThreadCrew(num_workers, config, series(*NAMES), lambda *_: Judge())
    run_crew(tmp_path / "many", series(*NAMES), config, crew)
    assert verdicts(tmp_path / "many") == verdicts(tmp_path / "one")
    assert outcome(tmp_path / "many")[0] == outcome(tmp_path / "one")[0]


@pytest.mark.parametrize("config", [CONFIG, IN_LANES], ids=["one lane", "two lanes"])
def test_killed_at_any_step_and_resumed_the_same_are_accepted(config: RunConfig) -> None:
    jobs = series("cat", "dog", "owl", "fox")
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        run_folder(Path(folder, "whole"), jobs, config, engine=Judge())
        whole = outcome(Path(folder, "whole"))[0], verdicts(Path(folder, "whole"))
        for every in (11, 23):
            root = Path(folder, str(every))
            for steps in range(every, 10_000, every):
                life = Life(steps)
                try:
                    with mortal(life):
                        run_folder(root, jobs, config, engine=Judge(life.step))
                except Killed:
                    continue
                break
            assert (outcome(root)[0], verdicts(root)) == whole


def test_stopped_between_batches_and_resumed_the_same_are_accepted(tmp_path: Path) -> None:
    run_folder(tmp_path / "whole", series(*NAMES), CONFIG, engine=Judge())
    for _ in range(40):
        ran = run_folder(
            tmp_path / "parts", series(*NAMES), CONFIG, engine=Judge(), stop=Flag(after=2)
        )
        if not ran.summary.counts.remaining:
            break
    assert outcome(tmp_path / "parts")[0] == outcome(tmp_path / "whole")[0]
    assert verdicts(tmp_path / "parts") == verdicts(tmp_path / "whole")


def test_one_half_is_drawn_while_the_other_is_judged(tmp_path: Path) -> None:
    batches = run_folder(tmp_path, series(*NAMES), IN_LANES, engine=Judge()).engine.batches
    halves = [{job_id[:3] for job_id in batch} for batch in batches]
    # No batch has jobs of both.
    assert all(half <= {"cat", "dog"} or half <= {"owl", "fox", "elk"} for half in halves)
    is_first = [half <= {"cat", "dog"} for half in halves]
    is_verdict = ["check" in batch[0] for batch in batches]
    first_verdict = is_verdict.index(True)
    assert {True, False} == set(is_first[:first_verdict])
    # After the verdicts on one half, those on the other precede what the former decide.
    assert is_first[first_verdict]
    again = next(n for n in range(first_verdict, len(batches)) if not is_verdict[n])
    assert {True, False} == set(is_first[first_verdict:again])


def test_few_series_and_those_of_one_chain_are_in_one_lane(tmp_path: Path) -> None:
    def spans(root: Path, jobs: list[Job], least: int) -> list[tuple[int, int]]:
        with open_store(root) as store:
            store.state.ingest(jobs, IDENTITY, root)
            return store.state.lanes(least)

    jobs = series(*NAMES)
    # Twelve jobs a series, of which two tries are open: the cut is after the second or the third.
    (_, end), (start, _) = spans(tmp_path / "many", jobs, 4)
    assert (end + 1, start % 12) == (start, 0)
    assert start in (24, 36)
    assert spans(tmp_path / "few", jobs, 6) == [WHOLE]
    first = replace(jobs[0], id="first", attempt_at=None)
    image = InputImage(path="@first", sha256="", height=32, width=64, output=("first", 0))
    last = replace(jobs[0], id="last", task=Task.EDIT, images=(image,), attempt_at=None, level=1)
    assert spans(tmp_path / "chain", [first, *jobs, last], 2) == [WHOLE]


def test_status_counts_what_is_accepted(tmp_path: Path) -> None:
    run_folder(tmp_path, series(*NAMES), CONFIG, engine=Judge())
    assert [one.name for one in read_status(tmp_path).acceptance.series] == sorted(NAMES)


def test_an_export_has_accepted_images_alone_unless_it_is_told(tmp_path: Path) -> None:
    run_folder(tmp_path / "run", series(*NAMES), CONFIG, engine=Judge())
    found = verdicts(tmp_path / "run")
    some = export_folder(tmp_path / "run", tmp_path / "some")
    export_folder(tmp_path / "run", tmp_path / "all", with_rejected=True)
    assert isinstance(some, Exported)
    accepted = {job_id for job_id, verdict in found.items() if verdict is Verdict.ACCEPTED}
    assert (some.jobs, some.not_accepted) == (len(accepted), 2 * len(found) - len(accepted))
    # The other tries were not needed, and neither were questions about them.
    assert (some.not_needed, some.not_done) == (2 * (6 * len(NAMES) - len(found)), 0)
    assert set(parquet_ids(tmp_path / "some")) == accepted
    assert set(parquet_ids(tmp_path / "all")) == found.keys() | {f"{one}-check" for one in found}


def test_an_export_of_rejected_images_alone_says_how_to_have_them(tmp_path: Path) -> None:
    run_folder(
        tmp_path / "run",
        series("cat", tries=2, accept=CHECK | {"at_least": 1}),
        CONFIG,
        engine=Judge(),
    )
    with pytest.raises(
        ExportError,
        match=r"expected images that are accepted, found none in 4 jobs; see --rejected",
    ):
        export_folder(tmp_path / "run", tmp_path / "some")


def test_expressions_know_verdicts(tmp_path: Path) -> None:
    run_folder(tmp_path, series(*NAMES), CONFIG, engine=Judge())
    with open_dataset(tmp_path) as dataset:
        chosen = dataset.records(Selection(where="verdict = 'rejected'"))
        rejected = {record.id for record in chosen}
    assert rejected == {
        job_id for job_id, verdict in verdicts(tmp_path).items() if verdict is Verdict.REJECTED
    }


def test_what_was_accepted_and_what_came_short_is_said() -> None:
    def one(name: str, accepted: int, judged: int) -> Series:
        return Series(name=name, keep=2, tries=4, judged=judged, passed=accepted, accepted=accepted)

    found = Acceptance(
        series=(one("cat", 2, 3), one("dog", 1, 4), one("owl", 0, 1)),
        held=(
            HeldJob(job="night", starts_from="owl-seed=45", is_dropped=False),
            HeldJob(job="storm", starts_from="dog-seed=42", is_dropped=True),
        ),
    )
    held = [
        "  held     1 job starts from tries that were not needed: night (@owl-seed=45)",
        "  held     1 job starts from rejected images that were removed: storm (@dog-seed=42)",
    ]
    assert list(acceptance_lines(found)) == [
        "  accepted 3 of 6 images wanted; 3 of 8 judged passed (38%)",
        "  short    dog: 1 of 2 after 4 tries",
        *held,
    ]
    assert list(acceptance_table(found)) == [
        "acceptance      3 of 6 wanted; 3 of 8 judged passed (38%)",
        "  prompt group  accepted  judged  pass rate",
        "  dog                1/2       4        25%  short",
        "  owl                0/2       1         0%",
        "  cat                2/2       3        67%",
        *held,
    ]
    long = "a-name-that-leaves-little-room-for-figures"
    assert list(acceptance_table(Acceptance(series=(one(long, 2, 3), one("dog", 1, 4))), 60))[
        1:
    ] == [
        "  prompt group  accepted  judged  pass rate",
        "  dog                1/2       4        25%  short",
        f"  {long}",
        "                     2/2       3        67%",
    ]
    wide = list(acceptance_table(Acceptance(series=(one(long, 2, 3),)), 80))
    assert max(map(len, wide)) <= 80
    assert wide[-1].split() == [long, "2/2", "3", "67%"]
    assert list(acceptance_lines(Acceptance())) == list(acceptance_table(Acceptance())) == []


def test_a_dry_run_holds_what_may_not_be_needed(tmp_path: Path) -> None:
    found = dry_run(
        tmp_path,
        lambda state: state.ingest(series("cat"), IDENTITY, tmp_path),
        lambda _: (),
        retry_failed=False,
    )
    counted = Counter(one.verdict.value for one in found.jobs)
    assert counted == {"drawn": 4, "held": 8}


@pytest.mark.parametrize("has_crew", [False, True])
def test_a_stop_between_two_rounds_of_tries_leaves_a_run_to_resume(
    has_crew: bool, tmp_path: Path
) -> None:
    jobs = series("cat", accept={**CHECK, "at_least": 1.0})
    stop = threading.Event()
    steps = itertools.count(1)

    def stop_at_verdicts() -> None:
        if next(steps) == 2:
            stop.set()

    engine = Judge(stop_at_verdicts)
    if has_crew:
        crew = ThreadCrew(1, CONFIG, jobs, lambda *_: engine)
        summary = run_crew(tmp_path, jobs, CONFIG, crew, stop=stop)
    else:
        summary = run_folder(tmp_path, jobs, CONFIG, engine=engine, stop=stop).summary
    assert summary.stopped
    assert summary.counts.remaining == 4
    assert run_folder(tmp_path, jobs, CONFIG, engine=Judge()).summary.counts.done == 12


def test_the_questions_about_a_try_are_found_without_looking_at_others(tmp_path: Path) -> None:
    run_folder(tmp_path, series("a"), CONFIG, engine=Judge())
    with closing(sqlite3.connect(tmp_path / "state.db")) as db:
        plan = db.execute(f"EXPLAIN QUERY PLAN {acceptance.QUESTIONS}", ("a-seed=42",)).fetchall()
    assert "verdicts_on_job" in plan[0][-1]
    assert not any("SCAN" in step[-1] or "jobs_todo" in step[-1] for step in plan)


def test_finished_tries_say_what_became_of_them(tmp_path: Path) -> None:
    run_folder(tmp_path, [*series(*NAMES), make_job("plain")], CONFIG, engine=Judge())
    found = {finished.job.id: finished.verdict for finished in finished_jobs(tmp_path)}
    assert {name: verdict for name, verdict in found.items() if verdict} == verdicts(tmp_path)
    assert Verdict.REJECTED in found.values()
    assert found["plain"] is None
