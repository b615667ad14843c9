"""Jobs as they are now, with the row that belongs to their files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sensebatch.dataset.choices import Picked
from sensebatch.dataset.picks import Pick, PickedJob, Picks
from sensebatch.dataset.records import COLUMNS, Record, open_dataset
from sensebatch.dataset.selection import Selection, matrix_conditions
from sensebatch.errors import ConfigError, RunFolderError
from sensebatch.jobs import Job
from sensebatch.store.log import read_log
from sensebatch.store.store import open_store
from sensebatch.tasks import Task
from tests.executor.fakes import IDENTITY, FakeEngine, make_input, make_job, run_folder


def records(root: Path, **conditions: Any) -> list[Record]:
    with open_dataset(root) as dataset:
        return list(dataset.records(Selection(**conditions)))


def ids(root: Path, **conditions: Any) -> list[str]:
    return [record.id for record in records(root, **conditions)]


def marks(root: Path) -> list[tuple[str, str, bool, bool]]:
    log = read_log(root / "log.parquet", ["job_id", "status", "current", "in_manifest"])
    return [tuple(row.values()) for row in log.to_pylist()]


def test_record_of_a_job_has_its_files_and_the_row_about_them(tmp_path: Path) -> None:
    edit = make_job(
        "edit",
        Task.EDIT,
        images=(make_input("in.png"),),
        metadata={"tags": ["sky", "sea"], "artist": "Ann"},
        matrix={"light": "dawn", "cfg_scale": 4},
    )
    run_folder(tmp_path, [make_job("t", think=True), edit, make_job("fails", prompt="fails")])
    thought, made, failed = records(tmp_path)
    assert made.image_files == (tmp_path / "images" / "edit.png",)
    assert made.image_files[0].is_file()
    assert (made.tags, made.metadata, made.matrix) == (
        ("sky", "sea"),
        {"artist": "Ann"},
        {"light": "dawn", "cfg_scale": 4},
    )
    row = made.row
    assert row["input_image_paths"] == ["in.png"]
    assert row["input_image_sha256"] == [edit.images[0].sha256]
    assert json.loads(row["matrix"]) == {"light": "dawn", "cfg_scale": 4}
    assert [len(digits) for digits in made.phashes] == [16]
    text = thought.read_text()
    assert text.startswith("thinking in ")
    assert thought.row["text_chars"] == len(text)
    assert (failed.status, failed.image_files, failed.read_text()) == ("failed", (), None)
    assert failed.row["error_type"] == "ValueError"
    assert set(made.values()) | {"text"} == set(COLUMNS)


def test_edited_job_has_no_row_until_it_is_drawn_again(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job("a", prompt="a blue star"), make_job("b")])
    changed = [make_job("a", prompt="a green star"), make_job("b")]
    # Stopped before anything is drawn.
    run_folder(tmp_path, changed, stop=Stopped())
    a, b = records(tmp_path)
    assert (a.job.prompt, a.status, a.row, a.image_files) == ("a green star", "pending", None, ())
    assert b.is_done
    assert marks(tmp_path) == [("a", "done", False, True), ("b", "done", True, True)]
    run_folder(tmp_path, changed)
    a, _ = records(tmp_path)
    assert (a.row["prompt"], a.row["attempt"]) == ("a green star", 2)
    assert marks(tmp_path) == [
        ("a", "done", False, True),
        ("b", "done", True, True),
        ("a", "done", True, True),
    ]
    # The former definition has lost its file to the new one.
    run_folder(tmp_path, [make_job("a", prompt="a blue star"), make_job("b")])
    assert [row[2] for row in marks(tmp_path)] == [False, True, False, True]


class Stopped:
    """A stop that is set."""

    def is_set(self) -> bool:
        return True


def test_job_that_returns_to_its_former_definition_has_its_former_row(tmp_path: Path) -> None:
    good, bad = make_job("a"), make_job("a", prompt="fails")
    for jobs in ([good], [bad], [good]):
        run_folder(tmp_path, jobs)
    (record,) = records(tmp_path)
    assert (record.status, record.row["attempt"]) == ("done", 1)
    assert marks(tmp_path) == [("a", "done", True, True), ("a", "failed", False, True)]


def test_removed_jobs_come_last_and_only_when_asked_for(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job("a"), make_job("b"), make_job("fails", prompt="fails")])
    run_folder(tmp_path, [make_job("c"), make_job("b")])
    assert ids(tmp_path) == ["c", "b"]
    found = records(tmp_path, removed=True)
    assert [(one.id, one.in_manifest) for one in found] == [
        ("c", True),
        ("b", True),
        ("a", False),
        ("fails", False),
    ]
    assert [(row[0], row[3]) for row in marks(tmp_path)] == [
        ("a", False),
        ("b", True),
        ("fails", False),
        ("c", True),
    ]
    # Nothing is left to run, and the log still says that the job is back.
    run_folder(tmp_path, [make_job("a"), make_job("b"), make_job("c")])
    assert [row[3] for row in marks(tmp_path)] == [True, True, False, True]


def test_log_is_marked_although_nothing_is_run(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job("a"), make_job("b")])
    with open_store(tmp_path) as store:
        store.ingest([make_job("b")], IDENTITY)
    assert [row[3] for row in marks(tmp_path)] == [False, True]
    # Killed before the log was written, which the next process does.
    with open_store(tmp_path) as store:
        store.state.ingest([make_job("a"), make_job("b")], IDENTITY, tmp_path)
    assert [row[3] for row in marks(tmp_path)] == [False, True]
    with open_store(tmp_path):
        pass
    assert [row[3] for row in marks(tmp_path)] == [True, True]


def test_row_of_a_job_whose_file_is_missing_is_superseded(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job("a")])
    (tmp_path / "images" / "a.png").unlink()
    run_folder(tmp_path, [make_job("a")], stop=Stopped())
    assert marks(tmp_path) == [("a", "done", False, True)]
    assert [(record.status, record.row) for record in records(tmp_path)] == [("pending", None)]


def test_tags_and_metadata_are_those_of_the_manifest_now(tmp_path: Path) -> None:
    run_folder(tmp_path, [make_job("a", metadata={"tags": ["old"]})])
    run_folder(tmp_path, [make_job("a", metadata={"tags": ["new"]})])
    (record,) = records(tmp_path)
    assert record.tags == ("new",)
    assert json.loads(record.values()["metadata"]) == {"tags": ["new"]}
    assert record.row["attempt"] == 1


def test_records_are_readable_while_a_run_writes(tmp_path: Path) -> None:
    seen: list[Sequence[str]] = []
    engine = FakeEngine(lambda: seen.append(ids(tmp_path, statuses=["done"])))
    run_folder(tmp_path, [make_job(f"t{i}") for i in range(6)], engine=engine)
    assert seen[0] == []
    assert len(seen[-1]) >= 2


def story(job_id: str, **changes: Any) -> Job:
    return make_job(job_id, Task.INTERLEAVE, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    jobs = [
        make_job("a", seed=1, metadata={"tags": ["sky"]}, matrix={"light": "dawn", "size": 3}),
        make_job("b", seed=2, metadata={"tags": ["sky", "sea"]}, matrix={"light": "noon"}),
        make_job("c", prompt="fails", seed=3),
        story("s", prompt="cut"),
    ]
    run_folder(tmp_path, jobs)
    return tmp_path


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({}, "abcs"),
        ({"tasks": [Task.T2I]}, "abc"),
        ({"statuses": ["failed", "pending"]}, "c"),
        ({"tags": ["sky"]}, "ab"),
        ({"tags": ["sky", "sea"]}, "b"),
        ({"matrix": {"light": "dawn"}}, "a"),
        ({"matrix": {"size": "3"}}, "a"),
        ({"matrix": {"size": "4"}}, ""),
        ({"finish_reasons": ["token_limit"]}, "s"),
        ({"where": "seed >= 2"}, "bcs"),
        ({"where": "seed >= 2", "tags": ["sky"]}, "b"),
    ],
)
def test_selection_takes_jobs_that_meet_every_condition(
    folder: Path, conditions: dict[str, object], expected: str
) -> None:
    assert "".join(ids(folder, **conditions)) == expected


def test_a_name_that_no_matrix_has_is_a_mistake(folder: Path) -> None:
    with pytest.raises(ConfigError, match="one of light, size, found 'ligt'; did you mean 'light'"):
        ids(folder, matrix={"ligt": "dawn"})


def test_picks_choose_jobs_and_add_tags(folder: Path) -> None:
    with open_dataset(folder) as dataset:
        run_id = dataset.run_id
        keys = {record.id: record.key for record in dataset.records()}
    said = {
        "a": PickedJob(pick=Pick.KEEP, tags=("best",), key=keys["a"]),
        "b": PickedJob(pick=Pick.REJECT),
        # Said of an image that has been replaced since.
        "s": PickedJob(pick=Pick.KEEP, key="0" * 64),
    }
    picks = Picks(path=Path("picks.json"), runs={run_id: said})
    assert ids(folder, picks=picks) == ["a"]
    assert ids(folder, picks=picks, picked=Picked.REJECT) == ["b"]
    assert ids(folder, picks=picks, picked=Picked.NONE) == ["c", "s"]
    assert ids(folder, picks=picks, picked=Picked.ANY) == ["a", "b", "c", "s"]
    assert ids(folder, picks=picks, picked=Picked.ANY, tags=["best"]) == ["a"]
    assert ids(folder, picks=picks, picked=Picked.ANY, where="pick IS NOT 'reject'") == [*"acs"]
    other = Picks(path=Path("picks.json"), runs={"0123456789ab": said})
    with pytest.raises(ConfigError, match=f"id {run_id}, found those of 0123456789ab"):
        ids(folder, picks=other)


def test_matrix_conditions_are_names_and_values() -> None:
    assert matrix_conditions(["light=dawn", "a=b=c"]) == {"light": "dawn", "a": "b=c"}
    for word in ("light", "=dawn"):
        with pytest.raises(ConfigError, match="expected NAME=VALUE"):
            matrix_conditions([word])


def test_folder_without_a_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no state\.db"), open_dataset(tmp_path):
        pass


def test_reading_a_folder_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from sensebatch.dataset.records import open_dataset\n"
        f"with open_dataset(Path({str(folder)!r})) as d: print(len(list(d.records())))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert ran.stdout == "4\n"
