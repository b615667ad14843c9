"""Reading: tasks, files together, limits, upstream forms, and what happens to broken files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sensebatch.config import RunConfig
from sensebatch.errors import ManifestError
from sensebatch.jobs import Source
from sensebatch.manifest.one import job_from_fields
from sensebatch.manifest.read import manifest_name, read_manifest, read_manifests
from sensebatch.tasks import Task
from tests.manifest.conftest import Mistakes, ReadRows, WriteJsonl


def tasks_of(read_rows: ReadRows, *rows: dict[str, Any], **options: Any) -> list[str]:
    return [str(job.task) for job in read_rows(*rows, **options)]


def test_the_task_is_decided_row_by_row(read_rows: ReadRows, draw_input: Any) -> None:
    image = draw_input()
    rows = [
        {"prompt": "a"},
        {"prompt": "b", "image": image},
        {"prompt": "c", "image": image, "task": "interleave"},
        {"prompt": "d", "type": "interleave"},
        {"prompt": "e", "image": []},
    ]
    assert tasks_of(read_rows, *rows) == ["t2i", "edit", "interleave", "interleave", "t2i"]


def test_a_task_asked_for_wins_over_a_derived_one(read_rows: ReadRows, draw_input: Any) -> None:
    row = {"prompt": "a", "image": draw_input()}
    assert tasks_of(read_rows, row, task=Task.INTERLEAVE) == ["interleave"]


def test_a_row_of_another_task_than_asked_for_is_a_mistake(mistakes: Mistakes) -> None:
    found = mistakes({"prompt": "a", "task": "t2i"}, task=Task.INTERLEAVE)
    assert found == ["line 1: task: expected interleave, as asked for, found t2i"]


UPSTREAM: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"prompt": "A cat", "width": 256, "height": 192, "seed": 7, "think_mode": True},
        {"prompt": "A cat", "seed": 7, "think": True, "task": Task.T2I},
    ),
    ({"prompt": "A cat", "type": "portrait"}, {"metadata": {"type": "portrait"}}),
    ({"prompt": "Redder", "image": "in.png", "type": "edit"}, {"task": Task.EDIT, "metadata": {}}),
    ({"prompt": "Redder", "image": ["in.png", "in.png"]}, {"task": Task.EDIT}),
    ({"prompt": "Redder", "images": "in.png"}, {"task": Task.EDIT}),
    (
        {
            "images": ["in.png"],
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "<image> redder", "extra": 1},
                {"from": "gpt", "value": "done"},
            ],
        },
        {"prompt": "<image> redder", "system_prompt": "Be brief.", "task": Task.EDIT},
    ),
    ({"id": 12, "prompt": "A cat"}, {"id": "12"}),
]


@pytest.mark.parametrize(("row", "expected"), UPSTREAM)
def test_upstream_rows_are_read_as_they_are(
    read_rows: ReadRows, draw_input: Any, row: dict[str, Any], expected: dict[str, Any]
) -> None:
    draw_input()
    (job,) = read_rows(row)
    assert {name: getattr(job, name) for name in expected} == expected


def test_a_conversation_needs_one_question(mistakes: Mistakes) -> None:
    turn = {"from": "human", "value": "a"}
    found = mistakes(
        {"conversations": [turn, turn]},
        {"conversations": [{"from": "user"}]},
        {"conversations": [{"from": "gpt", "value": "a"}]},
        {"conversations": [turn | {"value": "<image>?"}]},
    )
    assert found == [
        "line 1: conversations: expected one turn from 'human' or 'user', found 2; ask jobs alone "
        "take earlier turns",
        "line 2: conversations[0].value: expected a value, found nothing",
        "line 3: conversations: expected one turn from 'human' or 'user', found 0",
        "line 4: conversations: expected at most one <image> mark per image, found 1 mark and 0 "
        "images",
    ]


def test_ids_collide_across_files(write_jsonl: WriteJsonl, config: RunConfig) -> None:
    paths = [write_jsonl({"id": "a", "prompt": "x"}, name=name) for name in ("1.jsonl", "2.jsonl")]
    with pytest.raises(ManifestError) as caught:
        list(read_manifests(paths, config))
    (problem,) = caught.value.problems
    assert problem.file == str(paths[1])
    assert f"{paths[0]}: line 1" in problem.message


def test_jobs_are_yielded_before_a_later_mistake_is_known(
    write_jsonl: WriteJsonl, config: RunConfig
) -> None:
    jobs = read_manifest(write_jsonl({"prompt": "a"}, {"prompt": ""}), config)
    assert next(jobs).prompt == "a"
    with pytest.raises(ManifestError, match="line 2: prompt"):
        next(jobs)


def test_a_limit_stops_before_later_rows_are_read(read_rows: ReadRows, mistakes: Mistakes) -> None:
    rows = [{"prompt": "a", "n": 3}, {"prompt": ""}]
    assert len(read_rows(*rows, limit=2)) == 2
    assert len(mistakes(*rows, limit=4)) == 1
    assert read_rows(*rows, limit=0) == []


def test_a_mistake_before_the_limit_is_raised(mistakes: Mistakes) -> None:
    assert len(mistakes({"prompt": ""}, {"prompt": "a"}, {"prompt": "b"}, limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "expected a JSON object, found: Expecting property name"),
        (b'{"prompt": "a"', "expected a JSON object, found: Expecting ',' delimiter: column 15"),
        (b"[1]", "expected a JSON object, found a list of 1"),
        (b'{"prompt": "a", "prompt": "b"}', "expected a JSON object, found: 'prompt' is given tw"),
        (b'{"prompt": "a", "cfg_scale": NaN}', "expected a JSON object, found: NaN is not JSON"),
        (b'{"prompt": "\\ud800"}', "expected a JSON object, found: half of a surrogate pair"),
        (b'{"prompt": "\xff"}', "expected a JSON object, found: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "expected a JSON object, found: values nested more than 100 deep"),
    ],
)
def test_a_broken_line_is_a_mistake_and_the_rest_is_read(
    tmp_path: Path, config: RunConfig, line: bytes, message: str
) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "first"}\n\n' + line + b'\r\n{"prompt": "last"}')
    jobs = read_manifest(path, config)
    assert [next(jobs).prompt, next(jobs).prompt] == ["first", "last"]
    with pytest.raises(ManifestError) as caught:
        next(jobs)
    (problem,) = caught.value.problems
    assert problem.row == "line 3"
    assert problem.message.startswith(message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "manifest: expected a file, found none"),
        ("empty.jsonl", b"\n", "manifest: expected at least one job, found none"),
        ("jobs.csv", b"", "manifest: expected a manifest that ends in one of .yaml, .yml, .jsonl"),
        ("bad.parquet", b"PAR1", "manifest: expected a Parquet file, found an error: "),
        ("none.yaml", b"jobs: [{prompt: a}]", "line 1: version: expected 1, found nothing"),
        ("bad.yaml", b"\xff", "line 1: expected UTF-8 text, found byte 0xff"),
    ],
)
def test_a_file_that_is_not_a_manifest_is_one_error(
    tmp_path: Path, config: RunConfig, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ManifestError) as caught:
        list(read_manifest(path, config))
    (problem,) = caught.value.problems
    assert str(problem).startswith(f"{path}: {message}")


def test_a_folder_is_no_manifest(tmp_path: Path, config: RunConfig) -> None:
    folder = tmp_path / "a.jsonl"
    folder.mkdir()
    with pytest.raises(ManifestError, match=r"manifest: expected a file, found a folder$"):
        list(read_manifest(folder, config))


@pytest.mark.parametrize("suffix", ["yaml", "jsonl", "parquet"])
def test_manifest_that_is_a_pipe_is_named_and_not_waited_for(
    tmp_path: Path, config: RunConfig, suffix: str
) -> None:
    path = tmp_path / f"jobs.{suffix}"
    os.mkfifo(path)
    with pytest.raises(ManifestError, match=r"manifest: expected a file, found a device or pipe$"):
        list(read_manifest(path, config))


def test_the_name_is_the_stem_and_several_are_joined(tmp_path: Path) -> None:
    assert manifest_name([tmp_path / "night.jsonl"]) == "night"
    assert manifest_name([tmp_path / "a.parquet", tmp_path / "b.jsonl"]) == "a+b"
    many = [tmp_path / f"{index:050d}.jsonl" for index in range(4)]
    assert manifest_name(many) == f"{0:050d}+3-more"


def test_a_stem_that_cannot_name_a_folder_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="a file name that does not start with '-'"):
        manifest_name([tmp_path / "-a.jsonl"])


SOURCE = Source(file="command line", row="flags")


def test_one_job_is_made_by_the_same_rules(
    config: RunConfig, read_rows: ReadRows, draw_input: Any, tmp_path: Path
) -> None:
    fields = {"prompt": "Redder", "image": draw_input(), "num_steps": 3, "seed": None}
    job = job_from_fields(fields, config, source=SOURCE, base=tmp_path)
    (same,) = read_rows({"prompt": "Redder", "image": "in.png", "num_steps": 3})
    assert job.source == SOURCE
    assert job.task is Task.EDIT
    assert (job.id, job.images, job.sampling) == (same.id, same.images, same.sampling)


def test_one_job_refuses_arguments_that_are_no_text(config: RunConfig) -> None:
    with pytest.raises(ManifestError, match="flags: prompt: expected Unicode text"):
        job_from_fields({"prompt": "a\udcff"}, config, source=SOURCE)


def test_one_job_reports_every_mistake_at_its_source(config: RunConfig) -> None:
    with pytest.raises(ManifestError) as caught:
        job_from_fields({"prompt": "", "seeds": [1], "width": 3}, config, source=SOURCE)
    assert [str(problem) for problem in caught.value.problems] == [
        "command line: flags: seeds: expected one job, found a field that makes several",
        "command line: flags: prompt: expected text, found ''",
        "command line: flags: height: expected a number of pixels beside width, found nothing",
    ]
