"""Parquet manifests: columns of every shape, images inside, and a million rows in little memory."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sensebatch.config import RunConfig
from sensebatch.errors import ManifestError
from sensebatch.jobs import Job
from sensebatch.manifest.inputs import read_input_image
from sensebatch.manifest.read import read_manifest
from sensebatch.tasks import Task
from tests.manifest.test_images import encoded

ReadTable = Callable[..., list[Job]]


@pytest.fixture
def read_table(tmp_path: Path, config: RunConfig) -> ReadTable:
    def read(columns: dict[str, Any], **options: Any) -> list[Job]:
        path = tmp_path / "jobs.parquet"
        pq.write_table(pa.table(columns), path, **options)
        return list(read_manifest(path, config))

    return read


def test_a_row_is_a_job_and_null_is_absent(read_table: ReadTable) -> None:
    first, second = read_table(
        {
            "id": [7, 8],
            "prompt": ["a", "b"],
            "task": [None, "interleave"],
            "seed": pa.array([1.0, None], pa.float64()),
            "cfg_interval": [[0.25, 0.5], None],
            "max_images": [None, 3],
            "tags": [["x"], None],
        }
    )
    assert (first.id, first.task, first.seed) == ("7", Task.T2I, 1)
    assert first.sampling.cfg_interval == (0.25, 0.5)
    assert first.metadata == {"tags": ["x"]}
    assert (second.seed, second.sampling.max_images) == (42, 3)
    assert [job.source.row for job in (first, second)] == ["row 0", "row 1"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([{"k": "v"}]),
        pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())),
        pa.array(['{"k": "v"}']),
    ],
)
def test_metadata_may_be_a_struct_a_map_or_json(read_table: ReadTable, column: pa.Array) -> None:
    (job,) = read_table({"prompt": ["a"], "metadata": column})
    assert job.metadata == {"k": "v"}


def test_seeds_and_a_matrix_work_in_columns(read_table: ReadTable) -> None:
    jobs = read_table({"prompt": ["{x}"], "matrix": ['{"x": ["a", "b"]}'], "seeds": [[1, 2]]})
    assert [(job.prompt, job.seed) for job in jobs] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("listed", [False, True])
def test_images_may_be_inside_or_beside_the_manifest(
    read_table: ReadTable, tmp_path: Path, column: str, listed: bool
) -> None:
    content = encoded("JPEG")
    (tmp_path / "beside.jpg").write_bytes(content)
    inside: Any = {"bytes": content, "path": "missing.jpg"}
    beside: Any = {"bytes": None, "path": "beside.jpg"}
    values = [[inside], [beside]] if listed else [inside, beside]
    first, second = read_table({"prompt": ["a", "b"], column: values})
    assert first.images[0].member == (0, column, 0)
    assert second.images[0].member is None
    assert first.images[0].sha256 == second.images[0].sha256
    assert read_input_image(first.images[0]) == read_input_image(second.images[0]) == content


EMPTY = {"bytes": None, "path": None}


def test_rows_may_mix_jobs_with_and_without_images_if_they_say_so(read_table: ReadTable) -> None:
    image = {"bytes": encoded("PNG"), "path": None}
    tasks = [None, "t2i", "t2i"]
    jobs = read_table({"prompt": ["a", "b", "c"], "image": [image, None, EMPTY], "task": tasks})
    assert [job.task for job in jobs] == [Task.EDIT, Task.T2I, Task.T2I]
    jobs = read_table({"prompt": ["a", "b"], "images": [[image], []]})
    assert [job.task for job in jobs] == [Task.EDIT, Task.T2I]


@pytest.mark.parametrize("column", ["image", "images"])
def test_an_image_that_is_missing_makes_no_other_task_of_its_row(
    read_table: ReadTable, column: str
) -> None:
    image = {"bytes": encoded("PNG"), "path": None}
    columns = {"prompt": ["a", "b", "c"], column: [image, None, EMPTY]}
    expected = "expected an image, or the task t2i for a row that needs none, found nothing"
    assert mistakes(read_table, columns) == [
        f"row 1: {column}: {expected}",
        f"row 2: {column}: {expected}",
    ]


def mistakes(read_table: ReadTable, columns: dict[str, Any]) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        read_table(columns)
    return [f"{p.row}: {p.field}: {p.message}" for p in caught.value.problems]


def test_a_mistake_has_the_number_of_its_row(read_table: ReadTable) -> None:
    found = mistakes(read_table, {"prompt": ["a"] * 3000 + [""], "seed": range(3001)})
    assert found == ["row 3000: prompt: expected text, found ''"]


def test_an_unknown_column_is_one_mistake(read_table: ReadTable) -> None:
    found = mistakes(read_table, {"prompt": ["a", "b"], "sed": [1, 2]})
    (message,) = found
    assert message.startswith("row 0: sed: column: expected a known field, found 'sed'; did you me")


def test_wrong_values_are_not_converted(read_table: ReadTable) -> None:
    found = mistakes(
        read_table,
        {"prompt": ["a"], "num_steps": [1.5], "think": ["yes"], "metadata": ["{"], "seed": ["1"]},
    )
    assert found == [
        "row 0: seed: expected a whole number, found '1'",
        "row 0: think: expected true or false, found 'yes'",
        "row 0: num_steps: expected a whole number, found 1.5",
        "row 0: metadata: expected a mapping, found '{'",
    ]


def test_gaps_and_mistakes_leave_the_other_numbers_of_a_column_whole(
    read_table: ReadTable,
) -> None:
    prompts = ["a", "b", "c"]
    (first, second, _) = read_table({"prompt": prompts, "seed": [7.0, float("nan"), 2.0**53]})
    assert (first.seed, second.seed) == (7, 42)
    found = mistakes(read_table, {"prompt": prompts, "num_steps": [8.0, 1.5, float("inf")]})
    assert found == [
        "row 1: num_steps: expected a whole number, found 1.5",
        "row 2: num_steps: expected a whole number, found inf",
    ]


def test_decimals_are_numbers(read_table: ReadTable) -> None:
    (job,) = read_table(
        {
            "prompt": ["a"],
            "seed": [Decimal(2**62 + 1)],
            "cfg_scale": [Decimal("4.5")],
            "cfg_interval": [[Decimal("0.0"), Decimal("0.5")]],
        }
    )
    assert (job.seed, job.sampling.cfg_scale) == (2**62 + 1, 4.5)
    assert job.sampling.cfg_interval == (0.0, 0.5)
    (found,) = mistakes(read_table, {"prompt": ["a"], "num_steps": [Decimal("1.5")]})
    assert found == "row 0: num_steps: expected a whole number, found 1.5"


def test_an_image_struct_of_other_names_is_an_error_and_not_a_t2i_job(
    read_table: ReadTable,
) -> None:
    (found,) = mistakes(read_table, {"prompt": ["a"], "image": [{"uri": "a.png"}]})
    assert found == "row 0: image.uri: expected a known field, found 'uri'"


def test_text_that_is_not_unicode_is_an_error(read_table: ReadTable) -> None:
    broken = pa.array([b"a\xff"]).view(pa.string())
    (found,) = mistakes(read_table, {"prompt": broken})
    assert found.startswith(
        "row 0: prompt: expected text, found a cell that cannot be read ('utf-8'"
    )
    (found,) = mistakes(read_table, {"prompt": ["a"], "metadata": ['{"a": "\\ud800"}']})
    assert found.startswith("row 0: metadata: expected a mapping, found")


def test_a_damaged_page_is_one_mistake_of_one_line(tmp_path: Path, config: RunConfig) -> None:
    path = tmp_path / "jobs.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"]}), path)
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 40 + content[44:])
    with pytest.raises(ManifestError) as raised:
        list(read_manifest(path, config))
    (problem,) = raised.value.problems
    assert problem.message.startswith("expected a readable file: ")
    assert problem.message.splitlines() == [problem.message.rstrip()]


def test_a_damaged_image_is_named(read_table: ReadTable) -> None:
    image = {"bytes": encoded("PNG")[:200], "path": "a.png"}
    (found,) = mistakes(read_table, {"prompt": ["a"], "images": [[image]]})
    assert found.startswith("row 0: images[0]: expected a complete image, found a damaged one")


def test_images_of_a_row_group_are_not_held_as_a_whole(tmp_path: Path, config: RunConfig) -> None:
    image = encoded("PNG", size=(64, 64))
    path = tmp_path / "jobs.parquet"
    images = [{"bytes": image + random.Random(row).randbytes(4096)} for row in range(2048)]
    numbers = pa.array(range(len(images)))
    table = pa.table({"id": numbers, "prompt": ["a"] * len(images), "image": images})
    pq.write_table(table, path, write_batch_size=32)
    del table
    before = pa.total_allocated_bytes()
    for job in itertools.islice(read_manifest(path, config), 40):
        assert job.task is Task.EDIT
        assert pa.total_allocated_bytes() - before < path.stat().st_size / 2


MEASURE = """
import sys
from pathlib import Path
import psutil
from sensebatch.config import default_config
from sensebatch.manifest.read import read_manifest
rss = lambda: psutil.Process().memory_info().rss // 1024
next(read_manifest(Path(sys.argv[1]), default_config()))
first = peak = rss()
count = 0
for job in read_manifest(Path(sys.argv[1]), default_config()):
    count += 1
    if count % 1000 == 0:
        peak = max(peak, rss())
print(count, peak - first)
"""


def measured_kib_per_row(path: Path, num_rows: int) -> float:
    numbers = range(num_rows)
    prompts = [f"A photograph of object {n} on a table in the morning light" * 4 for n in numbers]
    table = pa.table({"id": [f"image-{n}" for n in numbers], "prompt": prompts, "seed": numbers})
    pq.write_table(table, path)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    count, growth_kib = run.stdout.split()
    assert int(count) == num_rows
    return int(growth_kib) / num_rows


@pytest.mark.slow
def test_memory_grows_by_little_more_than_a_digest_a_row(tmp_path: Path) -> None:
    # Holding the jobs takes half as much again; this leaves room for reading ahead.
    assert measured_kib_per_row(tmp_path / "some.parquet", 60_000) < 0.6


@pytest.mark.slow
def test_a_million_rows_are_read_in_half_a_gibibyte(tmp_path: Path) -> None:
    assert measured_kib_per_row(tmp_path / "many.parquet", 1_000_000) < 0.5
