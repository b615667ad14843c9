"""Input images are read again as they were, or the job fails."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensebatch.errors import JobError
from sensebatch.jobs import InputImage
from sensebatch.manifest.inputs import InputReader, read_input_image

NUM_ROWS = 100


def content(row: int, index: int) -> bytes:
    return f"image {index} of row {row}".encode()


def image(path: Path, row: int, index: int = 0, column: str = "images") -> InputImage:
    digest = hashlib.sha256(content(row, index)).hexdigest()
    return InputImage(path=str(path), member=(row, column, index), sha256=digest, height=1, width=1)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inputs") / "jobs.parquet"
    lists = [[{"bytes": content(row, index)} for index in (0, 1)] for row in range(NUM_ROWS)]
    singles = [{"bytes": content(row, 0)} for row in range(NUM_ROWS)]
    pq.write_table(pa.table({"images": lists, "image": singles}), path, row_group_size=33)
    return path


rows = st.lists(st.tuples(st.integers(0, NUM_ROWS - 1), st.sampled_from([0, 1])), max_size=12)


@settings(max_examples=40)
@given(asked=rows)
def test_members_are_read_in_any_order(table: Path, asked: list[tuple[int, int]]) -> None:
    reader = InputReader()
    for row, index in asked:
        assert reader.read(image(table, row, index)) == content(row, index)
        if index == 0:
            assert reader.read(image(table, row, column="image")) == content(row, 0)
    reader.close()


def test_a_row_group_is_not_held_as_a_whole(tmp_path: Path) -> None:
    images = [random.Random(row).randbytes(4096) for row in range(4096)]
    path = tmp_path / "jobs.parquet"
    table = pa.table({"image": [{"bytes": image} for image in images]})
    pq.write_table(table, path, write_batch_size=32)
    del table
    reader, before = InputReader(), pa.total_allocated_bytes()
    for row in (0, 2000):
        sha256 = hashlib.sha256(images[row]).hexdigest()
        known = replace(image(path, row, column="image"), sha256=sha256)
        assert reader.read(known) == images[row]
        assert pa.total_allocated_bytes() - before < path.stat().st_size / 2
    reader.close()


def test_one_read_needs_no_reader(table: Path) -> None:
    assert read_input_image(image(table, 70, 1)) == content(70, 1)


def test_a_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content(0, 0))
    known = replace(image(path, 0), member=None)
    assert read_input_image(known) == content(0, 0)
    path.write_bytes(b"another")
    with pytest.raises(JobError, match=r"as it was when the manifest was read.*found other bytes"):
        read_input_image(known)
    path.unlink()
    with pytest.raises(JobError, match=r"a\.png, found: .*No such file"):
        read_input_image(known)


def test_members_that_are_missing_fail_the_job(table: Path, tmp_path: Path) -> None:
    known = image(table, 3)
    for changed, message in [
        (replace(known, member=(NUM_ROWS, "images", 0)), "no longer has a row 100"),
        (replace(known, member=(3, "photos", 0)), "column 'photos'"),
        (replace(known, member=(3, "images", 2)), r"row 3: images\[2\], found no bytes"),
        (replace(known, member=(4, "images", 0)), "found other bytes"),
        (replace(known, path=str(tmp_path / "none.parquet")), "No such file"),
    ]:
        with pytest.raises(JobError, match=message):
            read_input_image(changed)


def test_a_manifest_that_is_no_parquet_any_more_fails_the_job(tmp_path: Path) -> None:
    path = tmp_path / "jobs.parquet"
    path.write_bytes(b"text")
    with pytest.raises(JobError, match="is not a Parquet file"):
        read_input_image(image(path, 0))


def test_a_reader_recovers_from_a_bad_file(table: Path, tmp_path: Path) -> None:
    reader = InputReader()
    with pytest.raises(JobError):
        reader.read(image(tmp_path / "none.parquet", 0))
    assert reader.read(image(table, 5)) == content(5, 0)
    reader.close()
