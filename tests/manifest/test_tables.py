"""The same table is read alike from JSONL, YAML and Parquet, whichever tool wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sensebatch.config import RunConfig
from sensebatch.errors import ManifestError
from sensebatch.jobs import Job, Source
from sensebatch.manifest.read import read_manifest
from sensebatch.yaml_values import dump_yaml

Row = dict[str, Any]
Read = Callable[..., list[Job]]


@pytest.fixture
def read(tmp_path: Path, config: RunConfig) -> Read:
    """Reads rows, or a table's columns, of one format; jobs come without the place of their row."""

    def read(rows: list[Row] | dict[str, Any], kind: str = "parquet", **metadata: Any) -> list[Job]:
        path = tmp_path / f"jobs.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif kind == "yaml":
            path.write_text(dump_yaml({"version": 1, "jobs": rows}))
        else:
            table = pa.Table.from_pylist(rows) if isinstance(rows, list) else pa.table(rows)
            pq.write_table(table.replace_schema_metadata(metadata or None), path)
        nowhere = Source(file="", row="")
        return [replace(job, source=nowhere) for job in read_manifest(path, config)]

    return read


def mistakes(read: Read, rows: Any, kind: str = "parquet") -> list[str]:
    with pytest.raises(ManifestError) as caught:
        read(rows, kind)
    return [f"{p.row}: {p.field}: {p.message}" for p in caught.value.problems]


ROWS: list[Row] = [
    {
        "id": 7,
        "prompt": "a",
        "seed": 3.0,
        "num_steps": 4.0,
        "cfg_scale": 2,
        "width": 64.0,
        "height": 64,
    },
    {
        "id": 8.0,
        "prompt": "b",
        "seed": None,
        "num_steps": 5.0,
        "cfg_scale": 1.5,
        "width": 32,
        "height": 96,
    },
    {"id": "c", "prompt": "c", "seeds": [1.0, 2.0], "metadata": '{"a": {"b": [1, null]}}'},
    {"id": "d", "prompt": "d {x}", "matrix": {"seed": [1.0, 2.0], "x": ["u"]}},
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["id"]))
def test_every_format_makes_the_same_jobs(read: Read, row: Row) -> None:
    of_jsonl, of_yaml, of_parquet = (read([row], kind) for kind in ("jsonl", "yaml", "parquet"))
    assert of_jsonl == of_yaml == of_parquet
    assert of_jsonl[0].id.split("-")[0] == str(row["id"]).removesuffix(".0")


@pytest.mark.parametrize("kind", ["jsonl", "yaml", "parquet"])
def test_numbers_that_are_not_whole_stay_mistakes(read: Read, kind: str) -> None:
    (found,) = mistakes(read, [{"prompt": "a", "num_steps": 4.5}], kind)
    assert found.endswith("num_steps: expected a whole number, found 4.5")


TIMES: list[tuple[pa.DataType, Any, Any]] = [
    (pa.timestamp("us"), datetime(2026, 1, 2, 3, 4, 5), "2026-01-02T03:04:05"),
    (
        pa.timestamp("ms", tz="UTC"),
        datetime(2026, 1, 2, tzinfo=UTC),
        "2026-01-02T00:00:00+00:00",
    ),
    (pa.timestamp("ns"), 1_767_323_045_123_456_789, "2026-01-02T03:04:05.123456789"),
    (pa.timestamp("ms"), 253_402_300_800_000, "10000-01-01T00:00:00.000"),
    (pa.date32(), date(2026, 1, 2), "2026-01-02"),
    (pa.time64("us"), time(3, 4, 5), "03:04:05"),
    (pa.duration("s"), timedelta(minutes=2), 120.0),
    (pa.decimal128(20, 2), Decimal("1.50"), 1.5),
    (pa.decimal128(38, 0), Decimal(2**62 + 1), 2**62 + 1),
    (pa.float64(), float("nan"), None),
    (pa.large_string(), "long", "long"),
    (pa.dictionary(pa.int8(), pa.string()), "word", "word"),
    (pa.map_(pa.string(), pa.int64()), [("a", 1), ("b", None)], {"a": 1, "b": None}),
    (pa.map_(pa.int64(), pa.string()), [(1, "x")], {"1": "x"}),
    (pa.list_(pa.struct([("d", pa.date32())])), [{"d": date(2026, 1, 2)}], [{"d": "2026-01-02"}]),
    (pa.list_(pa.float32(), 2), [1.0, 2.0], [1.0, 2.0]),
    (pa.large_list(pa.int8()), [1], [1]),
    (pa.null(), None, None),
]


@pytest.mark.parametrize(("kind", "value", "expected"), TIMES, ids=lambda value: str(value)[:30])
def test_metadata_of_every_type_is_what_json_would_hold(
    read: Read, kind: pa.DataType, value: Any, expected: Any
) -> None:
    column = pa.array([{"x": {"y": value}}], pa.struct([("x", pa.struct([("y", kind)]))]))
    (job,) = read({"prompt": ["a"], "metadata": column})
    assert job.metadata == {"x": {"y": expected}}


def test_a_map_of_anything_is_metadata(read: Read) -> None:
    kind = pa.map_(pa.string(), pa.timestamp("s"))
    column = pa.array([[("taken", datetime(2026, 1, 2))]], kind)
    (job,) = read({"prompt": ["a"], "metadata": column})
    assert job.metadata == {"taken": "2026-01-02T00:00:00"}


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([12], pa.decimal128(38, 0)), "12"),
        (pa.array([12.0]), "12"),
        (pa.array([UUID(int=5).bytes], pa.uuid()), str(UUID(int=5))),
        (pa.array(["x"]).dictionary_encode(), "x"),
        (pa.array(["x"], pa.large_string()), "x"),
    ],
    ids=lambda value: str(getattr(value, "type", value)),
)
def test_an_id_may_be_of_any_type_that_databases_have(
    read: Read, column: pa.Array, expected: str
) -> None:
    (job,) = read({"id": column, "prompt": ["a"]})
    assert job.id == expected


