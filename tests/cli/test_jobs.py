"""`sensebatch jobs`: which jobs it lists, and how."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sensebatch.cli.main import main
from sensebatch.dataset.records import open_dataset
from sensebatch.dataset.tables import ALL
from sensebatch.tasks import Task
from tests.cli.conftest import Invoke
from tests.executor.fakes import make_input, make_job, run_folder

pytestmark = pytest.mark.slow

FOLDER = "run"


@pytest.fixture
def folder(invoke: Invoke) -> Path:
    """A folder with jobs of every kind, in the current one."""
    del invoke
    root = Path(FOLDER)
    run_folder(root, [make_job("gone")])
    run_folder(
        root,
        [
            make_job("a", metadata={"tags": ["sky"], "artist": "Ann"}, matrix={"light": "dawn"}),
            make_job("b", seed=8, think=True, matrix={"light": "noon"}),
            make_job("c\x1b[31m", prompt="this one fails\x1b[2J"),
            make_job("edit", Task.EDIT, images=(make_input("in.png"),), prompt="cut it"),
            make_job("story", Task.INTERLEAVE),
        ],
    )
    return root


def picks(root: Path, jobs: dict[str, Any]) -> Path:
    with open_dataset(root) as dataset:
        runs = [{"run": dataset.run_id, "jobs": jobs}]
    path = Path("picks.json")
    path.write_text(json.dumps({"sensebatch_picks": 1, "runs": runs}))
    return path


def ids(invoke: Invoke, *args: str) -> list[str]:
    return [job["id"] for job in invoke("jobs", FOLDER, "--json", *args).json]


def test_table_says_what_became_of_each_job(invoke: Invoke, folder: Path) -> None:
    ended = invoke("jobs", folder)
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0].split() == ["id", "task", "size", "seed", "status", "images", "about"]
    assert "an image of a" in ended.out
    assert "ValueError: NaN in the output" in ended.out
    assert "token_limit" in ended.out
    assert lines[-1] == "5 jobs: 4 done, 1 failed"
    assert "\x1b" not in ended.out
    assert "gone" not in ended.out
    assert "no longer in the manifest" in invoke("jobs", folder, "--removed").out


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_is_json_in_every_encoding(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "grün 日本 \N{OWL}"
    run_folder(tmp_path, [make_job("a", prompt=prompt)])
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    with pytest.raises(SystemExit) as ended:
        main(["jobs", str(tmp_path), "--json"])
    assert ended.value.code == 0
    text = written.getvalue().decode(encoding)
    assert [job["prompt"] for job in json.loads(text)] == [prompt]
    assert (prompt in text) is (encoding == "utf-8")


def test_table_ends_where_it_was_told_to(invoke: Invoke, folder: Path) -> None:
    out = invoke("jobs", folder, "--limit", "2").out
    assert out.splitlines()[-2:] == [
        "... and 3 more; --limit 5 prints all",
        "5 jobs: 4 done, 1 failed",
    ]
    assert len(invoke("jobs", folder, "--json", "--limit", "2").json) == 2
    assert invoke("jobs", folder, "--tag", "none").out == "0 jobs\n"


@pytest.mark.parametrize("command", ["jobs", "plan", "run"])
def test_a_limit_beyond_all_counts_is_a_clear_error(invoke: Invoke, command: str) -> None:
    ended = invoke(command, "any", "--limit", "9" * 20)
    assert ended.code == 2
    assert "--limit: expected a number of at most 1000000000, found 9999" in ended.err


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--where", "status = 'failed'"], ["c\x1b[31m"]),
        (["--task", "edit", "--task", "interleave"], ["edit", "story"]),
        (["--status", "failed"], ["c\x1b[31m"]),
        (["--tag", "sky"], ["a"]),
        (["--matrix", "light=noon"], ["b"]),
        (["--finish-reason", "token_limit"], ["edit"]),
        (["--finish-reason", "token-limit"], ["edit"]),
        (["--where", "seed = 8", "--task", "t2i"], ["b"]),
        (["--where", "artist = 'Ann'"], ["a"]),
        (["--where", "id = 'gone'", "--removed"], ["gone"]),
    ],
)
@pytest.mark.usefixtures("folder")
def test_jobs_are_chosen(invoke: Invoke, args: list[str], expected: list[str]) -> None:
    assert ids(invoke, *args) == expected


def test_picks_choose_jobs_and_stale_ones_are_warned_of(invoke: Invoke, folder: Path) -> None:
    said = {"a": {"pick": "keep"}, "b": {"pick": "reject"}, "story": {"pick": "keep", "key": "0"}}
    path = str(picks(folder, {**said, "nothing": {"pick": "keep"}}))
    assert ids(invoke, "--picks", path) == ["a"]
    assert ids(invoke, "--picks", path, "--picked", "reject") == ["b"]
    ended = invoke("jobs", folder, "--picks", path, "--picked", "any")
    assert "warning: picks.json: picks of jobs that the folder does not have" in ended.err
    assert "of images that were replaced since do not count: story" in ended.err


def test_parquet_csv_and_json_say_the_same(invoke: Invoke, folder: Path) -> None:
    for name in ("jobs.parquet", "jobs.csv", "jobs.json"):
        ended = invoke("jobs", folder, "--output", name)
        assert (ended.code, ended.out, ended.err) == (0, "", f"{name}: 5 jobs\n")
    table = pq.read_table("jobs.parquet")
    assert table.column_names == list(ALL)
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == ["a", "b", "c\x1b[31m", "edit", "story"]
    assert (rows[0]["tags"], rows[0]["matrix"]) == (["sky"], '{"light": "dawn"}')
    assert (rows[1]["max_think_tokens"], rows[1]["cfg_interval"]) == (64, [0.0, 1.0])
    from_json = json.loads(Path("jobs.json").read_text())
    assert [row | {"started_at": 0, "finished_at": 0} for row in from_json] == [
        row | {"started_at": 0, "finished_at": 0} for row in rows
    ]
    from_csv = list(csv.DictReader(io.StringIO(Path("jobs.csv").read_text())))
    assert [row["prompt"] for row in from_csv] == [row["prompt"] for row in rows]
    assert json.loads(from_csv[4]["image_paths"]) == rows[4]["image_paths"]
    assert from_csv[2]["finish_reason"] == ""


def test_columns_may_be_the_text_and_values_of_the_matrix(invoke: Invoke, folder: Path) -> None:
    out = invoke("jobs", folder, "--format", "csv", "--columns", "id, light,artist,text").out
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["light"], row["artist"]) for row in rows[:2]] == [("dawn", "Ann"), ("noon", "")]
    assert rows[1]["text"].startswith("thinking in ")
    assert invoke("jobs", folder, "--columns", "id,light").out.splitlines()[0].split() == [
        "id",
        "light",
    ]
    invoke("jobs", folder, "--columns", "id,light", "--output", "x.parquet")
    assert pq.read_table("x.parquet")["light"].to_pylist()[:3] == ["dawn", "noon", None]


def test_list_of_no_job_is_an_empty_list(invoke: Invoke, folder: Path) -> None:
    assert invoke("jobs", folder, "--tag", "none", "--json").json == []
    invoke("jobs", folder, "--tag", "none", "--output", "none.parquet")
    assert pq.read_table("none.parquet").num_rows == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--where", "statu = 1"], "found 'statu'; did you mean 'status'?"),
        (["--columns", "id,ligth"], "found 'ligth'; did you mean 'light'?"),
        (["--columns", "id,seed,id"], "--columns: expected each name once, found 'id' again"),
        (["--matrix", "light"], "--matrix: expected NAME=VALUE, found 'light'"),
        (["--matrix", "ligth=noon"], "expected one of light, found 'ligth'; did you mean 'light'?"),
        (["--picked", "reject"], "--picked: expected --picks FILE beside it"),
        (["--picks", "none.json"], "none.json: cannot be read: No such file"),
        (["--dedupe-distance", "3"], "--dedupe-distance: expected --dedupe beside it"),
        (["--dedupe", "--dedupe-distance", "65"], "expected a number of at most 32, found 65"),
        (["--output", "x.txt"], "expected a name that ends in .json, .csv or .parquet"),
        (["--format", "parquet"], "expected --output FILE"),
        (["--json", "--format", "csv"], "--json: expected no --format csv"),
        (["--output", "x.json", "--format", "table"], "found table"),
        (["--status", "finished"], "--status: expected pending, done, failed, held or blocked, fo"),
        (
            ["--finish-reason", "limit"],
            "--finish-reason: expected complete, token_limit, max_images, stopped_empty or "
            "unfinished_thought, found 'limit'",
        ),
    ],
)
def test_what_cannot_be_listed_is_said_at_once(
    invoke: Invoke, folder: Path, args: list[str], said: str
) -> None:
    ended = invoke("jobs", folder, *args)
    assert ended.code == 2
    assert said in ended.err
    assert "Traceback" not in ended.err


def test_file_that_cannot_be_written_ends_as_output_does(invoke: Invoke, folder: Path) -> None:
    Path("x.csv").mkdir()
    ended = invoke("jobs", folder, "--output", "x.csv")
    assert (ended.code, ended.out) == (74, "")
    assert "x.csv: expected a file, found a folder" in ended.err
