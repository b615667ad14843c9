from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensebatch.errors import ManifestError, RunFolderError
from sensebatch.jobs import InputImage, Job, Source, group_key
from sensebatch.store.codec import group_from_json, group_to_json, job_from_json, job_to_json
from sensebatch.store.state import State
from sensebatch.store.status import read_status
from sensebatch.tasks import Task
from tests.executor.fakes import IDENTITY, Flag, make_input, make_job, outcome, run_folder


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    opened = State(tmp_path / "state.db")
    yield opened
    opened.close()


text = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    prompt=text,
    seed=st.integers(),
    cfg=st.floats(allow_nan=False),
    system=st.none() | text,
    metadata=st.dictionaries(text, st.none() | text | st.integers() | st.lists(text)),
)
def test_job_is_read_back_as_it_was(
    prompt: str, seed: int, cfg: float, system: str | None, metadata: dict[str, Any]
) -> None:
    job = make_job(
        "a", Task.EDIT, prompt=prompt, seed=seed, system_prompt=system, metadata=metadata
    )
    member = InputImage(
        path="p", member=(3, "image", 0), sha256="0", height=1, width=2, corrections="orientation"
    )
    job = replace(
        job,
        images=(make_input("x"), member),
        sampling=replace(job.sampling, cfg_scale=cfg),
        input_max_pixels=9,
    )
    assert job_from_json(job_to_json(job)) == job
    assert group_from_json(group_to_json(group_key(job))) == group_key(job)


def test_reader_that_raises_undoes_the_whole_reading(state: State, tmp_path: Path) -> None:
    state.ingest([make_job("a")], IDENTITY, tmp_path)

    def broken() -> Iterator[Job]:
        yield make_job("b")
        raise ManifestError([])

    with pytest.raises(ManifestError):
        state.ingest(broken(), IDENTITY, tmp_path)
    assert [entry.id for entry in state.entries()] == ["a"]


def test_changes_are_counted(tmp_path: Path) -> None:
    jobs = [make_job("same"), make_job("changed"), make_job("removed")]
    run_folder(tmp_path, jobs)
    ran = run_folder(tmp_path, [make_job("new"), jobs[0], make_job("changed", seed=8)])
    changes = ran.changes
    assert (changes.jobs, changes.added, changes.changed, changes.removed) == (3, 1, 1, 1)
    assert ran.engine.batches == [("new", "changed")]


def test_other_tags_do_not_run_a_job_again(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job("a")])
    moved = make_job("a", metadata={"tag": 1}, source=Source(file="other.yaml", row="line 9"))
    ran = run_folder(tmp_path, [moved])
    assert (ran.changes.changed, ran.engine.batches) == (0, [])


def test_removed_job_that_comes_back_is_still_done(tmp_path: Path) -> None:
    jobs = [make_job("a"), make_job("b")]
    run_folder(tmp_path, jobs)
    run_folder(tmp_path, jobs[:1])
    ran = run_folder(tmp_path, jobs)
    assert ran.engine.batches == []
    assert ran.summary.counts.done == 2


STORIES = [make_job(f"s{i}", Task.INTERLEAVE, seed=i) for i in range(3)]
OTHERS = [replace(job, seed=job.seed + 50) for job in STORIES]


def test_jobs_with_the_definition_they_were_done_with_are_done(tmp_path: Path) -> None:
    """A run of another definition was stopped before it made anything, and one of a third."""
    run_folder(tmp_path, STORIES)
    before = outcome(tmp_path)
    for others in (OTHERS, [replace(job, prompt="x") for job in STORIES]):
        ran = run_folder(tmp_path, others, stop=Flag(after=0))
        assert (ran.changes.changed, ran.changes.returned) == (3, 0)
    ran = run_folder(tmp_path, STORIES)
    assert (ran.changes.changed, ran.changes.returned, ran.engine.batches) == (0, 3, [])
    assert ran.summary.counts.done == 3
    assert outcome(tmp_path) == before
    # For good, and not for this run alone.
    assert run_folder(tmp_path, STORIES).changes.returned == 0


def test_a_failure_of_another_definition_takes_nothing_from_the_first(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job("a")])
    ran = run_folder(tmp_path, [make_job("a", prompt="this one fails")])
    assert ran.summary.counts.failed == 1
    ran = run_folder(tmp_path, [make_job("a")])
    assert (ran.changes.returned, ran.engine.batches) == (1, [])
    assert ran.summary.counts.done == 1


def test_only_the_files_of_a_definition_make_its_job_done(tmp_path: Path) -> None:
    """One was replaced, one is missing, and one job was done with the other definition since."""
    jobs = [make_job("whole"), *STORIES]
    run_folder(tmp_path, jobs)
    run_folder(tmp_path, [jobs[0], *OTHERS[:1]])
    run_folder(tmp_path, [replace(jobs[0], seed=9), *OTHERS], stop=Flag(after=0))
    (tmp_path / "images/s1/000.png").write_bytes(b"of a batch that was killed")
    (tmp_path / "text/s2.txt").unlink()
    ran = run_folder(tmp_path, jobs)
    assert (ran.changes.returned, ran.changes.changed) == (1, 3)
    assert sorted(id for batch in ran.engine.batches for id in batch) == ["s0", "s1", "s2"]


def test_same_id_twice_names_both_places(state: State, tmp_path: Path) -> None:
    again = make_job("a", source=Source(file="two.yaml", row="line 4"))
    with pytest.raises(ManifestError) as caught:
        state.ingest([make_job("a"), again], IDENTITY, tmp_path)
    assert str(caught.value) == (
        "two.yaml: line 4: id: expected an id of its own, found 'a' again "
        "(first in jobs.yaml: line 1)"
    )
    assert list(state.entries()) == []


