"""What happens to images that are converted, and to those that are not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sensebatch.config import OutputConfig
from sensebatch.export.images import Conversion
from sensebatch.store.images import read_metadata
from tests.executor.fakes import make_config, make_job, run_folder
from tests.export.folders import (
    export_folder,
    grid,
    make_folder,
    mixed_jobs,
    parquet_rows,
    records_of,
)


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_images_in_another_format_keep_size_and_metadata(image_format: str, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "run", grid(2))
    conversion = Conversion(image_format=image_format, image_quality=100)
    export_folder(root, tmp_path / "out", conversion=conversion)
    records = records_of(root)
    for row in parquet_rows(tmp_path / "out"):
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        original = Image.open(records[row["id"]].image_files[0])
        assert (image.format, image.size) == (image_format.upper(), (64, 32))
        assert row["image"]["path"].endswith({"jpeg": ".jpg"}.get(image_format, image_format))
        assert read_metadata(image) == read_metadata(original)
        assert b"trainedAlgorithmicMedia" in image.info["xmp"]
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(original)).mean()
        assert difference < 3


def test_images_that_need_no_change_are_copied(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "run", grid(1))
    conversion = Conversion(image_format="png", max_side=64)
    export_folder(root, tmp_path / "out", conversion=conversion)
    (row,) = parquet_rows(tmp_path / "out")
    assert row["image"]["bytes"] == records_of(root)["image-0000"].image_files[0].read_bytes()


def test_larger_images_are_made_smaller_inputs_too(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "run", mixed_jobs(tmp_path / "inputs"))
    export_folder(root, tmp_path / "out", conversion=Conversion(max_side=16))
    row = next(row for row in parquet_rows(tmp_path / "out") if row["id"] == "edit-two")
    for image in (row["output"], *row["input_images"]):
        assert Image.open(io.BytesIO(image["bytes"])).size == (16, 8)
    # The log says what the run drew.
    assert (row["width"], row["height"]) == (64, 32)


def test_format_of_the_run_is_kept(tmp_path: Path) -> None:
    config = make_config(output=OutputConfig(image_format="webp", embed_metadata=False))
    run_folder(tmp_path / "run", [make_job("a")], config)
    export_folder(tmp_path / "run", tmp_path / "out", conversion=Conversion(max_side=32))
    (row,) = parquet_rows(tmp_path / "out")
    image = Image.open(io.BytesIO(row["image"]["bytes"]))
    assert (image.format, row["image"]["path"]) == ("WEBP", "a.webp")
    assert "xmp" not in image.info
