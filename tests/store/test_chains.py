"""Jobs that start from images of other jobs: order, blocking, drawing again, exact resumption."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sensebatch.config import ExecutionConfig
from sensebatch.errors import ExportError, ManifestError, RunFolderError
from sensebatch.executor.run import execute
from sensebatch.executor.worker import EngineWorker
from sensebatch.gallery.inputs import Inputs
from sensebatch.jobs import InputImage, Job, job_key
from sensebatch.store.chains import reading
from sensebatch.store.codec import job_from_json, job_to_json
from sensebatch.store.dry_run import dry_run
from sensebatch.store.shards import Shard
from sensebatch.store.state import State
from sensebatch.store.status import read_status
from sensebatch.store.store import Store, open_store
from sensebatch.tasks import Task
from tests.executor.crews import ThreadCrew, run_crew
from tests.executor.fakes import (
    IDENTITY,
    FakeEngine,
    Flag,
    Recorder,
    make_config,
    make_input,
    make_job,
    outcome,
    read_input,
    run_folder,
)
from tests.executor.test_crash import MEMORY, Killed, Life, mortal
from tests.export.folders import export_folder, parquet_rows

pytestmark = pytest.mark.slow

CONFIG = make_config(max_batch_size=2)


def output(job_id: str, index: int = 0) -> InputImage:
    """Returns the image that another job makes."""
    return InputImage(path=f"@{job_id}", sha256="", height=32, width=64, output=(job_id, index))


def child(job_id: str, *parents: str, level: int = 1, **changes: Any) -> Job:
    images = tuple(map(output, parents))
    return make_job(job_id, Task.EDIT, images=images, level=level, **changes)


def family() -> list[Job]:
    """Returns jobs of three generations, in an order of their own, and some without relatives."""
    return [
        make_job("a"),
        child("a-edited", "a"),
        child("a-twice", "a-edited", level=2),
        make_job("b"),
        make_job("c"),
        make_job("alone", Task.EDIT, images=(make_input("in"),)),
        child("both", "a", "c"),
        child("b-edited", "b"),
        child("mixed", "both", "b", level=2),
    ]


def row_of(root: Path, job_id: str) -> dict[str, Any]:
    """Returns the only row of a job."""
    (row,) = (row for row in outcome(root)[1] if row["job_id"] == job_id)
    return row


def test_children_are_drawn_from_what_their_parents_made(tmp_path: Path) -> None:
    ran = run_folder(tmp_path, family(), CONFIG)
    assert ran.summary.counts.remaining == ran.summary.counts.failed == 0
    assert ran.engine.batches == [
        ("a", "b"),
        ("c",),
        ("alone",),
        ("a-edited", "both"),
        ("b-edited",),
        ("a-twice", "mixed"),
    ]
    row = row_of(tmp_path, "mixed")
    assert row["input_image_paths"] == ["images/both.png", "images/b.png"]
    made = [row_of(tmp_path, name)["image_sha256"][0] for name in ("both", "b")]
    assert row["input_image_sha256"] == made


def test_a_key_holds_the_keys_of_the_parents() -> None:
    parents = {"a": "1" * 64}
    job = child("x", "a")
    key = job_key(job, IDENTITY, parents)
    assert key != job_key(job, IDENTITY, {"a": "2" * 64})
    renamed = replace(job, id="y", images=(output("z"),))
    assert key == job_key(renamed, IDENTITY, {"z": "1" * 64})
    other = replace(job, images=(output("a", 1),))
    assert key != job_key(other, IDENTITY, parents)


def test_a_child_is_read_back_as_it_was() -> None:
    job = child("x", "a", level=3)
    assert job_from_json(job_to_json(job)) == job


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_any_number_of_workers_makes_the_same(num_workers: int, tmp_path: Path) -> None:
    run_folder(tmp_path / "one", family(), CONFIG)
    crew = ThreadCrew(num_workers, CONFIG, family(), lambda *_: FakeEngine())
    summary = run_crew(tmp_path / "many", family(), CONFIG, crew)
    assert summary.counts.remaining == 0
    assert outcome(tmp_path / "many")[0] == outcome(tmp_path / "one")[0]


def failing(*names: str) -> list[Job]:
    """Returns the family, of which some fail."""
    return [replace(job, prompt="fails") if job.id in names else job for job in family()]


def test_a_job_whose_parent_failed_is_blocked_and_so_are_its_children(tmp_path: Path) -> None:
    ran = run_folder(tmp_path, failing("a"), CONFIG)
    counts = ran.summary.counts
    assert (counts.done, counts.failed, counts.blocked) == (4, 1, 4)
    assert (counts.jobs, counts.remaining) == (9, 0)
    assert ran.engine.batches[-1] == ("b-edited",)
    assert read_status(tmp_path).counts == counts
    # Blocked is not failed: there is no attempt.
    assert {row["job_id"] for row in outcome(tmp_path)[1]} == {"a", "b", "c", "alone", "b-edited"}
    assert run_folder(tmp_path, failing("a"), CONFIG).engine.batches == []


def test_blocked_jobs_run_once_their_parents_were_tried_again(tmp_path: Path) -> None:
    class Healed(FakeEngine):
        def _drawn(self, batch: Any, index: int, inputs: Sequence[bytes]) -> Any:
            jobs = tuple(replace(job, prompt="healed") for job in batch.jobs)
            return super()._drawn(replace(batch, jobs=jobs), index, inputs)

    run_folder(tmp_path, failing("a"), CONFIG)
    config = replace(CONFIG, execution=ExecutionConfig(retry_failed=True))
    ran = run_folder(tmp_path, failing("a"), config, engine=Healed())
    assert (ran.summary.counts.done, ran.summary.counts.blocked) == (9, 0)
    assert ran.engine.batches == [("a",), ("a-edited", "both"), ("a-twice", "mixed")]


def test_a_parent_that_succeeds_at_its_second_attempt_blocks_nobody(tmp_path: Path) -> None:
    class Once(FakeEngine):
        failed = False

        def _drawn(self, batch: Any, index: int, inputs: Sequence[bytes]) -> Any:
            if batch.jobs[index].id == "a" and not self.failed:
                self.failed = True
                return None
            return super()._drawn(batch, index, inputs)

    config = replace(CONFIG, execution=ExecutionConfig(max_attempts=2))
    ran = run_folder(tmp_path, family(), config, engine=Once())
    assert (ran.summary.counts.done, ran.summary.counts.blocked) == (9, 0)
    assert ran.engine.batches[2] == ("a",)


def test_a_parent_that_is_drawn_again_has_its_children_drawn_again(tmp_path: Path) -> None:
    run_folder(tmp_path, family(), CONFIG)
    (tmp_path / "images" / "a.png").unlink()
    ran = run_folder(tmp_path, family(), CONFIG)
    assert (ran.changes.restored, ran.changes.descendants) == (1, 4)
    assert ran.engine.batches == [("a",), ("a-edited", "both"), ("a-twice", "mixed")]
    assert run_folder(tmp_path, family(), CONFIG).engine.batches == []


def test_a_child_to_be_drawn_again_is_so_although_the_run_stopped_before_it(
    tmp_path: Path,
) -> None:
    run_folder(tmp_path, family(), CONFIG)
    (tmp_path / "images" / "a.png").unlink()
    run_folder(tmp_path, family(), CONFIG, stop=Flag(after=1))
    ran = run_folder(tmp_path, family(), CONFIG)
    assert ran.engine.batches == [("a-edited", "both"), ("a-twice", "mixed")]


def test_a_changed_parent_changes_its_children_and_a_former_one_is_not_drawn_again(
    tmp_path: Path,
) -> None:
    run_folder(tmp_path, family(), CONFIG)
    changed = [replace(job, seed=8) if job.id == "a" else job for job in family()]
    run_folder(tmp_path, changed, CONFIG, stop=Flag(after=0))
    ran = run_folder(tmp_path, family(), CONFIG)
    assert (ran.changes.returned, ran.engine.batches) == (5, [])
    ran = run_folder(tmp_path, changed, CONFIG)
    assert ran.engine.batches == [("a",), ("a-edited", "both"), ("a-twice", "mixed")]
    assert ran.changes.changed == 5


def test_killed_at_any_step_and_resumed_equals_uninterrupted() -> None:
    jobs = failing("c")
    config = replace(CONFIG, execution=ExecutionConfig(max_attempts=2))
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        life = Life(None)
        with mortal(life):
            run_folder(Path(folder, "whole"), jobs, config, engine=FakeEngine(life.step))
        whole = outcome(Path(folder, "whole"))
        for every in (7, 16, 41):
            root = Path(folder, str(every))
            for steps in range(every, 10_000, every):
                life = Life(steps)
                try:
                    with mortal(life):
                        run_folder(root, jobs, config, engine=FakeEngine(life.step))
                except Killed:
                    continue
                break
            found = outcome(root)
            assert found[0] == whole[0]
            drop = {"input_image_paths"}
            assert [{n: v for n, v in row.items() if n not in drop} for row in found[1]] == [
                {n: v for n, v in row.items() if n not in drop} for row in whole[1]
            ]


def test_an_image_that_a_story_did_not_make_fails_its_child_with_a_clear_error(
    tmp_path: Path,
) -> None:
    story = make_job("story", Task.INTERLEAVE, prompt="grows")
    third = replace(child("third", "story"), images=(output("story", 2),))
    ninth = replace(child("ninth", "story"), images=(output("story", 8),))
    ran = run_folder(tmp_path, [story, third, ninth], CONFIG)
    assert (ran.summary.counts.done, ran.summary.counts.failed) == (2, 1)
    assert row_of(tmp_path, "third")["input_image_paths"] == ["images/story/002.png"]
    message = row_of(tmp_path, "ninth")["error_message"]
    assert (
        message == "expected image 8 of job story (counted from 0), found that it did not make one"
    )


def test_a_parents_file_that_was_changed_fails_the_child(tmp_path: Path) -> None:
    jobs = family()
    run_folder(tmp_path, [job for job in jobs if not job.level], CONFIG)
    (tmp_path / "images" / "b.png").write_bytes(b"other")
    run_folder(tmp_path, jobs, CONFIG)
    assert (
        "as it was drawn, found that it has changed"
        in row_of(tmp_path, "b-edited")["error_message"]
    )


def test_a_child_without_its_parent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="expected job a before the one that starts from it"):
        run_folder(tmp_path, [child("x", "a"), make_job("a")], CONFIG)


def test_a_dry_run_tells_what_was_picked_from_what_starts_from_it(tmp_path: Path) -> None:
    run_folder(tmp_path, family(), CONFIG)

    def again(state: State) -> list[str]:
        state.run_again({"a": None}, "picks")
        return ["a"]

    read = lambda state: state.ingest(family(), IDENTITY, tmp_path)  # noqa: E731
    found = {one.id: one for one in dry_run(tmp_path, read, again, retry_failed=False).jobs}
    assert found["a"].reason == "picked"
    assert found["a-edited"].reason == "an image it starts from is made again"
    assert {found[name].verdict.value for name in ("a", "a-edited")} == {"redrawn"}
    assert found["b"].reason == "done"


def test_chains_are_not_divided_into_shards(tmp_path: Path) -> None:
    with (
        open_store(tmp_path / "run") as store,
        pytest.raises(RunFolderError, match="run them without --shard"),
    ):
        store.ingest(family(), IDENTITY, shard=Shard(number=1, count=2))


def test_a_dry_run_says_why_children_run_again_and_which_are_blocked(tmp_path: Path) -> None:
    run_folder(tmp_path, failing("c"), CONFIG)
    (tmp_path / "images" / "a.png").unlink()
    jobs = [replace(job, seed=8) if job.id == "b" else job for job in failing("c")]
    found = dry_run(
        tmp_path,
        lambda state: state.ingest(jobs, IDENTITY, tmp_path),
        lambda _: (),
        retry_failed=False,
    )
    reasons = {one.id: (one.verdict.value, one.reason) for one in found.jobs}
    again = ("redrawn", "an image it starts from is made again")
    assert reasons["a"] == ("redrawn", "a file is missing")
    assert reasons["b"] == ("redrawn", "seed changed")
    assert reasons["a-edited"] == reasons["a-twice"] == reasons["b-edited"] == again
    assert reasons["both"] == ("blocked", "starts from an image of a job that failed")
    assert reasons["alone"] == ("kept", "done")


def test_a_parent_that_was_drawn_again_on_its_own_is_not_taken_for_another_model(
    tmp_path: Path,
) -> None:
    root = tmp_path / "run"
    run_folder(root, family(), CONFIG)
    changed = [replace(job, seed=8) if job.id == "a" else job for job in family()]
    # As with --limit: the reading does not get to the children.
    run_folder(root, [job for job in changed if job.id == "a"], CONFIG)
    with open_store(root) as store:
        changes = store.ingest(changed, IDENTITY)
    assert (changes.redraw, changes.changed) == (None, 4)
    ran = run_folder(root, changed, CONFIG)
    assert ran.engine.batches == [("a-edited", "both"), ("a-twice", "mixed")]


def test_a_child_is_not_exported_with_an_image_that_it_was_not_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = tmp_path / "run", tmp_path / "out"
    jobs = [job for job in family() if job.id != "alone"]
    run_folder(root, jobs, CONFIG)
    changed = [replace(job, seed=8) if job.id == "a" else job for job in jobs]
    ingest = Store.ingest
    with monkeypatch.context() as patched:
        # As with `--limit 1`: what the reading does not get to stays as it is.
        patched.setattr(Store, "ingest", lambda *args: ingest(*args, limit=1))
        assert run_folder(root, changed[:1], CONFIG).engine.batches == [("a",)]
    with pytest.raises(ExportError, match="expected the image that the job was made from"):
        export_folder(root, out)
    run_folder(root, changed, CONFIG)
    export_folder(root, out)


def test_another_model_is_what_draws_a_whole_chain_again(tmp_path: Path) -> None:
    run_folder(tmp_path, family(), CONFIG)
    with open_store(tmp_path) as store:
        changes = store.ingest(family(), replace(IDENTITY, dtype="bfloat16"))
    assert changes.redraw is not None
    assert changes.redraw.jobs == len(family())


def test_jobs_that_were_rejected_bring_their_children(tmp_path: Path) -> None:
    run_folder(tmp_path, family(), CONFIG)
    engine = FakeEngine()
    with open_store(tmp_path) as store:
        store.ingest(family(), IDENTITY)
        store.state.run_again({"b": None}, "picks")
        execute(
            store=store,
            worker=EngineWorker(engine),
            config=CONFIG,
            read_image=reading(tmp_path, read_input),
            observer=Recorder(),
            stop=Flag(),
        )
    assert engine.batches == [("b",), ("b-edited",), ("mixed",)]


def test_listed_jobs_have_the_images_that_their_parents_made(tmp_path: Path) -> None:
    run_folder(tmp_path, family(), CONFIG)
    with open_store(tmp_path) as store:
        described = [job_from_json(one.definition) for one in store.state.described()]
    places = {job.id: [image.place for image in job.images] for job in described}
    assert places["mixed"] == ["images/both.png", "images/b.png"]
    assert places["alone"] == ["in"]


def test_a_gallery_shows_what_a_child_was_drawn_from(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run_folder(root, family(), CONFIG)
    inputs = Inputs(tmp_path / "page", is_copied=False)
    with open_store(root) as store:
        (stored,) = store.state.jobs(["mixed"])
    shown = [inputs.shown(image, root)["url"] for image in stored.job.images]
    assert shown == ["../run/images/both.png", "../run/images/b.png"]


def test_an_export_has_the_images_that_a_child_was_drawn_from(tmp_path: Path) -> None:
    jobs = [job for job in family() if job.id != "alone"]
    run_folder(tmp_path / "run", jobs, CONFIG)
    export_folder(tmp_path / "run", tmp_path / "out")
    (row,) = (row for row in parquet_rows(tmp_path / "out") if row["id"] == "mixed")
    files = [tmp_path / "run" / "images" / f"{name}.png" for name in ("both", "b")]
    assert [image["bytes"] for image in row["input_images"]] == [
        file.read_bytes() for file in files
    ]