def test_ids_that_differ_by_case_are_refused_even_across_runs(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job("Cat")])
    with pytest.raises(ManifestError, match="a disk that ignores case takes for 'Cat'"):
        run_folder(tmp_path, [make_job("cat")])


def test_changed_member_takes_an_interrupted_batch_apart(state: State, tmp_path: Path) -> None:
    jobs = [make_job("a"), make_job("b")]
    state.ingest(jobs, IDENTITY, tmp_path)
    stored = state.jobs(["a", "b"])
    members = [(one.job.id, one.key) for one in stored]
    state.begin(members)
    state.ingest(jobs, IDENTITY, tmp_path)
    assert [batch.ids for batch in state.started_batches()] == [("a", "b")]
    assert state.counts().started == 2
    state.ingest([jobs[0], make_job("b", seed=1)], IDENTITY, tmp_path)
    assert state.started_batches() == []
    assert [entry.id for entry in state.entries()] == ["a", "b"]


def test_limit_leaves_interrupted_batches_whole_and_runs_those_it_reached(
    state: State, tmp_path: Path
) -> None:
    jobs = [make_job(name) for name in "abcd"]
    state.ingest(jobs, IDENTITY, tmp_path)
    keys = {name: state.jobs([name])[0].key for name in "abcd"}
    for pair in ("ab", "cd"):
        state.begin([(name, keys[name]) for name in pair])
    changes = state.ingest(jobs[:1], IDENTITY, tmp_path, limit=1)
    assert (changes.removed, changes.unread) == (0, 3)
    assert [batch.ids for batch in state.started_batches()] == [("a", "b")]
    counts = state.counts()
    assert (counts.jobs, counts.started, counts.pending, counts.unread) == (1, 1, 0, 3)
    state.ingest(jobs, IDENTITY, tmp_path)
    assert [batch.ids for batch in state.started_batches()] == [("a", "b"), ("c", "d")]
    assert state.counts().unread == 0


def test_jobs_beyond_the_limit_are_not_planned(state: State, tmp_path: Path) -> None:
    jobs = [make_job("a"), make_job("b")]
    state.ingest(jobs, IDENTITY, tmp_path)
    state.ingest(jobs[:1], IDENTITY, tmp_path, limit=1)
    assert [entry.id for entry in state.entries()] == ["a"]


def test_another_sqlite_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE other (x)")
    connection.close()
    with pytest.raises(RunFolderError, match=r"expected a state database, found another SQLite"):
        State(path)


def test_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"not a database, but long enough to be read as one" * 40)
    with pytest.raises(RunFolderError, match="not a database"):
        State(path)


RED = InputImage(path="red.png", sha256="1" * 64, height=32, width=32)
OLD, NEW = "edit-" + "0" * 16, "edit-" + "f" * 16


def test_job_whose_id_earlier_versions_derived_otherwise_is_the_same_job(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job(OLD, Task.EDIT, images=(RED,), prompt="p"), make_job("a")])
    before = outcome(tmp_path)
    renamed = [make_job("a"), make_job(NEW, Task.EDIT, images=(RED,), prompt="p")]
    ran = run_folder(tmp_path, renamed)
    assert (ran.changes.added, ran.changes.removed, ran.engine.batches) == (0, 0, [])
    assert read_status(tmp_path).counts.done == 2
    assert outcome(tmp_path) == before
    # With another definition it is run under its new name; its former file is replaced by it.
    again = make_job(NEW, Task.EDIT, images=(RED,), prompt="p", seed=8)
    assert run_folder(tmp_path, [again, make_job("a")]).changes.changed == 1
    assert [path.name for path in sorted((tmp_path / "images").iterdir())] == [
        "a.png",
        f"{NEW}.png",
    ]


def test_definition_that_comes_back_under_a_new_derived_id_is_known(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job(OLD, Task.EDIT, images=(RED,), prompt="p")])
    job = make_job(NEW, Task.EDIT, images=(RED,), prompt="p")
    run_folder(tmp_path, [job])
    run_folder(tmp_path, [replace(job, seed=8)], stop=Flag(after=0))
    ran = run_folder(tmp_path, [job])
    assert (ran.changes.returned, ran.engine.batches) == (1, [])


def test_interrupted_batch_is_found_again_under_new_derived_ids(
    state: State, tmp_path: Path
) -> None:
    old = [make_job("a", Task.EDIT, images=(RED,)), make_job(OLD, Task.EDIT, images=(RED,))]
    state.ingest(old, IDENTITY, tmp_path)
    state.begin([(one.job.id, one.key) for one in state.jobs(["a", OLD])])
    new = replace(old[1], id=NEW)
    state.ingest([old[0], new], IDENTITY, tmp_path)
    assert [batch.ids for batch in state.started_batches()] == [("a", NEW)]


@pytest.mark.parametrize("images", [(), (RED,)])
def test_given_ids_and_jobs_without_images_are_jobs_of_their_own(
    tmp_path: Path, images: tuple[InputImage, ...]
) -> None:
    task = Task.EDIT if images else Task.T2I
    old, new = ("mine", "yours") if images else (f"t2i-{'0' * 16}", f"t2i-{'f' * 16}")
    run_folder(tmp_path, [make_job(old, task, images=images, prompt="p")])
    ran = run_folder(tmp_path, [make_job(new, task, images=images, prompt="p")])
    assert ran.changes.added == 1
    assert ran.engine.batches == [(new,)]
