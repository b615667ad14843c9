"""What the real `datasets` and `webdataset` read of an export. They take a second to import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sensebatch.dataset.selection import Selection
from sensebatch.export.splits import parse_splits
from sensebatch.tasks import Task
from tests.export.folders import (
    expected_columns,
    export_folder,
    make_folder,
    mixed_jobs,
    records_of,
)

LEAVES_FILES_OPEN = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
"""webdataset does not close what it has read to the end."""

TASKS = ("t2i", "edit", "interleave", "ask")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with jobs of all tasks."""
    folder = tmp_path_factory.mktemp("mixed")
    return make_folder(folder / "run", mixed_jobs(folder / "inputs"))


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, which asks no network and prints no bars."""
    found = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    found.disable_progress_bars()
    return found


def loaded(datasets: Any, out: Path, cache: Path) -> dict[str, dict[str, Any]]:
    """Returns the rows of every subset by id, their images as bytes."""
    assert sorted(datasets.get_dataset_config_names(str(out))) == sorted(TASKS)
    rows: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        (split,) = datasets.load_dataset(str(out), task, cache_dir=str(cache)).values()
        for column, feature in split.features.items():
            if isinstance(feature, datasets.Image):
                split = split.cast_column(column, datasets.Image(decode=False))
        rows |= {row["id"]: row for row in split}
    return rows


def image_bytes(image: dict[str, Any]) -> bytes:
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


@pytest.mark.parametrize("name", ["hf", "imagefolder"])
def test_load_dataset_gives_what_the_log_has(
    name: str, mixed: Path, tmp_path: Path, datasets: Any
) -> None:
    export_folder(mixed, tmp_path / "out", format=name)
    rows = loaded(datasets, tmp_path / "out", tmp_path / "cache")
    records = records_of(mixed)
    assert rows.keys() == records.keys()
    for job_id, record in records.items():
        expected = expected_columns(record)
        assert {column: rows[job_id][column] for column in expected} == expected
        drawn = rows[job_id].get("image") or rows[job_id].get("output")
        if drawn is not None:
            assert image_bytes(drawn) == record.image_files[0].read_bytes()


def test_card_that_a_person_changed_still_opens_every_subset(
    mixed: Path, tmp_path: Path, datasets: Any
) -> None:
    out = tmp_path / "out"
    export_folder(mixed, out, selection=Selection(tasks=[Task.EDIT]))
    (out / "README.md").write_text((out / "README.md").read_text() + "\nMy own words.\n")
    assert export_folder(mixed, out).card == "updated"
    assert loaded(datasets, out, tmp_path / "cache").keys() == records_of(mixed).keys()


def test_images_of_lists_and_stories_are_images(mixed: Path, tmp_path: Path, datasets: Any) -> None:
    from PIL import Image

    for name in ("hf", "imagefolder"):
        out = tmp_path / name
        export_folder(mixed, out, format=name)
        cache = str(tmp_path / "cache")
        (edits,) = datasets.load_dataset(str(out), "edit", cache_dir=cache).values()
        sizes = [[image.size for image in row["input_images"]] for row in edits]
        assert sizes == [[(64, 32)], [(64, 32), (64, 32)]]
        (stories,) = datasets.load_dataset(str(out), "interleave", cache_dir=cache).values()
        for row in stories:
            parts = [part["image"] for part in row["parts"] if part["type"] == "image"]
            images = parts if name == "hf" else [row["images"][number] for number in parts]
            assert len(images) > 1
            assert all(isinstance(image, Image.Image) for image in images)


def test_set_opens_without_a_name_and_with_its_splits(
    mixed: Path, tmp_path: Path, datasets: Any
) -> None:
    export_folder(mixed, tmp_path / "out", splits=parse_splits("train=0.5,test=0.5"))
    found = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert sorted(found) == ["test", "train"]
    assert "prompt" in found["train"].features


def test_files_are_as_datasets_writes_them(mixed: Path, tmp_path: Path, datasets: Any) -> None:
    import pyarrow.parquet as pq

    export_folder(mixed, tmp_path / "out")
    for task in TASKS:
        ours = tmp_path / "out" / task / "train-00000.parquet"
        split = datasets.Dataset.from_parquet(str(ours), cache_dir=str(tmp_path / "cache"))
        split.to_parquet(str(tmp_path / "theirs.parquet"))
        left, right = (pq.ParquetFile(path) for path in (ours, tmp_path / "theirs.parquet"))
        assert left.schema_arrow.equals(right.schema_arrow)
        features = [
            json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
            for file in (left, right)
        ]
        assert features[0] == features[1]
        assert (
            left.metadata.metadata[b"content_defined_chunking"]
            == (right.metadata.metadata[b"content_defined_chunking"])
        )
        for number in range(left.metadata.num_columns):
            ours_column, theirs = (
                file.metadata.row_group(0).column(number) for file in (left, right)
            )
            for fact in ("path_in_schema", "compression", "has_column_index", "has_offset_index"):
                assert getattr(ours_column, fact) == getattr(theirs, fact)
            assert set(ours_column.encodings) == set(theirs.encodings)
            assert ours_column.has_offset_index


@LEAVES_FILES_OPEN
def test_webdataset_reads_what_the_log_has(mixed: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    export_folder(mixed, tmp_path, format="webdataset")
    records = records_of(mixed)
    seen: dict[str, Any] = {}
    for task in TASKS:
        found = webdataset.WebDataset(str(tmp_path / task / "train-00000.tar"), shardshuffle=False)
        keys = []
        for sample in found:
            keys.append(sample["__key__"])
            values = json.loads(sample["json"])
            record = records[values["id"]]
            seen[record.id] = values
            expected = expected_columns(record)
            assert {column: values[column] for column in expected} == expected
            assert sample["txt"].decode() == record.job.prompt
            own = values.get("image") or values.get("output")
            parts = [part["image"] for part in values.get("parts", []) if part["image"]]
            names = [own] if own else parts
            drawn = [file.read_bytes() for file in record.image_files]
            assert [sample[name] for name in names] == drawn
            inputs = [sample[name] for name in values.get("input_images", [])]
            assert inputs == [Path(image.path).read_bytes() for image in record.job.images]
        assert len(set(keys)) == len(keys)
        assert not any("." in key for key in keys)
    assert seen.keys() == records.keys()


@LEAVES_FILES_OPEN
def test_webdataset_decodes_images(mixed: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    export_folder(mixed, tmp_path, format="webdataset")
    shard = str(tmp_path / "t2i" / "train-00000.tar")
    for sample in webdataset.WebDataset(shard, shardshuffle=False).decode("pil"):
        assert sample["png"].size == (64, 32)
