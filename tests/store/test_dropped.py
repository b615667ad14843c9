"""Rejected images that are not kept: removed after the verdict, and known to be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sensebatch.config import OutputConfig
from sensebatch.dataset.records import open_dataset
from sensebatch.export.run import Exported
from sensebatch.jobs import InputImage, Job
from sensebatch.store.acceptance import Verdict
from sensebatch.store.finished import finished_jobs
from sensebatch.store.repair import repair
from sensebatch.store.store import Store
from sensebatch.store.verify import verify
from sensebatch.tasks import Task
from tests.executor.fakes import make_job, outcome, run_folder
from tests.export.folders import export_folder, parquet_ids
from tests.store.test_acceptance import CHECK, CONFIG, NAMES, Judge, judged, series, verdicts

pytestmark = pytest.mark.slow

DROPPING = replace(CONFIG, output=OutputConfig(keep_rejected=False))


def images(root: Path) -> set[str]:
    return {path.stem for path in (root / "images").rglob("*.png")}


def rejected(root: Path) -> set[str]:
    return {job_id for job_id, verdict in verdicts(root).items() if verdict is Verdict.REJECTED}


def run(root: Path, jobs: list[Job], **options: Any) -> list[tuple[str, ...]]:
    """Runs jobs without keeping what is rejected; returns the batches of the engine."""
    return run_folder(root, jobs, DROPPING, engine=Judge(), **options).engine.batches


def child_of(parent: str) -> Job:
    image = InputImage(path=f"@{parent}", sha256="", height=32, width=64, output=(parent, 0))
    return make_job(f"child-of-{parent}", Task.EDIT, images=(image,), level=1)


def test_images_that_are_not_accepted_are_removed_and_the_rest_is_as_ever(tmp_path: Path) -> None:
    run_folder(tmp_path / "kept", series(*NAMES), CONFIG, engine=Judge())
    run(tmp_path, series(*NAMES))
    assert verdicts(tmp_path) == verdicts(tmp_path / "kept")
    assert images(tmp_path) == images(tmp_path / "kept") - rejected(tmp_path)
    assert rejected(tmp_path)
    rows = {row["job_id"]: row for row in outcome(tmp_path)[1]}
    assert {one for one, row in rows.items() if row["dropped"]} == rejected(tmp_path)
    # A resumed run, a check of files and an export know that nothing is missing.
    assert run(tmp_path, series(*NAMES)) == []
    assert {file.found for file in verify(tmp_path)} == {"whole"}
    assert {one.job.id for one in finished_jobs(tmp_path)}.isdisjoint(rejected(tmp_path))
    with open_dataset(tmp_path) as dataset:
        assert all(path.is_file() for one in dataset.records() for path in one.image_files)


def test_images_that_are_removed_are_counted_and_their_texts_are_not(tmp_path: Path) -> None:
    jobs = series(*NAMES, think=True)
    ran = run_folder(tmp_path, jobs, DROPPING, engine=Judge())
    assert ran.summary.dropped == len(rejected(tmp_path)) > 0
    texts = {path.stem for path in (tmp_path / "text").iterdir()}
    assert images(tmp_path) <= texts
    assert texts.isdisjoint(rejected(tmp_path))


def test_an_export_leaves_out_what_was_removed_and_what_starts_from_others(tmp_path: Path) -> None:
    # An image of a batch of its own is the same, and as bad, when it is drawn again for its child.
    alone = replace(DROPPING, memory=replace(DROPPING.memory, max_batch_size=1))
    jobs = series("cat", "dog")
    run_folder(tmp_path / "run", jobs, alone, engine=Judge())
    accepted = images(tmp_path / "run")
    refused = sorted(rejected(tmp_path / "run"))[0]
    jobs = [*jobs, child_of(sorted(accepted)[0]), child_of(refused)]
    run_folder(tmp_path / "run", jobs, alone, engine=Judge())
    done = export_folder(tmp_path / "run", tmp_path / "some")
    assert isinstance(done, Exported)
    assert set(parquet_ids(tmp_path / "some")) == accepted | {f"child-of-{sorted(accepted)[0]}"}
    done = export_folder(tmp_path / "run", tmp_path / "all", with_rejected=True)
    # With the questions about them, and without the one that is there again for its child.
    assert done.dropped == 2 * (len(rejected(tmp_path / "run")) - 1)
    assert f"child-of-{refused}" in parquet_ids(tmp_path / "all")


def test_an_image_that_another_job_starts_from_stays(tmp_path: Path) -> None:
    run_folder(tmp_path / "kept", series("cat"), CONFIG, engine=Judge())
    refused = sorted(rejected(tmp_path / "kept"))[0]
    run(tmp_path / "child", [*series("cat"), child_of(refused)])
    assert refused in images(tmp_path / "child")
    assert f"child-of-{refused}" in images(tmp_path / "child")
    assert images(tmp_path / "child").isdisjoint(rejected(tmp_path / "child") - {refused})


def test_a_removed_image_that_may_be_accepted_now_is_drawn_again(tmp_path: Path) -> None:
    run_folder(tmp_path / "kept", series(*NAMES), CONFIG, engine=Judge())
    run(tmp_path, series(*NAMES))
    lower = series(*NAMES, accept={**CHECK, "at_least": 0.0011})
    removed = rejected(tmp_path)
    ran = run_folder(tmp_path, lower, DROPPING, engine=Judge())
    assert 0 < ran.changes.undropped <= len(removed)
    assert ran.changes.restored == 0
    again = {job_id for batch in ran.engine.batches for job_id in batch}
    assert any(job_id in again for job_id in rejected(tmp_path / "kept"))
    found = verdicts(tmp_path)
    assert list(found.values()).count(Verdict.ACCEPTED) == 2 * len(NAMES)
    # Those with the first seeds, as if nothing had been removed.
    first = {f"{name}-seed={seed}" for name in NAMES for seed in (42, 43)}
    assert {one for one, verdict in found.items() if verdict is Verdict.ACCEPTED} == first
    assert images(tmp_path) >= first


def test_another_check_is_not_asked_about_what_was_removed(tmp_path: Path) -> None:
    run(tmp_path, series("cat", "dog"))
    before = rejected(tmp_path)
    more = [CHECK, {**CHECK, "ask": "Is it sharp?", "at_least": 0.0001}]
    ran = run_folder(tmp_path, series("cat", "dog", accept=more), DROPPING, engine=Judge())
    assert ran.summary.counts.failed == 0
    assert before <= rejected(tmp_path)
    assert all(one.is_short or one.accepted == 2 for one in judged(tmp_path))


def test_jobs_are_said_to_run_again_only_where_they_do(tmp_path: Path) -> None:
    checks = [CHECK, {**CHECK, "ask": "Is it sharp?", "at_least": 0.0001}]
    run(tmp_path, series("cat", "dog", accept=checks))
    asked = sum(one.judged for one in judged(tmp_path))
    other = [CHECK, {**checks[1], "ask": "Is it bright?"}]
    ran = run_folder(tmp_path, series("cat", "dog", accept=other), DROPPING, engine=Judge())
    # The first check has rejected some, whose images are not there to be asked about.
    assert ran.changes.held == len(rejected(tmp_path)) > 0
    assert ran.changes.changed == asked - ran.changes.held
    assert sum(map(len, ran.engine.batches)) == ran.changes.changed


def test_a_kill_between_verdict_and_removal_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", series("cat", "dog"))

    class KilledError(BaseException):
        pass

    remove = Store.remove_stale

    def killed(self: Store, names: list[str]) -> None:
        if any(name.startswith("images/") for name in names):
            raise KilledError
        remove(self, names)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "remove_stale", killed)
        with pytest.raises(KilledError):
            run(tmp_path / "parts", series("cat", "dog"))
    # On record as dropped, and still there.
    assert images(tmp_path / "parts")
    run(tmp_path / "parts", series("cat", "dog"))
    assert images(tmp_path / "parts") == images(tmp_path / "whole")
    assert outcome(tmp_path / "parts")[0] == outcome(tmp_path / "whole")[0]


@pytest.mark.parametrize("is_state_lost", [False, True])
def test_a_repair_knows_what_was_removed(is_state_lost: bool, tmp_path: Path) -> None:
    run(tmp_path, series(*NAMES))
    before = verdicts(tmp_path)
    if is_state_lost:
        for path in tmp_path.glob("state.db*"):
            path.unlink()
    repaired = repair(tmp_path, is_forced=True)
    assert repaired.to_run == ()
    assert run(tmp_path, series(*NAMES)) == []
    assert verdicts(tmp_path) == before
