"""Images to patches and back, against the golden vectors and by hand."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sensebatch.engine.preprocess import (
    IMAGE_MEAN,
    IMAGE_STD,
    decode_image,
    drawn_to_patches,
    image_to_patches,
    load_input,
    patchify,
    resize_for_model,
    resize_input,
    to_uint8,
)
from sensebatch.errors import JobError
from sensebatch.jobs import InputImage
from sensebatch.resolutions import PixelLimits
from tests.golden_data import Case, case_ids, load_case, load_cases, relative_error

LIMITS = PixelLimits(base_pixels=256 * 256, min_pixels=64 * 64)


def encode(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


def make_image(width: int = 64, height: int = 32) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("case", load_cases("common", "preprocess"), ids=lambda case: case.name)
def test_preprocessing_equals_the_golden_steps(case: Case) -> None:
    image = decode_image(encode(Image.fromarray(case.tensor("source").numpy())), case.name)
    assert np.array_equal(np.asarray(image.convert("RGB")), case.tensor("rgb").numpy())
    resized = resize_for_model(
        image, min_pixels=case.params["min_pixels"], max_pixels=case.params["max_pixels"]
    )
    assert np.array_equal(np.asarray(resized.convert("RGB")), case.tensor("resized_rgb").numpy())
    patches = image_to_patches(resized)
    assert relative_error(patches.rows_PD, case.tensor("pixel_values")) < 1e-6
    assert [list(patches.grid_hw)] == case.tensor("grid_hw").tolist()


@pytest.mark.parametrize(("config", "name"), case_ids("edit", "edit_think", "interleave", "ask"))
def test_input_images_of_a_job_equal_the_golden_patches(config: str, name: str) -> None:
    case = load_case(config, name)
    sources = [case.tensor(key).numpy() for key in sorted(case.entries) if "source_image" in key]
    if not sources:
        assert "pixel_values" not in case
        return
    draws, fewest = case.kind != "ask", case.params["load_image_native_min_pixels"]
    limits = PixelLimits(**{"min_pixels" if draws else "min_asked_pixels": fewest})
    _, most = limits.model_pixels(len(sources), draws=draws)
    assert most == case.params["load_image_native_max_pixels"]
    patches = [
        load_input(
            encode(Image.fromarray(source)),
            "image",
            num_images=len(sources),
            first_max_pixels=None,
            limits=limits,
            draws=draws,
        )
        for source in sources
    ]
    rows = torch.cat([item.rows_PD for item in patches])
    assert relative_error(rows, case.tensor("pixel_values")) < 1e-6
    assert [list(item.grid_hw) for item in patches] == case.tensor("grid_hw").tolist()


@pytest.mark.parametrize("case", load_cases("common", "denorm"), ids=lambda case: case.name)
def test_final_pixels_equal_the_golden_levels(case: Case) -> None:
    assert torch.equal(to_uint8(case.tensor("image")), case.tensor("uint8"))


def test_patch_rows_are_channel_first_and_row_major() -> None:
    image = torch.arange(3 * 32 * 64, dtype=torch.float32).reshape(3, 32, 64)
    rows = patchify(image)
    assert rows.shape == (8, 768)
    assert rows[5, 256 + 3 * 16 + 2] == image[1, 16 + 3, 16 + 2]


def test_drawn_image_is_normalised_without_clamping_or_rounding() -> None:
    image = make_image()
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    drawn = drawn_to_patches(pixels / 255 * 2 - 1)
    assert relative_error(drawn.rows_PD, image_to_patches(image).rows_PD) < 1e-5
    assert drawn.token_grid == (1, 2)
    bright = drawn_to_patches(torch.full((3, 32, 32), 3.0)).rows_PD
    assert bright[0, 0].item() == pytest.approx((2 - 0.485) / 0.229)


def test_corrections_are_those_that_were_found_when_the_manifest_was_read() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(make_image(64, 32), format="JPEG", exif=exif)
    assert decode_image(data, "x", corrections="").size == (64, 32)
    assert decode_image(data, "x", corrections="orientation").size == (32, 64)
    assert decode_image(data, "x").size == (32, 64)


def test_grey_stays_one_channel_until_it_is_resized_with_the_same_result() -> None:
    grey = make_image(300, 200).convert("L")
    data = encode(grey)
    assert decode_image(data, "x").mode == "L"
    expected = resize_for_model(
        resize_input(grey.convert("RGB"), 128 * 128), min_pixels=64 * 64, max_pixels=96 * 96
    )
    limits = PixelLimits(base_pixels=96 * 96, min_pixels=64 * 64)
    found = load_input(data, "x", num_images=1, first_max_pixels=128 * 128, limits=limits)
    assert limits.model_pixels(1) == (64 * 64, 96 * 96)
    assert torch.equal(found.rows_PD, image_to_patches(expected).rows_PD)


@pytest.mark.parametrize("first", [None, 200 * 200])
def test_an_image_decoded_at_half_its_size_is_resized_by_the_rules_of_the_whole(
    first: int | None,
) -> None:
    data = encode(make_image(1001, 601), format="JPEG")
    facts = InputImage(path="x", sha256="0", height=601, width=1001, corrections="reduced")
    grids = {
        load_input(
            data, "x", num_images=1, first_max_pixels=first, limits=LIMITS, planned=planned
        ).grid_hw
        for planned in (facts, replace(facts, corrections=""))
    }
    assert len(grids) == 1


def test_first_resize_enlarges_and_leaves_a_fitting_image_untouched() -> None:
    image = make_image(48, 48)
    assert resize_input(image, 64 * 64).size == (64, 64)
    fitting = make_image(64, 64)
    assert resize_input(fitting, 64 * 64) is fitting
    assert resize_input(image, None) is image


def test_first_resize_is_lanczos_and_the_models_own_bicubic() -> None:
    image = make_image(48, 48)
    first = resize_input(image, 64 * 64)
    assert first.tobytes() == image.resize((64, 64), Image.Resampling.LANCZOS).tobytes()
    own = resize_for_model(image, min_pixels=96 * 96, max_pixels=96 * 96)
    assert own.tobytes() == image.resize((96, 96), Image.Resampling.BICUBIC).tobytes()


def test_an_image_too_long_for_the_model_is_the_jobs_error() -> None:
    with pytest.raises(JobError, match="wide: expected an aspect ratio of at most 200"):
        load_input(
            encode(make_image(402, 2)), "wide", num_images=1, first_max_pixels=None, limits=LIMITS
        )


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "GIF"])
def test_an_image_cut_short_is_the_jobs_error(format_: str) -> None:
    data = encode(make_image(), format=format_)
    decode_image(data, "whole")
    with pytest.raises(JobError, match="cut: expected a"):
        decode_image(data[: len(data) // 3], "cut")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_patches_computed_in_place_are_those_of_the_formula(mode: str) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    image = Image.fromarray(levels).convert(mode)
    pixels = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)) / 255
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    expected = patchify((pixels.permute(2, 0, 1) - mean) / std)
    found = image_to_patches(image)
    assert torch.equal(found.rows_PD, expected)
    assert found.grid_hw == (6, 4)