def test_a_cell_that_cannot_be_read_is_one_mistake_with_row_and_column(read: Read) -> None:
    broken = pa.array([b"fine", b"a\xff"]).view(pa.string())
    inside = pa.array([{"k": "v"}, {"k": "w"}])
    inside = pa.StructArray.from_arrays([broken], ["k"])
    assert mistakes(read, {"prompt": ["a", "b"], "metadata": inside}) == [
        "row 1: metadata.k: expected a value that JSON can hold, found a cell that cannot be read "
        "('utf-8' codec can't decode byte 0xff in position 1: invalid start byte)"
    ]
    seed = pa.array([1_767_323_045_123_456_789], pa.timestamp("ns"))
    assert mistakes(read, {"prompt": ["a"], "seed": seed}) == [
        "row 0: seed: expected a whole number, found '2026-01-02T03:04:05.123456789'"
    ]


def test_the_index_that_pandas_added_is_not_a_field(read: Read) -> None:
    columns = {"prompt": ["a"], "__index_level_0__": [5]}
    said = {"pandas": json.dumps({"index_columns": ["__index_level_0__"]})}
    assert len(read(columns, **said)) == 1
    (found,) = mistakes(read, columns)
    assert found.startswith("row 0: __index_level_0__: column: expected a known field")
    index = [{"kind": "range", "start": 0}]
    assert len(read({"prompt": ["a"]}, pandas=json.dumps({"index_columns": index}))) == 1
    assert len(read({"prompt": ["a"]}, pandas="[" * 3000)) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"negative_prompt": "x"}, "found 'negative_prompt'; there are no negative prompts"),
        ({"cfg_weight": 2}, "found 'cfg_weight'; it is called 'cfg_scale' here"),
        ({"num_images": 2}, "found 'num_images'; it is called 'n' here"),
        ({"guidance_scale": 2}, "found 'guidance_scale'; it is called 'cfg_scale' here"),
        ({"sed": 2}, "found 'sed'; did you mean 'seed'?"),
        ({"frobnicate": 2}, "found 'frobnicate'"),
        ({"max_image": 2}, "found 'max_image'"),
    ],
)
def test_suggestions_are_fields_of_the_task_that_mean_the_same(
    read: Read, fields: Row, message: str
) -> None:
    (found,) = mistakes(read, [{"prompt": "a", **fields}], "jsonl")
    assert found.endswith(message) or ("negative" in message and message in found)


def test_a_misspelled_prompt_is_one_mistake(read: Read) -> None:
    assert len(mistakes(read, [{"promt": "a"}], "jsonl")) == 1


def test_an_error_in_an_image_struct_names_what_it_may_hold(read: Read) -> None:
    (found,) = mistakes(read, {"prompt": ["a"], "image": [{"path": "a.png", "width": 5}]})
    assert found == "row 0: image.width: expected a known field, found 'width'"


def test_no_mistake_hides_another_one(read: Read) -> None:
    rows = [
        {"id": "a/b", "prompt": "", "num_steps": 0, "image": "none.png", "width": 33, "height": 32},
        {"prompt": "{x} {y", "matrix": {"x": [1, 1]}, "cfg_scale": -1, "task": "t2i", "image": "a"},
        {"prompt": "a", "n": 3, "seeds": [1], "think": 1, "resolution": "huge"},
    ]
    assert [found.split(": exp")[0] for found in mistakes(read, rows, "jsonl")] == [
        "line 1: num_steps",
        "line 1: prompt",
        "line 1: image",
        "line 1: width",
        "line 1: id",
        "line 2: matrix.x",
        "line 2: cfg_scale",
        "line 2: image",
        "line 3: seeds",
        "line 3: think",
        "line 3: resolution",
    ]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n": 2_147_483_647}, "n"),
        ({"matrix": {"seed": list(range(2000)), "num_steps": list(range(1, 1001))}}, "matrix"),
    ],
)
def test_more_jobs_of_a_row_than_anyone_can_check_are_refused_at_once(
    read: Read, fields: Row, field: str
) -> None:
    (found,) = mistakes(read, [{"prompt": "a", **fields}], "jsonl")
    assert found.startswith(f"line 1: {field}: expected at most 1,000,000 jobs of a row, found 2,")


@pytest.mark.parametrize("kind", ["jsonl", "yaml", "parquet"])
def test_what_a_check_does_not_say_is_a_null_in_tables(read: Read, kind: str) -> None:
    check = {"ask": "red?", "choices": ["yes", "no"], "is": "yes"}
    nothing = dict.fromkeys([*check, "at_least"])
    rows: list[Row] = [
        {"id": "a", "prompt": "a", "tries": 1, "accept": [{**check, "at_least": None}]},
        {"id": "b", "prompt": "b", "tries": 1, "accept": [{**check, "at_least": 0.8}]},
        {"prompt": "c", "accept": nothing if kind != "parquet" else None},
    ]
    plain = [{**rows[0], "accept": [check]}, rows[1], {"prompt": "c"}]
    jobs = read(rows, kind)
    assert jobs == read(plain, "jsonl")
    assert [job.verdict.at_least for job in jobs if job.verdict] == [0.5, 0.8]
