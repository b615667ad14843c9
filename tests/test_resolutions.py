"""The resize rules against the tables of the reference, errors included."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensebatch.resolutions import (
    BUCKETS_INTERLEAVE,
    BUCKETS_T2I,
    BUCKETS_TINY,
    PATCH_PIXELS,
    PixelLimits,
    Resolution,
    ResolutionError,
    edit_output_size,
    input_size,
    interleave_output_size,
    smart_resize,
)

TABLES = json.loads((Path(__file__).parent / "golden/common/resize.json").read_text())
LIMITS = PixelLimits()


def table(name: str) -> Any:
    # Rows without an input image say what the caller passed, and compute nothing.
    rows = [row for row in TABLES[name] if row.get("first_input_wh", "") is not None]
    return pytest.mark.parametrize("row", rows, ids=[str(index) for index in range(len(rows))])


def check(row: dict[str, Any], expected: object, compute: Callable[[], object]) -> None:
    """Compares with the table; a row with an `error` must raise ours."""
    if "error" in row:
        with pytest.raises(ResolutionError):
            compute()
    else:
        assert compute() == expected


def sides(size: Resolution) -> list[int]:
    return [size.width, size.height]


@table("smart_resize")
def test_smart_resize_equals_the_reference(row: dict[str, Any]) -> None:
    assert row["factor"] == PATCH_PIXELS

    def compute() -> list[int]:
        limits = {"min_pixels": row["min_pixels"], "max_pixels": row["max_pixels"]}
        size = smart_resize(row["height"], row["width"], **limits)
        return [size.height, size.width]

    check(row, row.get("out_hw"), compute)


@table("editing_resolve_output_size")
def test_edit_output_size_equals_the_reference(row: dict[str, Any]) -> None:
    def compute() -> list[int]:
        if row["explicit"] is not None:
            width, height = row["explicit"]
            return sides(Resolution(width=width, height=height))
        width, height = row["first_input_wh"]
        return sides(edit_output_size(height, width, target_pixels=row["target_pixels"]))

    check(row, row.get("out_wh"), compute)


@table("editing_auto_input_max_pixels")
def test_auto_input_max_pixels_equals_the_reference(row: dict[str, Any]) -> None:
    assert LIMITS.auto_input_max_pixels(row["num_images"]) == row["out"]


@table("editing_resolve_input_max_pixels")
def test_input_max_pixels_equals_the_reference(row: dict[str, Any]) -> None:
    value = row["value"]
    number = int(value) if value is not None and value.isdecimal() else value
    check(row, row.get("out"), lambda: LIMITS.resolve_input_max_pixels(number, row["num_images"]))


@table("editing_resize_to_max_budget")
def test_first_input_resize_equals_the_reference(row: dict[str, Any]) -> None:
    def compute() -> list[int]:
        width, height = row["input_wh"]
        new_height, new_width = input_size(height, width, max_pixels=row["input_max_pixels"])
        return [new_width, new_height]

    check(row, row.get("out_wh"), compute)
    if "error" not in row:
        assert (compute() == row["input_wh"]) is row["unchanged"]


@table("interleave_resolve_image_size")
def test_interleave_size_equals_the_reference(row: dict[str, Any]) -> None:
    width, height = row["first_input_wh"]
    expected = row.get("out_wh")
    check(row, expected, lambda: sides(interleave_output_size(height, width, limits=LIMITS)))


def test_interleave_buckets_equal_the_reference() -> None:
    expected = TABLES["interleave_supported_resolutions_wh"]
    assert {name: sides(size) for name, size in BUCKETS_INTERLEAVE.items()} == expected


def test_t2i_buckets_are_the_published_ones() -> None:
    expected = {
        "1:1": [2048, 2048],
        "16:9": [2720, 1536],
        "3:2": [2496, 1664],
        "4:3": [2368, 1760],
        "2:1": [2880, 1440],
        "3:1": [3456, 1152],
    }
    assert {name: sides(BUCKETS_T2I[name]) for name in expected} == expected


@pytest.mark.parametrize(
    ("num_images", "pixels"), [(1, 4194304), (4, 4194304), (5, 3355443), (8, 2097152)]
)
def test_many_input_images_share_the_pixels_of_four(num_images: int, pixels: int) -> None:
    assert LIMITS.model_pixels(num_images) == (512 * 512, pixels)


@pytest.mark.parametrize("num_images", [1, 5, 100])
def test_images_that_are_only_asked_about_share_nothing(num_images: int) -> None:
    assert LIMITS.model_pixels(num_images, draws=False) == (256 * 256, 2048 * 2048)


@pytest.mark.parametrize("buckets", [BUCKETS_T2I, BUCKETS_INTERLEAVE, BUCKETS_TINY])
def test_a_transposed_ratio_is_the_transposed_size(buckets: dict[str, Resolution]) -> None:
    for name, size in buckets.items():
        width, height = name.split(":")
        transposed = buckets[f"{height}:{width}"]
        assert sides(transposed) == sides(size)[::-1]


def test_a_size_off_the_grid_is_refused() -> None:
    with pytest.raises(ResolutionError, match="expected width as a positive multiple of 32"):
        Resolution(width=33, height=32)
    with pytest.raises(ResolutionError, match="height"):
        Resolution(width=32, height=0)


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    pixels=st.integers(32 * 32, 2048 * 2048),
)
def test_resized_sides_are_on_the_grid_or_refused(height: int, width: int, pixels: int) -> None:
    long = max(height, width) > 200 * min(height, width)
    try:
        size = smart_resize(height, width, min_pixels=pixels, max_pixels=pixels)
    except ResolutionError:
        assert long
        return
    assert not long
    assert size.height % PATCH_PIXELS == size.width % PATCH_PIXELS == 0
    assert size.image_tokens * PATCH_PIXELS**2 == size.height * size.width
